"""Workers that come and go: registration leases, drain, restarts as something else, what readiness says."""

import asyncio
import random
from dataclasses import replace

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from integration.stack import ENDPOINT, FAST, admin_pb2, in_service, router_pb2, running, until
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.routing.workers import worker_id_of


def words(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(300, 20_000) for _ in range(count)]


def spec(name, worker, **fields):
    return admin_pb2.WorkerSpec(name=name, url=worker.url, **fields)


async def listed(stack):
    reply = await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest(endpoint=ENDPOINT))
    return {worker.spec.name: worker for worker in reply.workers}, reply


async def test_register_renew_expire():
    async with running("a") as stack, MockWorker(FAST) as late:
        request = admin_pb2.RegisterWorkerRequest(spec=spec("late", late), ttl=Duration(seconds=1))
        reply = await stack.admin.RegisterWorker(request)
        assert reply.worker_id == worker_id_of("late")
        await stack.ready("late")
        pin = router_pb2.RoutingHints(worker_id=reply.worker_id)
        assert (await stack.generate(words(1, 64), routing=pin))[0].routing.worker_name == "late"
        workers, _ = await listed(stack)
        assert 0 < workers["late"].registration_ttl.ToTimedelta().total_seconds() <= 1
        assert not workers["a"].HasField("registration_ttl")
        # Renewed in time, it stays; then nobody renews it any more.
        async with asyncio.timeout(10):
            for _ in range(6):
                await asyncio.sleep(0.3)
                renewed = await stack.admin.RenewWorker(admin_pb2.RenewWorkerRequest(name="late"))
                assert renewed.ttl.ToTimedelta().total_seconds() == 1
        await until(lambda: stack.router.workers.named("late") is None, "the registration expires")
        assert stack.router.index.stream_if_known(stack.target("late")) is None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.admin.RenewWorker(admin_pb2.RenewWorkerRequest(name="late"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "register it again" in caught.value.details()


async def test_registering_again_keeps_the_cache_unless_the_worker_is_another():
    async with running("a") as stack, MockWorker(FAST) as one, MockWorker(FAST) as two:
        register = lambda worker: stack.admin.RegisterWorker(  # noqa: E731
            admin_pb2.RegisterWorkerRequest(spec=spec("x", worker))
        )
        await register(one)
        await stack.ready("x")
        stack.workers["x"] = one
        await stack.on("x", words(1, 64))
        await register(one)
        assert stack.router.index.blocks(stack.target("x")) == 4
        await register(two)
        stack.workers["x"] = two
        await stack.ready("x")
        assert stack.router.index.blocks(stack.target("x")) == 0
        await stack.on("x", words(2, 64))
        assert stack.router.index.blocks(stack.target("x")) == 4


async def test_configured_workers_are_not_for_registrations_to_change():
    async with running("a") as stack, MockWorker(FAST) as other:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec("a", other)))
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_deregister_forgets_at_once_and_lets_streams_finish():
    slow = replace(FAST, speedup=1.0, itl_ms=20)
    async with running("a", "b", worker=slow) as stack:
        request = router_pb2.GenerateRequest(
            token_ids=words(1, 64),
            stop_conditions=router_pb2.StopConditions(max_tokens=20, ignore_eos=True),
            routing=router_pb2.RoutingHints(worker_id=worker_id_of("a")),
        )
        answer = aiter(stack.stub.Generate(request))
        messages = [await anext(answer)]
        await stack.admin.DeregisterWorker(admin_pb2.DeregisterWorkerRequest(name="a"))
        best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=words(1, 64)))
        assert (best.worker_name, best.overlap_blocks) == ("b", 0)
        messages += [message async for message in answer]
        assert sum(len(message.token_ids) for message in messages) == 20
        assert set(await listed_names(stack)) == {"b"}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.admin.DeregisterWorker(admin_pb2.DeregisterWorkerRequest(name="a"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def listed_names(stack):
    workers, _ = await listed(stack)
    return workers


async def test_drain_finishes_what_is_there_and_can_be_undone():
    slow = replace(FAST, speedup=1.0, itl_ms=20)
    async with running("a", "b", worker=slow) as stack:
        request = router_pb2.GenerateRequest(
            token_ids=words(1, 64),
            stop_conditions=router_pb2.StopConditions(max_tokens=30, ignore_eos=True),
            routing=router_pb2.RoutingHints(worker_id=worker_id_of("a")),
        )
        answer = aiter(stack.stub.Generate(request))
        await anext(answer)
        drained = await stack.admin.DrainWorker(admin_pb2.DrainWorkerRequest(name="a"))
        assert drained.active_requests == 1
        for seed in range(6):
            best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=words(seed, 64)))
            assert best.worker_name == "b"
        assert len([message async for message in answer]) > 0
        await until(lambda: stack.load("a") == (0, 0, 0))
        workers, _ = await listed(stack)
        assert workers["a"].reason == "draining"
        await stack.admin.DrainWorker(admin_pb2.DrainWorkerRequest(name="a", undo=True))
        best = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=words(1, 64)))
        assert best.worker_name == "a"


async def test_a_worker_that_is_not_there_yet_is_taken_in_when_it_comes():
    async with MockWorker(FAST) as placeholder:
        await placeholder.kill()
        async with running("a", specs={"a": {"url": placeholder.url}}, wait=False) as stack:
            worker = stack.router.workers.named("a")
            await until(lambda: worker.state.value == "unhealthy")
            _, reply = await listed(stack)
            assert not reply.ready
            assert any("a is unhealthy" in finding for finding in reply.findings)
            await placeholder.restart()
            await in_service(stack.channel)
            assert (await listed(stack))[1].ready


async def test_a_worker_that_comes_back_as_something_else_is_started_over():
    async with running("a") as stack:
        await stack.on("a", words(1, 64))
        worker = stack.workers["a"]
        worker.config = replace(worker.config, loras=("adapter",))
        await worker.restart()
        await until(lambda: "adapter" in (stack.router.workers.named("a").spec.models or ()))
        await stack.ready("a")
        assert stack.router.index.blocks(stack.target("a")) == 0
        await stack.on("a", words(2, 64))
        messages = await stack.generate(words(2, 64), lora_name="adapter")
        assert messages[-1].usage.cached_tokens == messages[0].routing.expected_cached_tokens == 0


async def test_one_bad_worker_stops_a_rollout_but_not_a_running_service():
    async with running("a", router={"block_size": 16}) as stack, MockWorker(replace(FAST, block_size=32)) as odd:
        assert (await listed(stack))[1].ready
        await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec("odd", odd)))
        await until(lambda: stack.router.workers.named("odd").state.value == "misconfigured")
        _, reply = await listed(stack)
        assert reply.ready
        assert any("odd is misconfigured" in finding for finding in reply.findings)


async def test_a_configured_block_size_that_the_worker_contradicts_is_said():
    specs = {"a": {"block_size": 32}}
    async with running("a", specs=specs, wait=False) as stack:
        worker = stack.router.workers.named("a")
        await until(lambda: worker.state.value == "misconfigured")
        assert "correct or remove block-size" in worker.reason


async def test_min_initial_workers_holds_readiness_back():
    async with MockWorker(FAST) as late:
        await late.kill()
        specs = {"b": {"url": late.url}}
        async with running("a", "b", specs=specs, router={"min_initial_workers": 2}, wait=False) as stack:
            await stack.ready("a")
            _, reply = await listed(stack)
            assert not reply.ready
            assert "1 of at least 2 workers are ready" in reply.findings
            await late.restart()
            await in_service(stack.channel)
            assert (await listed(stack))[1].ready


async def test_loads_and_index_are_shown():
    async with running("a", "b") as stack:
        await stack.on("a", words(1, 64))
        request = router_pb2.BestWorkerIdRequest(token_ids=words(1, 80), request_id="r", reserve=True)
        assert (await stack.stub.BestWorkerId(request)).worker_name == "a"
        reply = await stack.admin.GetLoads(admin_pb2.GetLoadsRequest())
        loads = {load.worker_name: load for load in reply.loads}
        assert (loads["a"].active_requests, loads["a"].queued_prefill_tokens, loads["a"].active_blocks) == (1, 16, 5)
        assert (loads["a"].cached_blocks, loads["a"].total_blocks, loads["b"].active_requests) == (4, 512, 0)
        (index,) = reply.indexes
        assert (index.endpoint, index.block_size, index.blocks) == (ENDPOINT, 16, 4)
        assert index.bytes > 0
        await stack.stub.MarkPrefillComplete(router_pb2.MarkPrefillCompleteRequest(request_id="r"))
        assert stack.load("a") == (1, 0, 5)
        await stack.stub.Free(router_pb2.FreeRequest(request_id="r"))
        assert stack.load("a") == (0, 0, 0)


async def test_many_workers_come_and_go_and_nothing_is_left():
    async with running("a") as stack:
        before = {task.get_name() for task in asyncio.all_tasks()}
        config = MockWorkerConfig(block_size=16, num_blocks=64, speedup=0)
        async with MockWorker(config) as one, MockWorker(config) as two:
            for number in range(30):
                worker = (one, two)[number % 2]
                await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec(f"w{number}", worker)))
                if number >= 4:
                    await stack.admin.DeregisterWorker(admin_pb2.DeregisterWorkerRequest(name=f"w{number - 4}"))
            for number in range(26, 30):
                await stack.admin.DeregisterWorker(admin_pb2.DeregisterWorkerRequest(name=f"w{number}"))
            await until(
                lambda: not {name for task in asyncio.all_tasks() if "/w" in (name := task.get_name())},
                "no task is left",
            )
        assert len(stack.router.workers) == 1
        stats = stack.router.index.stats()
        assert (stats["slots"], stats["blocks"]) == (0, 0)
        await until(lambda: {task.get_name() for task in asyncio.all_tasks() if "worker" in task.get_name()} <= before)
