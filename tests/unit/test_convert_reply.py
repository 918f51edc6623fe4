"""The router's own types into messages."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc._gen import admin_pb2, common_pb2, router_pb2
from kvrouter_grpc.core import answer_reply
from kvrouter_grpc.routing.overlap_scores import OverlapScores, TargetOverlap
from kvrouter_grpc.server import duration
from kvrouter_grpc.server.reply import AnswerWriter, candidate_message, overlap_scores_reply
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.server.worker_messages import read_spec, spec_message
from kvrouter_grpc.types import (
    Candidate,
    EngineChunk,
    Overlap,
    Role,
    Target,
    TokenLogprob,
    Usage,
    WorkerSpec,
)


def test_tiers_are_counted_cumulatively_and_alone():
    scores = OverlapScores(
        16,
        9,
        (
            TargetOverlap(Target(2, 0), "b", Overlap(1, 2, 3, 1), 2.5, 0.5),
            TargetOverlap(Target(1, 1), "a", Overlap(), 0.0, 1.0),
        ),
    )
    reply = overlap_scores_reply(scores)
    assert (reply.block_size, reply.num_blocks) == (16, 9)
    assert [(entry.worker_id, entry.dp_rank) for entry in reply.workers] == [(1, 1), (2, 0)]
    assert reply.workers[1] == router_pb2.OverlapScore(
        worker_id=2,
        worker_name="b",
        device_blocks=1,
        host_pinned_blocks=3,
        disk_blocks=6,
        host_pinned_extension_blocks=2,
        disk_extension_blocks=3,
        shared_beyond_device_blocks=1,
        router_credit_blocks=2.5,
        freshness=0.5,
    )


def test_a_candidate_that_was_dropped_has_no_cost():
    dropped = candidate_message(Candidate(Target(1, 0), "a", Overlap(), None, {}, "draining"))
    assert not dropped.HasField("cost")
    assert dropped.dropped == "draining"
    scored = candidate_message(Candidate(Target(1, 0), "a", Overlap(2), 0.0, {"queued_prefill": 0.0}))
    assert scored.HasField("cost")
    assert scored.terms == [common_pb2.CostTerm(name="queued_prefill", value=0.0)]


# --- answers ----------------------------------------------------------------------------------------------------


def test_one_chunk_is_one_message():
    (message,) = AnswerWriter().write([EngineChunk(0, [5, 6], "ab", usage=Usage(3, 2, 1))])
    assert message == router_pb2.GenerateResponse(
        token_ids=[5, 6], text="ab", usage=router_pb2.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    )


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("stop", router_pb2.FINISH_REASON_STOP),
        ("length", router_pb2.FINISH_REASON_LENGTH),
        ("abort", router_pb2.FINISH_REASON_CANCELLED),
        ("error", router_pb2.FINISH_REASON_ERROR),
        ("content_filter", router_pb2.FINISH_REASON_CONTENT_FILTER),
        ("repetition", router_pb2.FINISH_REASON_REPETITION),
        ("something newer", router_pb2.FINISH_REASON_ERROR),
        (None, router_pb2.FINISH_REASON_UNSPECIFIED),
    ],
)
def test_finish_reasons(reason, message):
    (written,) = AnswerWriter().write([EngineChunk(finish_reason=reason)])
    assert written.finish_reason == message


def test_every_finish_reason_of_the_contract_can_be_given():
    reasons = set(router_pb2.FinishReason.values()) - {router_pb2.FINISH_REASON_UNSPECIFIED}
    from kvrouter_grpc.server.reply import FINISH_REASONS

    assert set(FINISH_REASONS.values()) == reasons


@pytest.mark.parametrize(
    ("stop_reason", "kind", "value"),
    [("###", "stop_string", "###"), (0, "stop_token_id", 0), (7, "stop_token_id", 7), (None, None, None)],
)
def test_stop_reasons(stop_reason, kind, value):
    (message,) = AnswerWriter().write([EngineChunk(finish_reason="stop", stop_reason=stop_reason)])
    assert message.WhichOneof("stop_reason") == kind
    if kind:
        assert getattr(message, kind) == value


def test_chunks_that_arrive_together_are_one_message_per_answer():
    messages = AnswerWriter().write(
        [
            EngineChunk(0, [1], "a", usage=Usage(9, 1)),
            EngineChunk(1, [2], "b", usage=Usage(9, 2)),
            EngineChunk(0, [3], "c", "length", usage=Usage(9, 3)),
            EngineChunk(usage=Usage(9, 3, 8)),
        ]
    )
    assert messages == [
        router_pb2.GenerateResponse(
            index=0, token_ids=[1, 3], text="ac", finish_reason=router_pb2.FINISH_REASON_LENGTH
        ),
        router_pb2.GenerateResponse(
            index=1,
            token_ids=[2],
            text="b",
            usage=router_pb2.Usage(prompt_tokens=9, completion_tokens=3, cached_tokens=8),
        ),
    ]


def test_a_usage_that_arrives_alone_is_a_message_of_its_own():
    (message,) = AnswerWriter().write([EngineChunk(usage=Usage(9, 0))])
    assert message == router_pb2.GenerateResponse(usage=router_pb2.Usage(prompt_tokens=9))
    assert not message.usage.HasField("cached_tokens")


def test_nothing_arrived_is_no_message():
    assert AnswerWriter().write([]) == []


def test_log_probabilities_add_up_per_answer_over_the_whole_stream():
    writer = AnswerWriter()
    first = writer.write(
        [
            EngineChunk(0, [1], logprobs=[TokenLogprob(1, "a", -0.5)]),
            EngineChunk(1, [2], logprobs=[TokenLogprob(2, "b", -4.0)]),
            EngineChunk(0, [3], logprobs=[TokenLogprob(3, "c", -0.25, 2)]),
        ]
    )
    top = [[TokenLogprob(4, "d", -1.0, 1), TokenLogprob(None, "e", -2.0)]]
    second = writer.write([EngineChunk(0, [4], logprobs=[TokenLogprob(4, "d", -1.0)], top_logprobs=top)])
    assert [message.cum_log_prob for message in first] == [-0.75, -4.0]
    assert [entry.token_id for entry in first[0].log_probs] == [1, 3]
    assert first[0].log_probs[1].rank == 2
    assert second[0].cum_log_prob == -1.75
    (step,) = second[0].top_logprobs
    assert [(entry.token, entry.HasField("token_id"), entry.HasField("rank")) for entry in step.candidates] == [
        ("d", True, True),
        ("e", False, False),
    ]
    assert not writer.write([EngineChunk(0, [9])])[0].HasField("cum_log_prob")


def test_opaque_parts_are_json():
    chunk = EngineChunk(
        finish_reason="stop", kv_transfer_params={"remote_block_ids": [[1]]}, prompt_logprobs=[None, {"5": -1}]
    )
    (message,) = AnswerWriter().write([chunk])
    assert json.loads(message.kv_transfer_params_json) == {"remote_block_ids": [[1]]}
    assert json.loads(message.extra_args_json) == {"prompt_logprobs": [None, {"5": -1}]}


CHUNK = st.builds(
    EngineChunk,
    index=st.integers(0, 2),
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    text=st.text(max_size=3),
)


@given(st.lists(st.lists(CHUNK, max_size=6), max_size=6))
def test_merging_loses_and_reorders_nothing(steps):
    merged, single = {}, {}
    writer = AnswerWriter()
    for step in steps:
        messages = writer.write(step)
        assert len({message.index for message in messages}) == len(messages)
        for message in messages:
            tokens, text = merged.get(message.index, ([], ""))
            merged[message.index] = (tokens + list(message.token_ids), text + message.text)
        for chunk in step:
            tokens, text = single.get(chunk.index, ([], ""))
            single[chunk.index] = (tokens + list(chunk.token_ids), text + chunk.text)
    empty = ([], "")
    assert all(merged.get(index, empty) == single.get(index, empty) for index in range(3))


U32 = st.integers(0, 2**32 - 1)
USAGE = st.builds(Usage, U32, U32, st.none() | U32)


@given(
    st.builds(
        EngineChunk,
        index=st.integers(0, 16383),
        token_ids=st.lists(U32, max_size=40) | st.just(()),
        text=st.text(max_size=200),
        usage=st.none() | USAGE,
    )
)
def test_a_plain_chunk_is_the_message_that_protobuf_would_write(chunk):
    (message,) = AnswerWriter().write([chunk])
    written = answer_reply(chunk)
    assert router_pb2.GenerateResponse.FromString(written) == message
    assert written == message.SerializeToString()


@pytest.mark.parametrize(
    "more",
    [
        {"finish_reason": "stop"},
        {"stop_reason": 0},
        {"logprobs": [TokenLogprob(1, "a", -0.5)]},
        {"top_logprobs": [[]]},
        {"kv_transfer_params": {}},
        {"prompt_logprobs": []},
    ],
)
def test_a_chunk_with_more_is_left_to_protobuf(more):
    assert answer_reply(EngineChunk(0, [1], "a", **more)) is None


# --- workers ----------------------------------------------------------------------------------------------------


def test_a_worker_survives_the_way_there_and_back():
    spec = WorkerSpec(
        name="pod-1",
        url="http://10.0.0.1:8000",
        endpoint="a.b.c",
        models=("base", "lora"),
        events="tcp://10.0.0.1:5557",
        replay="tcp://10.0.0.1:5562",
        kv_events=False,
        topic="kv",
        dp_size=2,
        block_size=16,
        role=Role.PREFILL,
        taints=frozenset({"x", "y"}),
        total_kv_blocks=100,
        max_num_batched_tokens=8192,
    )
    violations = Violations()
    assert read_spec(spec_message(spec), "other.one.here", violations) == spec
    assert not violations


def test_what_a_worker_does_not_say_is_left_open():
    violations = Violations()
    spec = read_spec(admin_pb2.WorkerSpec(url="http://10.0.0.1:8000/"), "a.b.c", violations)
    assert spec == WorkerSpec("10.0.0.1:8000", "http://10.0.0.1:8000", "a.b.c")
    assert read_spec(spec_message(spec), "a.b.c", violations) == spec


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"url": ""}, "spec.url"),
        ({"url": "ftp://x"}, "spec.url"),
        ({"url": "http://x/v1"}, "spec.url"),
        ({"name": "a b"}, "spec.name"),
        ({"endpoint": "a.b"}, "spec.endpoint"),
        ({"events": "tcp://*:5557"}, "spec.events"),
        ({"replay": "http://a:1"}, "spec.replay"),
        ({"models": ["ok", ""]}, "spec.models"),
        ({"taints": ["\n"]}, "spec.taints"),
        ({"dp_size": 0}, "spec.dp_size"),
        ({"block_size": 0}, "spec.block_size"),
        ({"total_kv_blocks": 0}, "spec.total_kv_blocks"),
        ({"max_num_batched_tokens": 0}, "spec.max_num_batched_tokens"),
        ({"role": 9}, "spec.role"),
        ({"topic": "x" * 257}, "spec.topic"),
    ],
)
def test_bad_workers(fields, field):
    violations = Violations()
    message = admin_pb2.WorkerSpec(**({"url": "http://a:1"} | fields))
    assert read_spec(message, "a.b.c", violations) is None
    assert [name for name, _ in violations._found] == [field]


# --- durations --------------------------------------------------------------------------------------------------


@given(st.integers(-(2**40), 2**40), st.integers(-(10**9), 10**9))
def test_lives_are_between_a_second_and_a_day(seconds, nanos):
    violations = Violations()
    message = duration.Duration(seconds=seconds, nanos=nanos)
    read = duration.read("ttl", message, violations)
    assert bool(violations) == (not 1 <= read <= 86_400)


def test_a_life_that_is_over_is_zero():
    message = duration.Duration()
    duration.write(message, -0.5)
    assert message == duration.Duration()
    duration.write(message, 1.25)
    assert message == duration.Duration(seconds=1, nanos=250_000_000)
