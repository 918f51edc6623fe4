"""The queue before a prefill pool: who waits there, for how long, and what is left behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from integration.stack import ENDPOINT, Stack, admin_pb2, router_pb2, until
from integration.test_disagg import POOL as POOL_ENDPOINT
from integration.test_disagg import PROMPT, busy, computed, in_flight, own_answer, pool, pools
from kvrouter_grpc.config.policy import EndpointPolicy
from kvrouter_grpc.routing.admission import Admission

HELD = "held"


@asynccontextmanager
async def busy_pool(upstream: dict[str, Any] | None = None, **policy: Any) -> AsyncIterator[Stack]:
    """One decode worker and one prefill worker that is busy until `free`, with a queue before the latter alone."""
    queueing = EndpointPolicy(POOL_ENDPOINT, {"queue_threshold": 0.5, **policy})
    async with pools(
        specs={"p0": {"max_num_batched_tokens": 64}}, endpoint_policies=(queueing,), upstream=upstream or {}
    ) as stack:
        assert stack.router.admission is None
        held = router_pb2.BestWorkerIdRequest(
            token_ids=range(9000, 9064), endpoint=POOL_ENDPOINT, request_id=HELD, reserve=True
        )
        await stack.stub.BestWorkerId(held)
        yield stack
        await until(lambda: in_flight(stack) == 0, "all is released")
        assert not len(admission(stack).queue)
        assert not admission(stack)._ids


def admission(stack: Stack) -> Admission:
    found = pool(stack).admission
    assert found is not None
    return found


async def free(stack: Stack) -> None:
    await stack.stub.Free(router_pb2.FreeRequest(request_id=HELD, endpoint=POOL_ENDPOINT))


async def waits(stack: Stack, count: int = 1) -> None:
    await until(lambda: len(admission(stack).queue) == count, f"{count} wait before the pool")


async def generated(stack: Stack, **fields: Any) -> tuple[list[int], router_pb2.RoutingData]:
    messages = await stack.generate(PROMPT, 6, endpoint=ENDPOINT, **fields)
    return [token for message in messages for token in message.token_ids], messages[0].routing


async def test_a_prompt_waits_for_the_pool_and_is_computed_there() -> None:
    async with busy_pool() as stack, asyncio.TaskGroup() as group:
        expected = await own_answer(stack.workers["p0"])
        task = group.create_task(generated(stack))
        await waits(stack)
        assert stack.load("d0") == (1, 0, 6)  # its place is booked, and nothing waits for being computed there
        queues = (await stack.admin.GetLoads(admin_pb2.GetLoadsRequest())).queues
        assert [(each.endpoint, [one.waiting for one in each.classes]) for each in queues] == [(POOL_ENDPOINT, [1])]
        assert busy(stack.workers["p0"]) == 0
        await free(stack)
        tokens, routing = await task
        assert tokens == expected
        assert (routing.prefill.remote, routing.prefill.worker_name) == (True, "p0")
        assert not routing.HasField("queued")  # the endpoint that generates has no queue
        assert admission(stack).outcomes == {"admitted": 1, "refused": 0, "timed_out": 0, "gone": 0}


async def test_a_prompt_that_waits_too_long_is_computed_where_it_is_decoded() -> None:
    async with busy_pool({"prefill_timeout_s": 0.2}) as stack:
        tokens, routing = await generated(stack)
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "QUEUE_TIMEOUT")
        assert routing.prefill.worker_name == ""
        assert await computed(stack, "d0") == len(PROMPT)
        assert tokens == await own_answer(stack.workers["d0"])
        assert admission(stack).outcomes["gone"] == 1
        await free(stack)


async def test_the_queues_own_limit_is_the_same_to_it() -> None:
    async with busy_pool(queue_timeout_s=0.2) as stack:
        _, routing = await generated(stack)
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "QUEUE_TIMEOUT")
        assert admission(stack).outcomes["timed_out"] == 1
        await free(stack)


async def test_without_room_in_the_queue_nobody_waits() -> None:
    async with busy_pool(queue_size=0) as stack:
        _, routing = await generated(stack)
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "QUEUE_FULL")
        await free(stack)


async def test_who_does_not_want_to_wait_does_not() -> None:
    async with busy_pool() as stack:
        _, routing = await generated(stack, routing=router_pb2.RoutingHints(do_not_queue=True))
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "WORKERS_BUSY")
        await free(stack)


async def test_a_pool_that_goes_while_a_prompt_waits_leaves_it_to_the_decode_worker() -> None:
    async with busy_pool() as stack, asyncio.TaskGroup() as group:
        task = group.create_task(generated(stack))
        await waits(stack)
        await stack.admin.DrainWorker(admin_pb2.DrainWorkerRequest(name="p0"))
        _, routing = await task
        assert (routing.prefill.remote, routing.prefill.reason) == (False, "NO_WORKERS")
        await free(stack)


async def test_a_caller_that_leaves_the_queue_leaves_nothing_behind() -> None:
    async with busy_pool() as stack:
        call = stack.stub.Generate(router_pb2.GenerateRequest(token_ids=PROMPT, endpoint=ENDPOINT, request_id="gone"))
        await waits(stack)
        call.cancel()
        await waits(stack, 0)
        await until(lambda: in_flight(stack) == 1, "only what holds the pool is booked")
        assert stack.load("d0") == (0, 0, 0)
        assert admission(stack).outcomes["gone"] == 1
        await free(stack)
        tokens, routing = await generated(stack, request_id="gone")  # its name is free again
        assert tokens
        assert routing.prefill.remote
