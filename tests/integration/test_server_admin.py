"""KvRouterAdmin over real sockets."""

import dataclasses
import os

import grpc
import pytest

from integration.server_rig import BLOCK, ENDPOINT, FAST, Worker, refusal, serving, settled, until
from kvrouter_grpc._gen import admin_pb2, common_pb2, router_pb2
from kvrouter_grpc.mock_worker import MockWorker

PROMPT = list(range(1000, 1040))


def register(url, ttl_s=None, **spec):
    request = admin_pb2.RegisterWorkerRequest(spec=admin_pb2.WorkerSpec(url=url, **spec))
    if ttl_s is not None:
        request.ttl.FromSeconds(ttl_s)
    return request


async def test_workers_are_listed_with_what_they_said_of_themselves():
    engine = dataclasses.replace(FAST, loras=("ad",), dp_size=2, num_blocks=100)
    async with serving(Worker(engine, taints=frozenset({"t"})), Worker()) as rig:
        await rig.cache("w1", PROMPT)
        reply = await rig.admin.ListWorkers(admin_pb2.ListWorkersRequest())
        assert reply.ready
        assert not reply.findings
        first, second = reply.workers
        assert (first.worker_id, first.state) == (rig.target("w0").worker_id, common_pb2.WORKER_STATE_READY)
        assert (first.spec.name, first.spec.url, first.spec.endpoint) == ("w0", rig.engines["w0"].url, ENDPOINT)
        assert (list(first.spec.models), list(first.loras)) == (["mock", "ad"], ["ad"])
        assert (first.spec.dp_size, first.spec.block_size, list(first.spec.taints)) == (2, BLOCK, ["t"])
        assert first.spec.role == common_pb2.WORKER_ROLE_BOTH
        assert first.engine_version == "0.32.0"
        assert first.max_model_len > 0
        assert not first.HasField("registration_ttl")
        assert [stream.dp_rank for stream in first.streams] == [0, 1]
        (stream,) = second.streams
        assert (stream.state, stream.freshness) == (common_pb2.STREAM_STATE_LIVE, 1.0)
        assert (stream.blocks, stream.batches, stream.last_seq) == (2, 1, 0)
        assert 0 <= stream.last_event_age.ToTimedelta().total_seconds() < 10


async def test_loads_and_what_the_index_costs():
    async with serving(Worker(), Worker()) as rig:
        await rig.cache("w1", PROMPT)
        pin = router_pb2.RoutingHints(worker_id=rig.target("w0").worker_id)
        request = router_pb2.BestWorkerIdRequest(token_ids=PROMPT, reserve=True, request_id="r", routing=pin)
        await rig.stub.BestWorkerId(request)
        for endpoint in ("", ENDPOINT):
            reply = await rig.admin.GetLoads(admin_pb2.GetLoadsRequest(endpoint=endpoint))
            busy, idle = reply.loads
            assert (busy.worker_name, busy.worker_id, busy.dp_rank) == ("w0", *rig.target("w0"))
            assert (busy.active_requests, busy.queued_prefill_tokens, busy.active_blocks) == (1, 40, 2)
            assert (idle.active_requests, idle.cached_blocks, idle.endpoint) == (0, 2, ENDPOINT)
            assert idle.total_blocks > 0
            (index,) = reply.indexes
            assert (index.endpoint, index.block_size, index.blocks) == (ENDPOINT, BLOCK, 2)
            assert index.edges >= 1
            assert index.bytes > 0


async def test_a_registration_from_first_to_last():
    async with serving() as rig, MockWorker(FAST) as engine:
        reply = await rig.admin.RegisterWorker(register(engine.url, 60, name="late"))
        await until(lambda: all(settled(view) for view in rig.fleet.workers()))
        assert reply.worker_id == rig.target("late").worker_id
        (listed,) = (await rig.admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert 50 < listed.registration_ttl.ToTimedelta().total_seconds() <= 60
        best = await rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT))
        assert best.worker_id == reply.worker_id

        renewed = await rig.admin.RenewWorker(admin_pb2.RenewWorkerRequest(name="late"))
        assert renewed.ttl.ToTimedelta().total_seconds() == 60
        await rig.admin.DeregisterWorker(admin_pb2.DeregisterWorkerRequest(name="late"))
        assert not rig.fleet.workers()
        gone = await refusal(rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT)))
        assert gone.reason == "NO_WORKERS"
        unknown = await refusal(rig.admin.RenewWorker(admin_pb2.RenewWorkerRequest(name="late")))
        assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_WORKER")


async def test_a_registration_that_is_not_renewed_goes():
    async with serving() as rig, MockWorker(FAST) as engine:
        await rig.admin.RegisterWorker(register(engine.url, 1))
        assert len(rig.fleet.workers()) == 1
        await until(lambda: not rig.fleet.workers(), 5.0)


async def test_a_configured_worker_is_not_replaced():
    async with serving(Worker()) as rig:
        refused = await refusal(rig.admin.RegisterWorker(register("http://127.0.0.1:9", name="w0")))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "CONFIGURED_WORKER")


async def test_a_registration_without_a_ttl_needs_no_renewal():
    async with serving() as rig, MockWorker(FAST) as engine:
        await rig.admin.RegisterWorker(register(engine.url, name="stays"))
        (listed,) = (await rig.admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert not listed.HasField("registration_ttl")
        refused = await refusal(rig.admin.RenewWorker(admin_pb2.RenewWorkerRequest(name="stays")))
        assert list(refused.fields) == ["name"]


async def test_a_drained_worker_gets_nothing_new_until_it_is_taken_back():
    async with serving(Worker(), Worker()) as rig:
        pin = router_pb2.RoutingHints(worker_id=rig.target("w0").worker_id)
        await rig.stub.BestWorkerId(
            router_pb2.BestWorkerIdRequest(token_ids=PROMPT, reserve=True, request_id="r", routing=pin)
        )
        reply = await rig.admin.DrainWorker(admin_pb2.DrainWorkerRequest(name="w0"))
        assert reply.active_requests == 1
        fresh = [
            await rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=[number] * 20)) for number in range(10)
        ]
        assert {best.worker_name for best in fresh} == {"w1"}
        (listed, _) = (await rig.admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers
        assert listed.state == common_pb2.WORKER_STATE_DRAINING
        await rig.stub.Free(router_pb2.FreeRequest(request_id="r"))
        reply = await rig.admin.DrainWorker(admin_pb2.DrainWorkerRequest(name="w0", undo=True))
        assert reply.active_requests == 0
        best = await rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=[5] * 20, routing=pin))
        assert best.worker_name == "w0"


@pytest.mark.parametrize("field", ["name", "url", "events", "models"])
async def test_a_hostile_registration_cannot_reach_the_log_or_a_socket(field):
    hostile = "a\x1b[31m\nb" + os.sep
    async with serving() as rig:
        request = register("http://127.0.0.1:9")
        value = [hostile] if field == "models" else hostile
        request.spec.MergeFrom(admin_pb2.WorkerSpec(**{field: value}))
        refused = await refusal(rig.admin.RegisterWorker(request))
        assert list(refused.fields) == [f"spec.{field}"]
        assert "\x1b" not in refused.message
        assert not rig.fleet.workers()
