"""A killed engine is out of the decision within a second, its stream ends clearly, and its restart is indexed again."""

import asyncio
import time

import grpc
import pytest

from e2e.conftest import Prompts
from e2e.engines import MAX_MODEL_LEN, Engine
from e2e.router import Reply, Router
from e2e.waiting import until
from kvrouter_client import FinishReason, GenerateStream, KvRouterError, WorkerState

pytestmark = pytest.mark.vllm


async def test_kill_and_restart(fleet: list[Engine], router: Router, prompt: Prompts) -> None:
    victim, other = fleet
    size = victim.block_size
    asked = prompt(6 * size + 1)
    pin = await router.pin(victim)
    for _ in range(3):  # a sequence that the restarted engine does not reach at once
        await router.generate(prompt(2 * size), routing=pin)
    await router.generate(asked, routing=pin)
    await router.settle(victim)
    assert (await router.client.best_worker_id(asked)).worker_name == victim.name

    try:
        reply = Reply()
        stream = router.stream(prompt(50), MAX_MODEL_LEN - 100, routing=pin)
        reply.add(await anext(stream))
        killed = time.monotonic()
        victim.kill()
        with pytest.raises(KvRouterError) as ended:
            await reply.rest(stream)
        assert time.monotonic() - killed < 1.0, "the stream must end at once"
        assert ended.value.code == grpc.StatusCode.ABORTED
        assert ended.value.reason == "STREAM_INTERRUPTED"
        assert 0 < len(reply.token_ids) < MAX_MODEL_LEN - 100

        async def routed_elsewhere() -> bool:
            return (await router.client.best_worker_id(asked)).worker_name == other.name

        await until(routed_elsewhere, "the killed engine is out of the decision", killed + 1.0 - time.monotonic())
        assert (await router.generate(asked, 5)).routing.worker_name == other.name
        refused = await router.refused(asked, routing=pin)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "PINNED_WORKER_UNAVAILABLE")
        status = await router.worker(victim)
        assert (status.state, status.worker_id) == (WorkerState.UNHEALTHY, pin.worker_id)
        assert await router.booked() == (0, 0, 0)
    finally:
        await victim.restart()

    # Asked directly as soon as it is up, so that it publishes before anybody can have subscribed again.
    early = prompt(4 * size + 1)
    assert (await victim.generate(early)).cached_tokens == 0
    await router.settle(victim)
    assert (await router.event_stream(victim)).restarts == 1
    assert await router.overlap(victim, asked) == 0
    assert await router.overlap(victim, early) == 4
    best = await router.client.best_worker_id(early + prompt(size))
    assert (best.worker_name, best.overlap_blocks) == (victim.name, 4)
    for tokens in (asked, early, asked + prompt(size)):
        again = await router.generate(tokens, routing=pin)
        assert again.usage.cached_tokens == again.routing.expected_cached_tokens
        await router.settle(victim)


async def test_an_engine_that_dies_before_the_first_token_is_replaced(
    fleet: list[Engine], router: Router, prompt: Prompts
) -> None:
    """The decision still names the dead engine, because its prefix lies there and no check has failed yet."""
    victim, other = fleet
    asked = prompt(8 * victim.block_size)
    await router.generate(asked, routing=await router.pin(victim))
    await router.settle(victim)
    own = await victim.generate(asked, 8)
    assert (await router.client.best_worker_id(asked)).worker_name == victim.name
    try:
        victim.kill()
        reply = await router.generate(asked, 8)
        assert reply.routing.worker_name == other.name
        assert reply.routing.attempts in {1, 2}
        assert reply.token_ids == own.token_ids
        assert await router.booked() == (0, 0, 0)
    finally:
        await victim.restart()
    await router.settle(victim)


async def test_a_terminated_engine_ends_its_stream_clearly(
    fleet: list[Engine], router: Router, prompt: Prompts
) -> None:
    """SIGTERM and, when the grace is over, SIGKILL, as a rollout does it.

    vLLM ends open streams with finish reason "abort"; when its engine core is gone before it could tell, they stay open
    and silent until the SIGKILL.
    """
    victim, other = fleet
    asked = prompt(5 * victim.block_size)
    pin = await router.pin(victim)
    await router.generate(asked, routing=pin)
    await router.settle(victim)

    async def routed_elsewhere() -> bool:
        return (await router.client.best_worker_id(asked)).worker_name == other.name

    async def rest(stream: GenerateStream) -> KvRouterError | None:
        try:
            await reply.rest(stream)
        except KvRouterError as error:
            return error
        return None

    assert not await routed_elsewhere()
    reply = Reply()
    stream = router.stream(prompt(50), MAX_MODEL_LEN - 100, routing=pin)
    reply.add(await anext(stream))
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(victim.terminate))
            ending = group.create_task(rest(stream))
            await until(routed_elsewhere, "the terminated engine is out of the decision", 1.0)
        assert 0 < len(reply.token_ids) < MAX_MODEL_LEN - 100
        if (failure := ending.result()) is None:
            assert reply.finish_reason is FinishReason.CANCELLED
        else:
            assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "STREAM_INTERRUPTED")
        assert await router.booked() == (0, 0, 0)
    finally:
        await victim.restart()
    await router.settle(victim)
