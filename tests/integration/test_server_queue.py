"""The queue over the real server, in front of workers that compute slowly."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from integration.server_rig import refusal
from integration.stack import ENDPOINT, FAST, admin_pb2, router_pb2, running, until
from kvrouter_grpc.mock_worker import MockWorkerConfig

# A prompt of 640 tokens keeps a worker busy: its queue threshold is half of a step of 1024.
SLOW = MockWorkerConfig(block_size=16, num_blocks=4096, prefill_tokens_per_s=16_000, itl_ms=1)
BUSY = 640
QUEUE = {"queue_threshold": 0.5}


@asynccontextmanager
async def queueing(*names, worker=SLOW, router=None, **sections):
    specs = {name: {"max_num_batched_tokens": 1024} for name in names}
    async with running(*names, worker=worker, specs=specs, router=QUEUE | (router or {}), **sections) as stack:
        yield stack
        await until(lambda: stack.load(names[0])[:2] == (0, 0) and not len(stack.router.loads), "all is released")
        assert stack.router.admission is not None
        assert not len(stack.router.admission.queue)
        assert not stack.router.admission._ids


def words(number, count=BUSY):
    return [1000 + (number * 7919 + i) % 30_000 for i in range(count)]


def hints(**fields):
    return router_pb2.RoutingHints(**fields)


async def hold(stack, request_id="held"):
    """Keep the only worker busy until `free`."""
    reply = await stack.stub.BestWorkerId(
        router_pb2.BestWorkerIdRequest(token_ids=words(0), request_id=request_id, reserve=True)
    )
    assert not reply.HasField("queued")


async def free(stack, request_id="held"):
    await stack.stub.Free(router_pb2.FreeRequest(request_id=request_id))


async def waiting(stack, count):
    await until(lambda: len(stack.router.admission.queue) == count, f"{count} wait")


async def test_requests_go_by_priority_and_say_how_long_they_waited():
    order = []

    async with queueing("w0") as stack:
        await hold(stack)

        async def ask(number, **fields):
            async for message in stack.stub.Generate(
                router_pb2.GenerateRequest(
                    token_ids=words(number),
                    routing=hints(**fields),
                    stop_conditions=router_pb2.StopConditions(max_tokens=1),
                )
            ):
                if message.HasField("routing"):
                    order.append(number)
                    assert message.routing.queued.ToNanoseconds() > 0

        async with asyncio.TaskGroup() as group:
            for number, fields in enumerate(
                ({}, {"priority_jump_s": 60}, {"strict_priority": 1}, {"strict_priority": 2}), start=1
            ):
                group.create_task(ask(number, **fields))
                await waiting(stack, number)
            (queue,) = (await stack.admin.GetLoads(admin_pb2.GetLoadsRequest())).queues
            assert queue.endpoint == ENDPOINT
            assert [(each.strict_priority, each.waiting) for each in queue.classes] == [(2, 1), (1, 1), (0, 2)]
            assert [each.waiting_tokens for each in queue.classes] == [BUSY, BUSY, 2 * BUSY]
            assert all(each.longest_wait.ToNanoseconds() > 0 for each in queue.classes)
            query = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=words(9)))
            assert query.worker_name == "w0"  # a query waits for nobody
            await free(stack)
        assert order == [4, 3, 2, 1]
        (queue,) = (await stack.admin.GetLoads(admin_pb2.GetLoadsRequest())).queues
        assert (queue.admitted, queue.refused, queue.timed_out, queue.gone) == (4, 0, 0, 0)


async def test_a_reservation_waits_unless_it_may_not():
    async with queueing("w0", worker=FAST) as stack:
        await hold(stack)
        wanted = router_pb2.BestWorkerIdRequest(token_ids=words(1), request_id="a", reserve=True)
        call = asyncio.ensure_future(stack.stub.BestWorkerId(wanted))
        await waiting(stack, 1)
        impatient = router_pb2.BestWorkerIdRequest(
            token_ids=words(2), request_id="b", reserve=True, routing=hints(do_not_queue=True)
        )
        refused = await refusal(stack.stub.BestWorkerId(impatient))
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WORKERS_BUSY")
        assert refused.retry_s
        batch = router_pb2.BestWorkerIdBatchRequest(requests=[wanted, router_pb2.BestWorkerIdRequest(token_ids=[1])])
        first, second = (await stack.stub.BestWorkerIdBatch(batch)).results
        assert first.status.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
        assert second.response.worker_name == "w0"
        batch.requests[0].request_id = "c"
        first, _ = (await stack.stub.BestWorkerIdBatch(batch)).results
        assert first.status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        await stack.stub.MarkPrefillComplete(router_pb2.MarkPrefillCompleteRequest(request_id="held"))
        assert (await call).queued.ToNanoseconds() > 0
        await free(stack, "a")
        await free(stack)


async def test_full_timed_out_cancelled_and_past_its_deadline():
    async with queueing("w0", worker=FAST, router={"queue_size": 2, "queue_timeout_s": 0.3}) as stack:
        await hold(stack)

        def ask(number, **options):
            return stack.stub.Generate(router_pb2.GenerateRequest(token_ids=words(number)), **options)

        late = ask(1, timeout=0.1)
        late_reads = asyncio.ensure_future(late.read())
        await waiting(stack, 1)
        gone = ask(2)
        gone_reads = asyncio.ensure_future(gone.read())
        await waiting(stack, 2)
        refused = await refusal(ask(3).read())
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert refused.retry_s
        gone.cancel()
        await asyncio.wait([gone_reads])
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await late_reads
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await waiting(stack, 0)
        timed_out = await refusal(ask(4).read())
        assert (timed_out.code, timed_out.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_TIMEOUT")
        assert timed_out.retry_s
        assert stack.router.admission.outcomes == {"admitted": 0, "refused": 1, "timed_out": 1, "gone": 2}
        await free(stack)


async def test_tenants_share_what_there_is_when_one_sends_three_times_too_much():
    """Workers compute about 25 such prompts per second; 'greedy' always has nine under way, 'modest' three."""
    done = {"greedy": 0, "modest": 0}
    stop = asyncio.Event()

    async with queueing("w0") as stack:

        async def client(tenant, number):
            while not stop.is_set():
                number += 1
                await stack.generate(words(number), 1, routing=hints(tenant=tenant))
                done[tenant] += 1
                if sum(done.values()) >= 40:
                    stop.set()

        async with asyncio.TaskGroup() as group:
            for number in range(9):
                group.create_task(client("greedy", 100 * number))
            for number in range(9, 12):
                group.create_task(client("modest", 100 * number))
    assert abs(done["greedy"] - done["modest"]) <= 12  # what was under way at the start and the end is no one's turn


async def test_a_gateway_says_who_the_tenant_is():
    order = []

    async with queueing("w0", router={"queue_tenant_metadata": "x-tenant-id"}) as stack:
        await hold(stack)

        async def ask(number, told, claimed):
            call = stack.stub.Generate(
                router_pb2.GenerateRequest(
                    token_ids=words(number),
                    routing=hints(tenant=claimed) if claimed else None,
                    stop_conditions=router_pb2.StopConditions(max_tokens=1),
                ),
                metadata=[("x-tenant-id", told)] if told else None,
            )
            assert (await call.read()).HasField("routing")
            order.append(number)
            call.cancel()

        async with asyncio.TaskGroup() as group:
            # 'greedy' makes up a tenant with each request, and is one all the same.
            for number, tenant in enumerate(("greedy", "greedy", "greedy", "modest", ""), start=1):
                group.create_task(ask(number, tenant, f"made up {number}" if tenant != "modest" else ""))
                await waiting(stack, number)
            (band,) = stack.router.admission.queue._bands.values()
            assert {name: tenant.waiting for name, tenant in band.tenants.items()} == {"greedy": 3, "modest": 1, "": 1}
            await free(stack)
        assert order == [1, 4, 5, 2, 3]
        long = stack.stub.Generate(
            router_pb2.GenerateRequest(token_ids=words(1)), metadata=[("x-tenant-id", "t" * 257)]
        )
        assert list((await refusal(long.read())).fields) == ["metadata x-tenant-id"]


async def test_thresholds_refuse_at_once_and_change_at_run_time():
    async with running("w0", specs={"w0": {"max_num_batched_tokens": 1024}}) as stack:
        await hold(stack)
        query = router_pb2.BestWorkerIdRequest(token_ids=words(1))
        assert (await stack.stub.BestWorkerId(query)).worker_name == "w0"
        thresholds = admin_pb2.Thresholds(active_prefill_tokens_frac=0.5, active_decode_blocks=0.9)
        await stack.admin.SetThresholds(admin_pb2.SetThresholdsRequest(thresholds=thresholds))
        (told,) = (await stack.admin.GetThresholds(admin_pb2.GetThresholdsRequest())).endpoints
        assert (told.endpoint, told.thresholds) == (ENDPOINT, thresholds)
        refused = await refusal(stack.stub.BestWorkerId(query))
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ALL_WORKERS_OVERLOADED")
        assert refused.retry_s == 1.0
        query.routing.worker_id = stack.target("w0").worker_id
        refused = await refusal(stack.stub.BestWorkerId(query))
        assert refused.reason == "PINNED_WORKER_OVERLOADED"
        bad = admin_pb2.Thresholds(active_decode_blocks=1.5, active_prefill_tokens_frac=float("nan"))
        refused = await refusal(stack.admin.SetThresholds(admin_pb2.SetThresholdsRequest(thresholds=bad)))
        assert set(refused.fields) == {"thresholds.active_decode_blocks", "thresholds.active_prefill_tokens_frac"}
        await stack.admin.SetThresholds(admin_pb2.SetThresholdsRequest())
        assert (await stack.stub.BestWorkerId(query)).worker_name == "w0"
        await free(stack)
