"""Routing hints and overrides of requests, and everything that is wrong with them."""

import pytest

from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.errors import InvalidRequestError
from kvrouter_grpc.server.hints import read_hints
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.types import Role, RouterOverride, RoutingHints

NAN, INF = float("nan"), float("inf")


def found(violations: Violations) -> dict[str, str]:
    try:
        violations.raise_if_any()
    except InvalidRequestError as error:
        return dict(error.violations)
    return {}


def hints_of(role=Role.BOTH, override=None, **routing):
    violations = Violations()
    request = router_pb2.GenerateRequest(routing=router_pb2.RoutingHints(**routing), router_config_override=override)
    return read_hints(request, lambda: role, violations), found(violations)


def test_no_hints_at_all():
    assert read_hints(router_pb2.BestWorkerIdRequest(), lambda: Role.BOTH, Violations()) == RoutingHints()


def test_all_hints():
    hints, wrong = hints_of(
        worker_id=7,
        dp_rank=1,
        allowed_worker_ids=[7, 8],
        required_taints=["gpu"],
        preferred_taints={"fast": -0.5},
        expected_output_tokens=20,
        strict_priority=3,
        priority_jump_s=1.5,
    )
    assert not wrong
    assert hints == RoutingHints(7, 1, frozenset({7, 8}), frozenset({"gpu"}), {"fast": -0.5}, 20, 3, 1.5, None)


@pytest.mark.parametrize(
    ("role", "routing", "pin"),
    [
        (Role.BOTH, {"worker_id": 1, "dp_rank": 2}, (1, 2)),
        (Role.DECODE, {"decode_worker_id": 3, "dp_rank": 1}, (3, 1)),
        (Role.BOTH, {"decode_worker_id": 3}, (3, None)),
        (Role.BOTH, {"worker_id": 3, "decode_worker_id": 3}, (3, None)),
        (Role.BOTH, {"prefill_worker_id": 4, "prefill_dp_rank": 1}, (None, None)),
        (Role.PREFILL, {"prefill_worker_id": 4, "prefill_dp_rank": 1}, (4, 1)),
        (Role.PREFILL, {"prefill_worker_id": 4, "dp_rank": 2}, (4, 2)),
        (Role.PREFILL, {"prefill_worker_id": 4, "worker_id": 5, "dp_rank": 2, "prefill_dp_rank": 0}, (4, 0)),
        (Role.PREFILL, {"worker_id": 5, "dp_rank": 2}, (5, 2)),
        (Role.PREFILL, {"decode_worker_id": 6, "dp_rank": 2}, (None, None)),
        (Role.BOTH, {"worker_id": 0}, (0, None)),
        (Role.BOTH, {"worker_id": 2**64 - 1}, (2**64 - 1, None)),
    ],
)
def test_the_pin_of_the_phase(role, routing, pin):
    hints, wrong = hints_of(role, **routing)
    assert not wrong
    assert (hints.worker_id, hints.dp_rank) == pin


@pytest.mark.parametrize(
    ("routing", "field", "text"),
    [
        ({"worker_id": 1, "decode_worker_id": 2}, "routing.decode_worker_id", "names 2 but worker_id names 1"),
        ({"dp_rank": 0}, "routing.dp_rank", "without a worker"),
        ({"prefill_dp_rank": 0}, "routing.prefill_dp_rank", "without a worker"),
        ({"prefill_dp_rank": 0, "decode_worker_id": 1}, "routing.prefill_dp_rank", "without a worker"),
        ({"priority_jump_s": -1}, "routing.priority_jump_s", "must be in [0, 86400], got -1"),
        ({"priority_jump_s": NAN}, "routing.priority_jump_s", "got nan"),
        ({"preferred_taints": {"a": INF}}, "routing.preferred_taints[a]", "got inf"),
        ({"preferred_taints": {"": 1}}, "routing.preferred_taints", "empty taint"),
        ({"required_taints": [""]}, "routing.required_taints", "empty taint"),
        ({"required_taints": ["x" * 257]}, "routing.required_taints", "at most 256"),
        ({"required_taints": ["x"] * 65}, "routing.required_taints", "has 65 entries"),
        ({"preferred_taints": {str(n): 1 for n in range(65)}}, "routing.preferred_taints", "has 65 entries"),
        ({"allowed_worker_ids": range(4097)}, "routing.allowed_worker_ids", "has 4097 entries"),
    ],
)
def test_bad_hints(routing, field, text):
    _, wrong = hints_of(**routing)
    assert text in wrong[field]
    assert len(wrong) == 1


def test_the_override():
    message = router_pb2.RouterConfigOverride(
        overlap_score_credit=0.5,
        prefill_load_scale=2,
        router_temperature=0,
        assume_kv_reuse=False,
        track_prefill_tokens=True,
        shared_cache_multiplier=1,
        cost="dynamo",
    )
    hints, wrong = hints_of(override=message)
    assert not wrong
    assert hints.override == RouterOverride(0.5, 2.0, 0.0, False, True, 1.0, "dynamo")


@pytest.mark.parametrize(("weight", "credit"), [(0.0, 0.0), (3.0, None)])
def test_the_deprecated_weight_scales_prefill_and_at_zero_the_credit(weight, credit):
    hints, wrong = hints_of(override=router_pb2.RouterConfigOverride(overlap_score_weight=weight))
    assert not wrong
    assert hints.override == RouterOverride(overlap_score_credit=credit, prefill_load_scale=weight)


def test_an_explicit_credit_beats_the_deprecated_weight():
    message = router_pb2.RouterConfigOverride(overlap_score_weight=0, overlap_score_credit=0.7)
    assert hints_of(override=message)[0].override == RouterOverride(0.7, 0.0)


@pytest.mark.parametrize(
    ("fields", "name", "text"),
    [
        ({"overlap_score_credit": -1}, "overlap_score_credit", "must be in [0, 1000000], got -1"),
        ({"prefill_load_scale": NAN}, "prefill_load_scale", "got nan"),
        ({"router_temperature": -0.1}, "router_temperature", "got -0.1"),
        ({"router_temperature": INF}, "router_temperature", "got inf"),
        ({"shared_cache_multiplier": 1.5}, "shared_cache_multiplier", "must be in [0, 1], got 1.5"),
        ({"overlap_score_weight": -1}, "overlap_score_weight", "got -1"),
        ({"overlap_score_weight": 1, "prefill_load_scale": 2}, "overlap_score_weight", "old name"),
        ({"cost": "cheapest"}, "cost", "known are default, dynamo"),
        ({"cost": ""}, "cost", "known are"),
    ],
)
def test_bad_overrides(fields, name, text):
    _, wrong = hints_of(override=router_pb2.RouterConfigOverride(**fields))
    assert text in wrong[f"router_config_override.{name}"]
    assert len(wrong) == 1


def test_an_unknown_override_is_refused():
    newer = bytes([0xF8, 0x06, 1])  # field number 111, a varint
    message = router_pb2.RouterConfigOverride.FromString(newer)
    _, wrong = hints_of(override=message)
    assert "unknown field number 111; known are overlap_score_credit" in wrong["router_config_override"]
