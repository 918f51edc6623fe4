"""The typed client streams answers: a real router over real mock workers."""

import asyncio

import aiohttp
import grpc
import pytest

from integration.client_rig import (
    SLOW,
    assert_nothing_is_left,
    fast,
    prompt,
    requests_in_flight,
    router,
    slow,
)
from kvrouter_client import (
    FinishReason,
    GenerateChunk,
    GenerateStream,
    KvRouterClient,
    KvRouterError,
    OutputOptions,
    SamplingOptions,
)
from programs import Fleet, fleet

__all__ = ["fast", "router", "slow"]


async def test_stream_is_the_answer_of_the_engine(fast: Fleet, router: KvRouterClient) -> None:
    chunks = [chunk async for chunk in router.generate(prompt(1), max_tokens=12, temperature=0.0)]

    routing = chunks[0].routing
    assert routing is not None
    assert routing.worker_name in fast.workers
    assert routing.prompt_tokens == len(prompt(1))
    assert all(chunk.routing is None for chunk in chunks[1:])
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12

    body = {"prompt": prompt(1), "max_tokens": 12, "temperature": 0.0, "return_token_ids": True}
    url = f"{fast.workers['w0'].said['url']}/v1/completions"
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.post(url, json=body) as reply:
        (choice,) = (await reply.json())["choices"]
    assert [token for chunk in chunks for token in chunk.token_ids] == choice["token_ids"]
    assert "".join(chunk.text for chunk in chunks) == choice["text"]


async def test_options_reach_the_engine(router: KvRouterClient) -> None:
    stream = router.generate(
        prompt(2),
        max_tokens=4,
        sampling_options=SamplingOptions(n=2, temperature=1.0, seed=7),
        output_options=OutputOptions(logprobs=2),
        request_id="options-reach-the-engine",
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.index for chunk in chunks} == {0, 1}
    assert sum(len(chunk.token_ids) for chunk in chunks) == 8
    with_tokens = [chunk for chunk in chunks if chunk.token_ids]
    assert all(len(chunk.log_probs) == len(chunk.token_ids) for chunk in with_tokens)
    assert all(len(position) >= 2 for chunk in with_tokens for position in chunk.top_logprobs)
    assert chunks[0].routing is not None
    assert chunks[0].routing.request_id == "options-reach-the-engine"


async def test_query_annotation_decides_only(fast: Fleet, router: KvRouterClient) -> None:
    chunks = [chunk async for chunk in router.generate(prompt(3), annotations=["query_instance_id"])]
    (only,) = chunks
    assert only.routing is not None
    assert only.token_ids == ()
    await assert_nothing_is_left(fast)


async def first_chunk(client: KvRouterClient) -> GenerateChunk:
    return await anext(aiter(client.generate(prompt(4), max_tokens=2000)))


async def last_chunk(stream: GenerateStream) -> GenerateChunk:
    return [chunk async for chunk in stream][-1]


async def test_leaving_the_block_cancels_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address) as client:
        async with client.generate(prompt(4), max_tokens=2000) as stream:
            async for _ in stream:
                break
            assert await requests_in_flight(slow.address) == 1
        await assert_nothing_is_left(slow)
        assert [chunk async for chunk in stream] == []


async def test_forgetting_the_stream_cancels_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address) as client:
        await first_chunk(client)
        await assert_nothing_is_left(slow)


async def test_cancelling_the_reader_cancels_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address) as client:
        stream = client.generate(prompt(5), max_tokens=2000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(last_chunk(stream), 0.3)
        await assert_nothing_is_left(slow)


async def test_deadline_ends_the_stream_and_the_request(slow: Fleet) -> None:
    async with KvRouterClient(slow.address, generate_timeout_s=0.5) as client:
        with pytest.raises(KvRouterError) as caught:
            async for _ in client.generate(prompt(6), max_tokens=2000):
                pass
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await assert_nothing_is_left(slow)


async def test_worker_that_dies_in_mid_stream_is_told() -> None:
    with fleet(1, workers=SLOW) as running:
        async with KvRouterClient(running.address) as client:
            stream = client.generate(prompt(7), max_tokens=2000)
            assert (await anext(stream)).routing is not None
            running.workers["w0"].kill()
            with pytest.raises(KvRouterError) as caught:
                async for _ in stream:
                    pass
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert caught.value.reason == "STREAM_INTERRUPTED"
        assert caught.value.retry_after_s is None
        assert caught.value.request_id
