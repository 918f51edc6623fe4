"""The client against the mock worker, which speaks vLLM's wire by itself."""

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import aiohttp
import pytest

from kvrouter_grpc.config import UpstreamConfig
from kvrouter_grpc.errors import EngineRejectedError, StreamInterruptedError, UpstreamUnavailableError
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.types import EngineChunk, EngineRequest, Usage
from kvrouter_grpc.upstream.metrics_text import samples
from kvrouter_grpc.upstream.session import engine_session
from kvrouter_grpc.upstream.vllm_http import VllmHttpClient

PROMPT = array("I", range(100, 164))


def request(**fields: Any) -> EngineRequest:
    params = {"max_tokens": 16, "ignore_eos": True}
    return EngineRequest(**{"request_id": "r-1", "model": "mock", "tokens": PROMPT, "params": params} | fields)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with engine_session() as session:
        yield session


async def collect(client: VllmHttpClient, asked: EngineRequest, dp_rank: int | None = None) -> list[EngineChunk]:
    async with aclosing(client.generate(asked, dp_rank)) as answer:
        return [chunk async for chunks in answer for chunk in chunks]


async def running(worker: MockWorker, session: aiohttp.ClientSession) -> float:
    async with session.get(f"{worker.url}/metrics") as page:
        name = "vllm:num_requests_running"
        return sum(sample.value for sample in samples(await page.read(), {name}))


async def test_the_stream_equals_the_engines_own_answer(session: aiohttp.ClientSession) -> None:
    async with MockWorker(MockWorkerConfig(speedup=0)) as worker:
        body = {"model": "mock", "prompt": PROMPT.tolist(), "return_token_ids": True, **request().params}
        async with session.post(f"{worker.url}/v1/completions", json=body) as response:
            own = json.loads(await response.read())
        chunks = await collect(VllmHttpClient(worker.url, session, UpstreamConfig()), request())
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == own["choices"][0]["token_ids"]
    assert "".join(chunk.text for chunk in chunks) == own["choices"][0]["text"]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert chunks[-1].usage == Usage(64, 16, cached_tokens=48)  # the last block of a full hit is computed again


async def test_several_answers_to_one_request(session: aiohttp.ClientSession) -> None:
    asked = request(params={"max_tokens": 5, "n": 3, "temperature": 1.0, "ignore_eos": True})
    async with MockWorker(MockWorkerConfig(speedup=0)) as worker:
        chunks = await collect(VllmHttpClient(worker.url, session, UpstreamConfig()), asked)
    for index in range(3):
        assert sum(len(chunk.token_ids) for chunk in chunks if chunk.index == index) == 5
    totals = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert totals == sorted(totals)
    assert totals[-1] == 15


async def test_ranks_keep_their_own_caches(session: aiohttp.ClientSession) -> None:
    async with MockWorker(MockWorkerConfig(speedup=0, dp_size=2)) as worker:
        client = VllmHttpClient(worker.url, session, UpstreamConfig())
        cached = []
        for rank in (0, 0, 1, 1):
            usage = (await collect(client, request(), rank))[-1].usage
            cached.append(usage and usage.cached_tokens)
        assert cached == [0, 48, 0, 48]
        with pytest.raises(EngineRejectedError) as caught:
            await collect(client, request(), 2)
    assert "data_parallel_rank 2 is out of range" in caught.value.message


async def test_an_abort_frees_the_request_in_the_engine(session: aiohttp.ClientSession) -> None:
    endless = request(params={"max_tokens": 4000, "ignore_eos": True})
    async with MockWorker(MockWorkerConfig(itl_ms=2)) as worker:
        client = VllmHttpClient(worker.url, session, UpstreamConfig())
        async with aclosing(client.generate(endless, None)) as answer:
            await anext(answer)
            assert await running(worker, session) == 1
        async with asyncio.timeout(2):
            while await running(worker, session):  # noqa: ASYNC110 - the engine tells only when it is asked
                await asyncio.sleep(0.005)


async def test_a_killed_engine_interrupts_and_is_then_unavailable(session: aiohttp.ClientSession) -> None:
    endless = request(params={"max_tokens": 4000, "ignore_eos": True})
    async with MockWorker(MockWorkerConfig(itl_ms=2)) as worker:
        client = VllmHttpClient(worker.url, session, UpstreamConfig())
        answer = client.generate(endless, None)
        await anext(answer)
        await worker.kill()
        with pytest.raises(StreamInterruptedError):
            async for _ in answer:
                pass
        with pytest.raises(UpstreamUnavailableError):
            await collect(client, request())
        await worker.restart()
        assert len(await collect(client, request())) > 0


async def test_a_bad_token_is_refused_inside_the_stream(session: aiohttp.ClientSession) -> None:
    async with MockWorker(MockWorkerConfig(speedup=0)) as worker:
        client = VllmHttpClient(worker.url, session, UpstreamConfig())
        with pytest.raises(EngineRejectedError) as caught:
            await collect(client, request(tokens=array("I", [2**31])))
        with pytest.raises(EngineRejectedError) as unknown:
            await collect(client, request(model="nobody"))
    assert caught.value.message == "the engine refused the request: Token id 2147483648 is out of vocabulary"
    assert unknown.value.metadata["http_status"] == "404"


async def test_facts(session: aiohttp.ClientSession) -> None:
    async with MockWorker(MockWorkerConfig(dp_size=2, loras=("adapter",), num_blocks=100)) as worker:
        facts = await VllmHttpClient(worker.url, session, UpstreamConfig()).facts()
    assert (facts.models, facts.loras) == (("mock",), ("adapter",))
    assert (facts.block_size, facts.total_kv_blocks, facts.dp_size) == (16, 100, 2)
    assert (facts.events, facts.replay) == (worker.events_endpoints[0], worker.replay_endpoints[0])
    assert (facts.topic, facts.kv_events) == ("kv-events", True)
