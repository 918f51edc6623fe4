"""The prefill handler over real sockets: a router, mock prefill workers, a mock decode engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest

from integration.stack import ENDPOINT, FAST, Stack, running, until
from kvrouter_client import KvRouterClient
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.upstream.metrics_text import samples
from kvrouter_prefill import EngineError, PrefillHandler, Reason, Way

ENGINE = replace(FAST, kv_transfer=True)
SLOW_DECODE = replace(ENGINE, speedup=1.0, itl_ms=10, prefill_tokens_per_s=1_000_000)
PROMPT = list(range(1000, 1100))
BOTH_WAYS = pytest.mark.parametrize("way", list(Way))


@dataclass
class Rig:
    """Prefill workers p0, p1 behind a router, and a decode engine that the router does not know."""

    stack: Stack
    decode: MockWorker
    handler: PrefillHandler
    client: KvRouterClient

    def prefilling(self) -> int:
        return sum(map(busy, self.stack.workers.values()))

    def booked(self) -> int:
        return len(self.stack.router.loads)


@asynccontextmanager
async def rig(
    way: Way = Way.RESERVATION,
    *,
    prefill: MockWorkerConfig = ENGINE,
    decode: MockWorkerConfig = ENGINE,
    workers: int = 1,
    **options: Any,
) -> AsyncIterator[Rig]:
    names = [f"p{i}" for i in range(workers)]
    async with (
        running(*names, worker=prefill) as stack,
        MockWorker(decode) as engine,
        KvRouterClient(stack.app.address) as client,
        PrefillHandler(client, ENDPOINT, engine.url, way=way, **options) as handler,
    ):
        yield Rig(stack, engine, handler, client)
        await until(lambda: len(stack.router.loads) == 0, "nothing stays booked")


def request(max_tokens: int = 6, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "temperature": 0,
    } | fields


def busy(worker: MockWorker) -> int:
    """Requests that an engine has."""
    life = worker._life
    return sum(e.scheduler.num_running + e.scheduler.num_waiting for e in life.engines) if life else 0


async def tokens_of(answer: Any) -> list[int]:
    async with answer:
        return [token async for event in answer for choice in event["choices"] for token in choice["token_ids"] or ()]


async def own_answer(worker: MockWorker, **fields: Any) -> list[int]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{worker.url}/v1/completions", json=request(**fields)) as reply,
    ):
        tokens: list[int] = (await reply.json())["choices"][0]["token_ids"]
        return tokens


async def fetched(worker: MockWorker) -> float:
    """Prompt tokens that came from another engine."""
    async with aiohttp.ClientSession() as session, session.get(f"{worker.url}/metrics") as page:
        found = samples(await page.read(), {"vllm:prompt_tokens_by_source_total"})
    return sum(sample.value for sample in found if sample.labels["source"] == "external_kv_transfer")


@BOTH_WAYS
async def test_the_prompt_is_computed_by_the_best_prefill_worker(way: Way) -> None:
    async with rig(way, workers=2) as it:
        expected = await own_answer(it.stack.workers["p0"])
        await it.stack.on("p1", PROMPT)  # p1 has it cached as the router knows it; p0 was asked past the router
        await it.stack.workers["p0"].kill()
        await until(lambda: it.stack.router.workers.named("p0").state.value == "unhealthy")  # type: ignore[union-attr]
        answer = it.handler.complete(request(), request_id="named")
        assert await tokens_of(answer) == expected
        assert answer.request_id == "named"
        assert answer.prefill is not None
        assert (answer.prefill.remote, answer.prefill.worker_name, answer.prefill.reason) == (True, "p1", None)
        assert await fetched(it.decode) == len(PROMPT) - 1


async def test_a_reservation_lives_until_the_blocks_are_fetched() -> None:
    slow = replace(ENGINE, speedup=1.0, prefill_tokens_per_s=500)
    async with rig(prefill=slow, decode=SLOW_DECODE) as it, it.handler.complete(request(200)) as answer:
        first = asyncio.ensure_future(anext(answer))
        await until(lambda: it.stack.load("p0") == (1, len(PROMPT), 6), "booked with the whole prompt")
        await first
        assert it.stack.load("p0") == (1, 0, 6)  # computed, and its blocks still counted
        await anext(answer)
        assert it.stack.load("p0") == (0, 0, 0)
        assert busy(it.decode) == 1


@BOTH_WAYS
async def test_cancelling_while_the_prompt_is_computed(way: Way) -> None:
    slow = replace(ENGINE, speedup=1.0, prefill_tokens_per_s=20)
    async with rig(way, prefill=slow) as it:
        task = asyncio.ensure_future(tokens_of(it.handler.complete(request())))
        await until(lambda: it.prefilling() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: it.prefilling() == 0, "the prefill is aborted")
        await until(lambda: it.booked() == 0, "the reservation is freed")
        assert busy(it.decode) == 0


@BOTH_WAYS
async def test_leaving_while_the_answer_is_streamed(way: Way) -> None:
    async with rig(way, decode=SLOW_DECODE) as it:
        async with it.handler.complete(request(4000)) as answer:
            await anext(answer)
            assert busy(it.decode) == 1
        await until(lambda: busy(it.decode) == 0, "the request is aborted")
        with pytest.raises(StopAsyncIteration):
            await anext(answer)


# --- failure ----------------------------------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize(
    ("reason", "setup"),
    [
        (Reason.NO_TRANSFER_PARAMS, {"prefill": FAST}),
        (Reason.TRANSFER, {"prefill": replace(ENGINE, kv_transfer_timeout_s=0.0)}),
        (
            Reason.TIMEOUT,
            {"prefill": replace(ENGINE, speedup=1.0, prefill_tokens_per_s=20), "prefill_timeout_s": 0.2},
        ),
    ],
    ids=lambda value: value.value if isinstance(value, Reason) else "",
)
async def test_a_failed_prefill_leaves_the_prompt_to_the_decode_engine(
    way: Way, reason: Reason, setup: dict[str, Any]
) -> None:
    async with rig(way, **setup) as it:
        expected = await own_answer(it.decode)
        answer = it.handler.complete(request())
        assert await tokens_of(answer) == expected
        assert answer.prefill is not None
        assert (answer.prefill.remote, answer.prefill.reason) == (False, reason)
        await until(lambda: it.prefilling() == 0)


async def test_a_dead_prefill_worker_and_then_none_and_then_no_router() -> None:
    async with rig() as it:
        expected = await own_answer(it.decode)
        reasons = set()
        await it.stack.workers["p0"].kill()
        for _ in range(2):
            answer = it.handler.complete(request())
            assert await tokens_of(answer) == expected
            assert answer.prefill is not None
            reasons.add(answer.prefill.reason)
            await until(lambda: it.stack.router.workers.named("p0").state.value == "unhealthy")  # type: ignore[union-attr]
        assert reasons <= {Reason.ENGINE, Reason.ROUTER}
        it.stack.app.stop()
        answer = it.handler.complete(request())
        assert await tokens_of(answer) == expected
        assert answer.prefill is not None
        assert answer.prefill.reason is Reason.ROUTER


@pytest.mark.parametrize("field", [{"n": 2, "temperature": 1}, {"kv_transfer_params": {}}])
async def test_what_cannot_be_handed_over_is_not(field: dict[str, Any]) -> None:
    async with rig() as it:
        answer = it.handler.complete(request(**field))
        assert len(await tokens_of(answer)) == 6 * field.get("n", 1)
        assert answer.prefill is not None
        assert (answer.prefill.remote, answer.prefill.worker_name) == (False, "")


async def test_the_decode_engines_refusal_is_the_callers() -> None:
    async with rig() as it:
        with pytest.raises(EngineError) as caught:
            await tokens_of(it.handler.complete(request(top_p=7)))
        assert (caught.value.status, caught.value.refused) == (400, True)
        with pytest.raises(ValueError, match="token ids"):
            it.handler.complete({"prompt": "text"})


async def test_a_killed_decode_engine_breaks_the_answer_off() -> None:
    async with rig(decode=SLOW_DECODE) as it:
        answer = it.handler.complete(request(4000))
        await anext(answer)
        await it.decode.kill()
        with pytest.raises(EngineError) as caught:
            await tokens_of(answer)
        assert not caught.value.refused
