"""BestWorkerId, reservations and GetOverlapScores over real sockets."""

import dataclasses

import grpc
import pytest

from integration.server_rig import ENDPOINT, FAST, Worker, refusal, serving, taken_apart
from kvrouter_grpc._gen import admin_pb2, router_pb2

PROMPT = list(range(1000, 1040))


def best(prompt=PROMPT, **fields):
    return router_pb2.BestWorkerIdRequest(token_ids=prompt, **fields)


async def test_the_worker_that_holds_the_prefix_is_named():
    async with serving(Worker(), Worker(), Worker()) as rig:
        await rig.cache("w1", PROMPT)
        reply = await rig.stub.BestWorkerId(best([*PROMPT, *range(100)]))
        assert (reply.worker_id, reply.dp_rank) == rig.target("w1")
        assert (reply.worker_name, reply.url) == ("w1", rig.engines["w1"].url)
        assert (reply.overlap.device_blocks, reply.overlap_blocks, reply.expected_cached_tokens) == (2, 2, 32)
        assert (reply.prompt_tokens, reply.block_size, reply.freshness) == (140, 16, 1.0)
        assert reply.load == router_pb2.TargetLoad()
        assert not reply.candidates
        assert not reply.HasField("reservation_ttl")
        assert rig.in_flight() == 0


async def test_a_rank_is_named_too():
    async with serving(Worker(dataclasses.replace(FAST, dp_size=2))) as rig:
        replies = [
            await rig.stub.BestWorkerId(best([number] * 40, reserve=True, request_id=str(number)))
            for number in range(2)
        ]
        assert {reply.dp_rank for reply in replies} == {0, 1}


async def test_candidates_explain_the_decision():
    async with serving(Worker(), Worker(taints=frozenset({"old"}))) as rig:
        routing = router_pb2.RoutingHints(required_taints=["old"])
        reply = await rig.stub.BestWorkerId(best(include_candidates=True, routing=routing))
        chosen, dropped = reply.candidates
        assert (chosen.worker_name, dropped.worker_name) == ("w1", "w0")
        assert chosen.cost == reply.cost == pytest.approx(sum(term.value for term in chosen.terms))
        assert not chosen.dropped
        assert not dropped.HasField("cost")
        assert "required taint old" in dropped.dropped


async def test_a_reservation_from_booking_to_free():
    async with serving(Worker()) as rig:
        reply = await rig.stub.BestWorkerId(best(reserve=True, request_id="r1"))
        assert reply.load == router_pb2.TargetLoad(active_requests=1, queued_prefill_tokens=40, active_blocks=2)
        assert 299 < reply.reservation_ttl.ToTimedelta().total_seconds() <= 300
        twice = await refusal(rig.stub.BestWorkerId(best(reserve=True, request_id="r1")))
        assert twice.code is grpc.StatusCode.ALREADY_EXISTS

        for _ in range(2):  # idempotent
            await rig.stub.MarkPrefillComplete(router_pb2.MarkPrefillCompleteRequest(request_id="r1"))
            assert rig.router.load(rig.target("w0")).queued_prefill_tokens == 0
        await rig.stub.Free(router_pb2.FreeRequest(request_id="r1", endpoint=ENDPOINT))
        assert rig.in_flight() == 0
        for call in (
            rig.stub.Free(router_pb2.FreeRequest(request_id="r1")),
            rig.stub.MarkPrefillComplete(router_pb2.MarkPrefillCompleteRequest(request_id="r1")),
        ):
            gone = await refusal(call)
            assert (gone.code, gone.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_RESERVATION")
            assert gone.metadata["request_id"] == "r1"


async def test_a_reservation_lives_as_long_as_was_asked():
    async with serving(Worker()) as rig:
        request = best(reserve=True, request_id="r1")
        request.ttl.FromSeconds(20)
        reply = await rig.stub.BestWorkerId(request)
        assert 19 < reply.reservation_ttl.ToTimedelta().total_seconds() <= 20


async def test_reported_output_is_load():
    async with serving(Worker(), policy={"track_output_blocks": True}) as rig:
        await rig.stub.BestWorkerId(best(reserve=True, request_id="r1"))
        target = rig.target("w0")

        async def report(tokens):
            await rig.stub.ReportOutput(router_pb2.ReportOutputRequest(request_id="r1", output_tokens=tokens))
            return rig.router.load(target)

        # 40 tokens are two blocks and a half: eight more fill the third, which counts with the first of them.
        assert await report(1) == (1, 0, 2)  # the prompt is computed, or there would be no token
        assert await report(8) == (1, 0, 2)
        assert await report(9) == (1, 0, 3)
        assert await report(9) == (1, 0, 3)
        assert await report(60) == (1, 0, 6)
        assert await report(20) == (1, 0, 6)  # late, and of no use any more
        assert await report(73) == (1, 0, 7)
        await rig.stub.Free(router_pb2.FreeRequest(request_id="r1"))
        assert rig.router.load(target) == (0, 0, 0)
        gone = await refusal(rig.stub.ReportOutput(router_pb2.ReportOutputRequest(request_id="r1", output_tokens=1)))
        assert (gone.code, gone.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_RESERVATION")


async def test_reported_output_fades_towards_its_expected_end():
    async with serving(Worker(), policy={"track_output_blocks": True}) as rig:
        routing = router_pb2.RoutingHints(expected_output_tokens=64)
        await rig.stub.BestWorkerId(best(range(32), reserve=True, request_id="r1", routing=routing))
        loads = []
        for tokens in (16, 32, 48, 64):
            await rig.stub.ReportOutput(router_pb2.ReportOutputRequest(request_id="r1", output_tokens=tokens))
            loads.append(rig.router.load(rig.target("w0")).active_blocks)
        # Two blocks of the prompt and one more each time, of which each counts 3/4, 1/2, 1/4 and 0.
        assert loads == [2, 2, 1, 0]


async def test_reported_output_is_no_load_unless_that_is_tracked():
    async with serving(Worker()) as rig:
        await rig.stub.BestWorkerId(best(reserve=True, request_id="r1"))
        await rig.stub.ReportOutput(router_pb2.ReportOutputRequest(request_id="r1", output_tokens=500))
        assert rig.router.load(rig.target("w0")) == (1, 0, 2)


@pytest.mark.parametrize("way", ["one", "batch", "stream", "explained"])
async def test_a_prompt_that_is_computed_elsewhere_is_decided_for_decoding_alone(way):
    async with serving(Worker(), Worker(), policy={"request_weight": 0}) as rig:
        await rig.cache("w0", PROMPT)
        # A request on w0 whose blocks are others: decoding alone, w1 has more room, whatever is cached on w0.
        pin = router_pb2.RoutingHints(worker_id=rig.target("w0").worker_id)
        await rig.stub.BestWorkerId(best(range(16), reserve=True, request_id="load", routing=pin))
        request = best(include_candidates=True)
        for prefilled, worker, terms in ((False, "w0", 5), (True, "w1", 3)):
            request.prefilled = prefilled
            if way == "one":
                reply = await rig.stub.BestWorkerId(request)
            elif way == "batch":
                batch = router_pb2.BestWorkerIdBatchRequest(requests=[request])
                reply = (await rig.stub.BestWorkerIdBatch(batch)).results[0].response
            elif way == "stream":
                batches = iter([router_pb2.BestWorkerIdStreamRequest(requests=[request])])
                (replies,) = [each async for each in rig.stub.BestWorkerIdStream(batches)]
                reply = replies.results[0].response
            else:
                (reply,) = (await rig.admin.Explain(admin_pb2.ExplainRequest(request=request))).decisions
                assert reply.prefilled == prefilled
            assert (reply.worker_name, len(reply.candidates[0].terms)) == (worker, terms)


async def test_what_is_reserved_for_decoding_alone_waits_for_no_prompt():
    async with serving(Worker()) as rig:
        reply = await rig.stub.BestWorkerId(best(reserve=True, request_id="r1", prefilled=True))
        assert reply.load == router_pb2.TargetLoad(active_requests=1, active_blocks=2)
        await rig.stub.Free(router_pb2.FreeRequest(request_id="r1"))


async def test_an_override_changes_one_decision():
    async with serving(Worker(), Worker(), policy={"cost": "dynamo"}) as rig:
        await rig.cache("w0", PROMPT)
        for number in range(3):  # load enough to outweigh two blocks, unless those are worth a hundred each
            routing = router_pb2.RoutingHints(worker_id=rig.target("w0").worker_id)
            await rig.stub.BestWorkerId(best([number] * 64, reserve=True, request_id=f"load{number}", routing=routing))
        assert (await rig.stub.BestWorkerId(best())).worker_name == "w1"
        override = router_pb2.RouterConfigOverride(prefill_load_scale=0.0, cost="dynamo")
        reply = await rig.stub.BestWorkerId(best(router_config_override=override, include_candidates=True))
        assert all(term.value == 0 for row in reply.candidates for term in row.terms if term.name == "prefill")


async def test_overlap_scores_of_every_worker():
    async with serving(Worker(), Worker()) as rig:
        await rig.cache("w1", PROMPT)
        reply = await rig.stub.GetOverlapScores(router_pb2.GetOverlapScoresRequest(token_ids=[*PROMPT, *range(9)]))
        assert (reply.block_size, reply.num_blocks) == (16, 3)
        assert [entry.worker_id for entry in reply.workers] == sorted(entry.worker_id for entry in reply.workers)
        (holder,) = (entry for entry in reply.workers if entry.device_blocks)
        assert (holder.worker_name, holder.device_blocks, holder.disk_blocks) == ("w1", 2, 2)
        assert (holder.router_credit_blocks, holder.freshness) == (2.0, 1.0)
        salted = router_pb2.GetOverlapScoresRequest(token_ids=PROMPT, cache_salt="tenant")
        assert not any(entry.device_blocks for entry in (await rig.stub.GetOverlapScores(salted)).workers)


async def test_endpoints_are_kept_apart():
    other = "dynamo.other.generate"
    async with serving(Worker(), Worker(endpoint=other), endpoints=(ENDPOINT, other)) as rig:
        assert (await rig.stub.BestWorkerId(best(endpoint=ENDPOINT))).worker_name == "w0"
        assert (await rig.stub.BestWorkerId(best(endpoint=other))).worker_name == "w1"
        unnamed = await refusal(rig.stub.BestWorkerId(best()))
        assert unnamed.fields == {"endpoint": f"is empty; name one of {ENDPOINT}, {other}"}
        await rig.stub.BestWorkerId(best(endpoint=other, reserve=True, request_id="r"))
        elsewhere = await refusal(rig.stub.Free(router_pb2.FreeRequest(request_id="r", endpoint=ENDPOINT)))
        assert elsewhere.code is grpc.StatusCode.NOT_FOUND


PLAIN = [
    {"token_ids": PROMPT},
    {"token_ids": PROMPT, "model": "mock", "request_id": "r-1", "endpoint": ENDPOINT},
    {"token_ids": PROMPT, "model": "adapter"},
    {"token_ids": PROMPT, "model": "nobody's"},
    {"token_ids": PROMPT, "model": "m" * 300},
    {"token_ids": PROMPT, "request_id": "two words"},
    {"token_ids": PROMPT, "endpoint": "a.b.c"},
    {"token_ids": [1] * 101},
    {"token_ids": [1, 30_000]},
    {"token_ids": []},
    {},
]


async def test_a_plain_request_is_answered_as_one_with_more_fields():
    engine = dataclasses.replace(FAST, loras=("adapter",))
    async with serving(Worker(engine), max_prompt_tokens=100, vocab_size=30_000) as rig:
        await rig.cache("w0", PROMPT)
        for fields in PLAIN:
            outcomes = []
            for more in (b"", bytes([0xF8, 0x7F, 1])):  # nothing, and a field that no contract has
                request = router_pb2.BestWorkerIdRequest(**fields)
                request.MergeFromString(more)
                try:
                    outcomes.append(await rig.stub.BestWorkerId(request))
                except grpc.aio.AioRpcError as error:
                    refused = taken_apart(error)
                    outcomes.append((refused.code, refused.message, refused.reason, refused.fields))
            assert outcomes[0] == outcomes[1], fields
