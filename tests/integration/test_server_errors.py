"""Every kind of bad request, over the wire: its status, its reason and the fields it names."""

import dataclasses

import grpc
import pytest
from grpc import StatusCode

from integration.server_rig import ENDPOINT, FAST, Refusal, Worker, collect, refusal, serving, until
from kvrouter_grpc._gen import admin_pb2, common_pb2, router_pb2

BAD = StatusCode.INVALID_ARGUMENT
GB = 1 << 30


def both(**fields):
    """The rpcs that take a prompt and hints."""
    return [router_pb2.BestWorkerIdRequest(**fields), router_pb2.GenerateRequest(**fields)]


def call(rig, request):
    rpc = {
        router_pb2.BestWorkerIdRequest: rig.stub.BestWorkerId,
        router_pb2.GetOverlapScoresRequest: rig.stub.GetOverlapScores,
        router_pb2.FreeRequest: rig.stub.Free,
        router_pb2.MarkPrefillCompleteRequest: rig.stub.MarkPrefillComplete,
        router_pb2.ReportOutputRequest: rig.stub.ReportOutput,
        admin_pb2.RegisterWorkerRequest: rig.admin.RegisterWorker,
        admin_pb2.RenewWorkerRequest: rig.admin.RenewWorker,
        admin_pb2.DeregisterWorkerRequest: rig.admin.DeregisterWorker,
        admin_pb2.DrainWorkerRequest: rig.admin.DrainWorker,
        admin_pb2.ListWorkersRequest: rig.admin.ListWorkers,
        admin_pb2.GetLoadsRequest: rig.admin.GetLoads,
    }.get(type(request))
    return collect(rig.stub.Generate(request)) if rpc is None else rpc(request)


async def refused(rig, request) -> Refusal:
    answer = await refusal(call(rig, request))
    assert answer.reason
    assert answer.metadata["request_id"]
    return answer


def hints(**fields):
    return {"token_ids": [1], "routing": router_pb2.RoutingHints(**fields)}


def override(**fields):
    return {"token_ids": [1], "router_config_override": router_pb2.RouterConfigOverride(**fields)}


def unknown_override():
    return {
        "token_ids": [1],
        "router_config_override": router_pb2.RouterConfigOverride.FromString(bytes([0xF8, 0x06, 1])),
    }


def reserve(**fields):
    return router_pb2.BestWorkerIdRequest(token_ids=[1], reserve=True, **fields)


def ttl(request, seconds):
    request.ttl.FromMilliseconds(round(seconds * 1000))
    return request


def generate(**fields):
    return router_pb2.GenerateRequest(token_ids=[1], **fields)


MM = common_pb2.BlockMultimodalHashes
INVALID = {
    "no prompt": ([*both(), router_pb2.GetOverlapScoresRequest()], ["token_ids"]),
    "over-long prompt": (both(token_ids=[1] * 101), ["token_ids"]),
    "id of 2^31": (both(token_ids=[0, 2**31]), ["token_ids[1]"]),
    "id beyond the vocabulary": (both(token_ids=[0, 0, 30_000]), ["token_ids[2]"]),
    "text and tokens": (both(token_ids=[1], text="x"), ["text"]),
    "text without a tokenizer": (both(text="x"), ["text"]),
    "block not in the prompt": (both(token_ids=[1] * 16, block_mm_hashes=[MM(block_index=1, mm_hashes=[1])]), ["block_mm_hashes[0].block_index"]),
    "contradictory pins": (both(**hints(worker_id=1, decode_worker_id=2)), ["routing.decode_worker_id"]),
    "rank without a pin": (both(**hints(dp_rank=0)), ["routing.dp_rank"]),
    "negative weight": (both(**override(overlap_score_credit=-1)), ["router_config_override.overlap_score_credit"]),
    "weight that is no number": (both(**override(prefill_load_scale=float("nan"))), ["router_config_override.prefill_load_scale"]),
    "negative temperature": (both(**override(router_temperature=-1)), ["router_config_override.router_temperature"]),
    "unknown cost": (both(**override(cost="best")), ["router_config_override.cost"]),
    "unknown override": (both(**unknown_override()), ["router_config_override"]),
    "request id with a line break": (both(token_ids=[1], request_id="a\nb"), ["request_id"]),
    "over-long request id": (both(token_ids=[1], request_id="x" * 257), ["request_id"]),
    "request id that is not ASCII": ([router_pb2.FreeRequest(request_id="ä")], ["request_id"]),
    "no request id": ([router_pb2.FreeRequest(), router_pb2.MarkPrefillCompleteRequest(), reserve()], ["request_id"]),
    "no output": ([router_pb2.ReportOutputRequest(request_id="r"), router_pb2.ReportOutputRequest(request_id="r", output_tokens=(1 << 20) + 1)], ["output_tokens"]),
    "endpoint of two parts": (both(token_ids=[1], endpoint="a.b"), ["endpoint"]),
    "endpoint of four parts": (both(token_ids=[1], endpoint="a.b.c.d"), ["endpoint"]),
    "endpoint with an empty part": ([admin_pb2.ListWorkersRequest(endpoint="a..c")], ["endpoint"]),
    "life too short": ([ttl(reserve(request_id="r"), 0.5)], ["ttl"]),
    "life too long": ([ttl(reserve(request_id="r"), 86_401)], ["ttl"]),
    "life without a reservation": ([ttl(router_pb2.BestWorkerIdRequest(token_ids=[1]), 5)], ["ttl"]),
    "sampling": ([generate(sampling_options=router_pb2.SamplingOptions(top_p=3, n=0))], ["sampling_options.n", "sampling_options.top_p"]),
    "JSON that is none": ([generate(kv_transfer_params_json="{") ], ["kv_transfer_params_json"]),
    "JSON that is no object": ([generate(kv_transfer_params_json="[]") ], ["kv_transfer_params_json"]),
    "JSON nested too deep": ([generate(extra_args_json='{"a":' + "[" * 9999 + "]" * 9999 + "}")], ["extra_args_json"]),
    "field of the router": ([generate(extra_args_json='{"stream": false}')], ["extra_args_json.stream"]),
    "worker without a url": ([admin_pb2.RegisterWorkerRequest()], ["spec.url"]),
    "worker with a wrong url": ([admin_pb2.RegisterWorkerRequest(spec=admin_pb2.WorkerSpec(url="x", name="a b"))], ["spec.name", "spec.url"]),
    "registration too short": ([ttl(admin_pb2.RegisterWorkerRequest(spec=admin_pb2.WorkerSpec(url="http://a:1")), 0)], ["ttl"]),
    "no name": ([admin_pb2.RenewWorkerRequest(), admin_pb2.DeregisterWorkerRequest(), admin_pb2.DrainWorkerRequest()], ["name"]),
    "everything at once": (
        [generate(text="x", cache_salt="x" * 1025, request_id=" ", sampling_options=router_pb2.SamplingOptions(n=0), routing=router_pb2.RoutingHints(dp_rank=1))],
        ["cache_salt", "request_id", "routing.dp_rank", "sampling_options.n", "text"],
    ),
}  # fmt: skip


async def test_invalid_requests_name_every_field():
    async with serving(Worker(), max_prompt_tokens=100, vocab_size=30_000) as rig:
        for name, (requests, fields) in INVALID.items():
            for request in requests:
                answer = await refused(rig, request)
                assert (answer.code, answer.reason) == (BAD, "INVALID_REQUEST"), name
                assert sorted(answer.fields) == fields, name
                assert all(answer.fields.values()), name
                assert answer.retry_s is None, name
        assert rig.in_flight() == 0


async def test_what_is_not_there():
    async with serving(Worker(dataclasses.replace(FAST, loras=("ad",)))) as rig:
        cases = [
            (both(token_ids=[1], endpoint="a.b.c"), "UNKNOWN_ENDPOINT", {"endpoint": "a.b.c"}),
            ([admin_pb2.ListWorkersRequest(endpoint="a.b.c")], "UNKNOWN_ENDPOINT", {"endpoint": "a.b.c"}),
            ([admin_pb2.GetLoadsRequest(endpoint="a.b.c")], "UNKNOWN_ENDPOINT", {"endpoint": "a.b.c"}),
            (both(**hints(worker_id=5)), "UNKNOWN_WORKER", {"worker_id": "5"}),
            (both(token_ids=[1], model="gpt"), "UNKNOWN_MODEL", {"model": "gpt"}),
            (both(token_ids=[1], lora_name="other"), "UNKNOWN_MODEL", {"model": "other"}),
            (
                [router_pb2.GetOverlapScoresRequest(token_ids=[1], lora_name="other")],
                "UNKNOWN_MODEL",
                {"model": "other"},
            ),
            ([router_pb2.FreeRequest(request_id="r")], "UNKNOWN_RESERVATION", {"request_id": "r"}),
            ([admin_pb2.RenewWorkerRequest(name="x")], "UNKNOWN_WORKER", {"worker": "x"}),
            ([admin_pb2.DeregisterWorkerRequest(name="x")], "UNKNOWN_WORKER", {"worker": "x"}),
            ([admin_pb2.DrainWorkerRequest(name="x")], "UNKNOWN_WORKER", {"worker": "x"}),
        ]
        for requests, reason, metadata in cases:
            for request in requests:
                answer = await refused(rig, request)
                assert (answer.code, answer.reason) == (StatusCode.NOT_FOUND, reason)
                assert metadata.items() <= answer.metadata.items()


async def test_pins_against_the_requests_own_rules():
    async with serving(Worker(dataclasses.replace(FAST, dp_size=2)), Worker()) as rig:
        w0, w1 = rig.target("w0").worker_id, rig.target("w1").worker_id
        for request in both(**hints(worker_id=w0, dp_rank=0, allowed_worker_ids=[w1])):
            answer = await refused(rig, request)
            assert (answer.code, answer.reason) == (StatusCode.FAILED_PRECONDITION, "PINNED_WORKER_NOT_ALLOWED")
        for pin in ({"worker_id": w0}, {"worker_id": w0, "dp_rank": 2}, {"worker_id": w1, "dp_rank": 1}):
            for request in both(**hints(**pin)):
                answer = await refused(rig, request)
                assert (answer.code, list(answer.fields)) == (BAD, ["routing.dp_rank"])


async def test_an_adapter_and_another_named_as_the_model():
    async with serving(Worker(dataclasses.replace(FAST, loras=("a", "b")))) as rig:
        for request in both(token_ids=[1], model="a", lora_name="b"):
            assert list((await refused(rig, request)).fields) == ["lora_name"]


async def test_an_endpoint_without_workers():
    async with serving() as rig:
        for request in both(token_ids=[1]):
            answer = await refused(rig, request)
            assert (answer.code, answer.reason, answer.retry_s) == (StatusCode.UNAVAILABLE, "NO_WORKERS", 1.0)
            assert answer.metadata["endpoint"] == ENDPOINT
        assert not rig.fleet.ready


async def test_all_workers_dead():
    async with serving(Worker()) as rig:
        await rig.engines["w0"].kill()
        await until(lambda: not rig.fleet.ready)
        for request in both(token_ids=[1]):
            answer = await refused(rig, request)
            assert (answer.code, answer.reason, answer.retry_s) == (StatusCode.UNAVAILABLE, "NO_WORKERS", 1.0)
        for request in both(**hints(worker_id=rig.target("w0").worker_id)):
            answer = await refused(rig, request)
            assert (answer.code, answer.reason) == (StatusCode.UNAVAILABLE, "PINNED_WORKER_UNAVAILABLE")


async def test_another_block_size_than_the_routers():
    async with serving(policy={"block_size": 32}) as rig, serving(Worker()) as other:
        url = other.engines["w0"].url
        await rig.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=admin_pb2.WorkerSpec(url=url)))
        await until(lambda: "--block-size 32" in " ".join(rig.fleet.findings()))
        listed = await rig.admin.ListWorkers(admin_pb2.ListWorkersRequest())
        assert not listed.ready
        assert listed.workers[0].state == common_pb2.WORKER_STATE_MISCONFIGURED
        assert "set --router-block-size 16" in listed.workers[0].reason
        answer = await refused(rig, router_pb2.BestWorkerIdRequest(token_ids=[1]))
        assert answer.reason == "NO_WORKERS"


async def test_overlap_before_the_block_size_is_known():
    async with serving(policy={"block_size": None}) as rig:
        answer = await refused(rig, router_pb2.GetOverlapScoresRequest(token_ids=[1]))
        assert (answer.code, answer.reason) == (StatusCode.UNAVAILABLE, "NOT_READY")


async def test_a_message_over_the_size_limit():
    limit = 1 << 20
    async with serving(Worker(), max_receive_message_bytes=limit, max_prompt_tokens=1000) as rig:
        for size, code in ((limit // 4 - 100, BAD), (limit // 4 + 1, StatusCode.RESOURCE_EXHAUSTED)):
            for request in both(token_ids=[7] * size):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(rig, request)
                assert caught.value.code() is code
        assert (await rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=[1]))).worker_name == "w0"


async def test_a_draining_router_refuses_new_requests():
    async with serving(Worker()) as rig:
        rig.server._router_service.drain()
        for request in both(token_ids=[1]):
            answer = await refused(rig, request)
            assert (answer.code, answer.reason, answer.retry_s) == (StatusCode.UNAVAILABLE, "DRAINING", 1.0)
