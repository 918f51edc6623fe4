"""Prompts computed by one engine and answered by another, over NIXL: by the router, and by the prefill handler."""

import asyncio
import json

import pytest

from e2e.conftest import Launch, Prompts
from e2e.engines import MAX_MODEL_LEN, Engine
from e2e.router import ENDPOINT
from e2e.waiting import until
from kvrouter_client import WorkerState
from kvrouter_prefill import PrefillHandler, Way

pytestmark = pytest.mark.vllm

SOURCES = "vllm:prompt_tokens_by_source_total"
TOKENS = 8
Pools = tuple[Engine, Engine]


async def computed(engine: Engine) -> float:
    """Prompt tokens that an engine computed itself."""
    return await engine.metric(SOURCES, source="local_compute")


async def fetched(engine: Engine) -> float:
    """Prompt tokens that an engine had from another one."""
    return await engine.metric(SOURCES, source="external_kv_transfer")


async def idle(engine: Engine) -> None:
    """Wait until an engine has no request."""

    async def is_idle() -> bool:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return not any([await engine.metric(name) for name in names])

    await until(is_idle, f"{engine.name} is idle")


async def test_the_answer_is_that_of_one_engine(pools: Pools, launch: Launch, prompt: Prompts) -> None:
    prefill, decode = pools
    async with launch([decode], prefill=[prefill]) as router:
        await router.settle()
        for asked in (prompt(200), prompt(96), prompt(20)):
            before = await computed(prefill), await computed(decode), await fetched(decode)
            reply = await router.generate(asked, TOKENS)
            assert (reply.routing.worker_name, reply.routing.attempts) == (decode.name, 1)
            assert reply.routing.prefill is not None
            assert (reply.routing.prefill.remote, reply.routing.prefill.worker_name) == (True, prefill.name)
            assert await computed(prefill) - before[0] == len(asked)
            assert await fetched(decode) - before[2] >= len(asked) - 1
            assert await computed(decode) - before[1] <= 1
            assert await router.booked() == (0, 0, 0)
            assert reply.token_ids == (await prefill.generate(asked, TOKENS)).token_ids
        # The pool is routed by its caches like any other.
        await router.settle()
        again = await router.generate(asked_again := [*prompt(64), 7], TOKENS)
        assert again.routing.prefill is not None
        assert again.routing.prefill.expected_cached_tokens == 0
        await router.settle()
        once_more = await router.generate(asked_again, TOKENS)
        assert once_more.routing.prefill is not None
        assert once_more.routing.prefill.expected_cached_tokens == 64
        assert once_more.token_ids == again.token_ids


async def test_mostly_cached_prompts_stay_where_they_are_decoded(pools: Pools, launch: Launch, prompt: Prompts) -> None:
    prefill, decode = pools
    limits = json.dumps({"eff_isl_threshold": 100})
    flags = ["--router-conditional-disagg", "--router-conditional-disagg-config", limits]
    async with launch([decode], flags, prefill=[prefill]) as router:
        await router.settle()
        asked = prompt(160)
        first = await router.generate(asked, TOKENS)
        assert first.routing.prefill is not None
        assert first.routing.prefill.remote
        await router.settle()
        before = await computed(prefill)
        longer = asked + prompt(30)
        reply = await router.generate(longer, TOKENS)
        assert reply.routing.prefill is not None
        assert (reply.routing.prefill.remote, reply.routing.prefill.reason) == (False, "NOT_WORTHWHILE")
        assert reply.routing.expected_cached_tokens == reply.usage.cached_tokens == 160
        assert await computed(prefill) == before
        assert reply.token_ids == (await prefill.generate(longer, TOKENS)).token_ids


async def test_a_killed_prefill_worker_fails_nothing(pools: Pools, launch: Launch, prompt: Prompts) -> None:
    prefill, decode = pools
    async with launch([decode], prefill=[prefill]) as router:
        await router.settle()
        asked = prompt(200)
        prefill.kill()
        try:
            replies = [await router.generate(asked, TOKENS) for _ in range(2)]
            expected = (await decode.generate(asked, TOKENS)).token_ids
            for reply in replies:
                assert reply.token_ids == expected
                assert reply.routing.prefill is not None
                assert not reply.routing.prefill.remote
            assert await router.booked() == (0, 0, 0)
        finally:
            await prefill.restart()

        async def back() -> bool:
            return (await router.worker(prefill)).state is WorkerState.READY

        await until(back, "the prefill worker is back")
        fresh = prompt(200)
        reply = await router.generate(fresh, TOKENS)
        assert reply.routing.prefill is not None
        assert reply.routing.prefill.remote
        assert reply.token_ids == (await prefill.generate(fresh, TOKENS)).token_ids


@pytest.mark.parametrize("way", list(Way))
async def test_the_prefill_handler(pools: Pools, launch: Launch, prompt: Prompts, way: Way) -> None:
    prefill, decode = pools
    async with (
        launch([prefill]) as router,
        PrefillHandler(router.client, ENDPOINT, decode.url, way=way) as handler,
    ):
        await router.settle()
        asked = prompt(200)
        before = await computed(prefill), await fetched(decode)
        body = {"prompt": asked, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        async with handler.complete(body) as answer:
            tokens = [token async for event in answer for choice in event["choices"] for token in choice["token_ids"]]
        assert answer.prefill is not None
        assert (answer.prefill.remote, answer.prefill.worker_name) == (True, prefill.name)
        assert (await computed(prefill) - before[0], await fetched(decode) - before[1] >= 199) == (200, True)
        assert tokens == (await prefill.generate(asked, TOKENS)).token_ids
        assert await router.booked() == (0, 0, 0)

        # Left early, and cancelled: nothing goes on anywhere.
        endless = body | {"prompt": prompt(100), "max_tokens": MAX_MODEL_LEN - 100}
        async with handler.complete(endless) as answer:
            await anext(answer)
        await idle(decode)
        task = asyncio.ensure_future(anext(handler.complete(endless | {"prompt": prompt(700)})))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(prefill)

        async def freed() -> bool:
            return await router.booked() == (0, 0, 0)

        await until(freed, "every reservation is freed")
