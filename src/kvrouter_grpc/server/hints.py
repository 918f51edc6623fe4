"""Reads what a request asks of the decision: pins, filters, priorities and changes of the policy."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from google.protobuf.unknown_fields import UnknownFieldSet

from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.routing.cost import COSTS
from kvrouter_grpc.server.violations import Bounds, Violations
from kvrouter_grpc.types import Role, RouterOverride, RoutingHints

MAX_WORKERS = 4096
MAX_TAINTS = 64
MAX_TAINT = 256
MAX_PRIORITY_JUMP_S = 86_400.0
MAX_SESSION = 256
MAX_TENANT = 256

_NOT_NEGATIVE = Bounds(0, 1_000_000)  # the upper end keeps every cost finite
_EITHER_SIGN = Bounds(-1_000_000, 1_000_000)
_OVERRIDE_BOUNDS: Mapping[str, Bounds] = {
    "overlap_score_credit": _NOT_NEGATIVE,
    "prefill_load_scale": _NOT_NEGATIVE,
    "router_temperature": _NOT_NEGATIVE,
    "shared_cache_multiplier": Bounds(0, 1),
    "overlap_score_weight": _NOT_NEGATIVE,
}

NO_HINTS = RoutingHints()
"""Of a request that has none."""


def read_hints(
    request: router_pb2.GenerateRequest | router_pb2.BestWorkerIdRequest,
    role: Callable[[], Role],
    violations: Violations,
    session_id: str = "",
    tenant: str | None = None,
) -> RoutingHints:
    """Read and check the routing hints and the override of a request.

    Args:
        request: The request.
        role: What the endpoint's workers are for: the phase the request is in, and so which pin counts. Asked only
            when there are hints.
        violations: Takes what is wrong.
        session_id: The session of a request that does not name one.
        tenant: On whose account it waits, whatever it says; None lets it say so.
    """
    override = read_override(request, violations)
    if not request.HasField("routing"):
        if not (override or session_id or tenant):
            return NO_HINTS
        return RoutingHints(override=override, session_id=session_id, tenant=tenant or "")
    routing = request.routing
    phase = role()
    worker_id, dp_rank = _read_pin(routing, phase, violations)
    leg = routing.HasField("prefill_worker_id") and phase is not Role.PREFILL
    allowed = None
    if routing.allowed_worker_ids and violations.check_count(
        "routing.allowed_worker_ids", routing.allowed_worker_ids, MAX_WORKERS
    ):
        allowed = frozenset(routing.allowed_worker_ids)
    return RoutingHints(
        worker_id=worker_id,
        dp_rank=dp_rank,
        allowed_worker_ids=allowed,
        required_taints=_read_taints("routing.required_taints", routing.required_taints, violations),
        preferred_taints=_read_preferences(routing, violations),
        expected_output_tokens=(routing.expected_output_tokens if routing.HasField("expected_output_tokens") else None),
        strict_priority=routing.strict_priority,
        priority_jump_s=_read_priority_jump(routing.priority_jump_s, violations),
        tenant=_read_tenant("routing.tenant", routing.tenant, violations) if tenant is None else tenant,
        may_wait=not routing.do_not_queue,
        session_id=_read_session("routing.session_id", routing.session_id, violations) or session_id,
        override=override,
        prefill_worker_id=routing.prefill_worker_id if leg else None,
        prefill_dp_rank=routing.prefill_dp_rank if leg and routing.HasField("prefill_dp_rank") else None,
    )


def read_override(
    request: (router_pb2.GenerateRequest | router_pb2.BestWorkerIdRequest | router_pb2.GetOverlapScoresRequest),
    violations: Violations,
) -> RouterOverride | None:
    """Read and check the change of the policy for one request."""
    if not request.HasField("router_config_override"):
        return None
    message = request.router_config_override
    path = "router_config_override"
    # Elsewhere a field of a newer contract may be passed over; here that would decide by another policy.
    unknown = UnknownFieldSet(message)
    if len(unknown):
        known = ", ".join(field.name for field in message.DESCRIPTOR.fields)
        violations.add(path, f"has the unknown field number {unknown[0].field_number}; known are {known}")
    given = {field.name: value for field, value in message.ListFields()}
    for name, bounds in _OVERRIDE_BOUNDS.items():
        if name in given:
            violations.check_number(f"{path}.{name}", given[name], bounds)
    if given.get("cost", "default") not in COSTS:
        violations.add(f"{path}.cost", f"is not a known cost; known are {', '.join(COSTS)}")
    old_weight = given.get("overlap_score_weight")
    if old_weight is not None:
        if "prefill_load_scale" in given:
            violations.add(
                f"{path}.overlap_score_weight", "is the old name of prefill_load_scale; give only the latter"
            )
        given["prefill_load_scale"] = old_weight
        if old_weight == 0:
            given.setdefault("overlap_score_credit", 0.0)
    return RouterOverride(
        overlap_score_credit=given.get("overlap_score_credit"),
        prefill_load_scale=given.get("prefill_load_scale"),
        temperature=given.get("router_temperature"),
        assume_kv_reuse=given.get("assume_kv_reuse"),
        track_prefill_tokens=given.get("track_prefill_tokens"),
        shared_cache_multiplier=given.get("shared_cache_multiplier"),
        cost=given.get("cost"),
    )


def session_in(metadata: Iterable[tuple[str, str | bytes]], key: str, violations: Violations) -> str:
    """The session that the metadata of a call names under a key, "" when it names none."""
    return _read_session(f"metadata {key}", _first(metadata, key), violations)


def tenant_in(metadata: Iterable[tuple[str, str | bytes]], key: str, violations: Violations) -> str:
    """The tenant that the metadata of a call names under a key, "" when it names none."""
    return _read_tenant(f"metadata {key}", _first(metadata, key), violations)


def _first(metadata: Iterable[tuple[str, str | bytes]], key: str) -> str:
    return next((value for name, value in metadata if name == key and isinstance(value, str)), "")


def _read_session(field: str, session_id: str, violations: Violations) -> str:
    if session_id:
        violations.check_text(field, session_id, MAX_SESSION)
    return session_id


def _read_tenant(field: str, tenant: str, violations: Violations) -> str:
    if tenant:
        violations.check_text(field, tenant, MAX_TENANT)
    return tenant


def _read_pin(routing: router_pb2.RoutingHints, role: Role, violations: Violations) -> tuple[int | None, int | None]:
    """The pinned worker and rank of the phase that the endpoint serves."""
    given = {field.name: value for field, value in routing.ListFields()}
    worker_id = given.get("worker_id")
    decode_id = given.get("decode_worker_id")
    prefill_id = given.get("prefill_worker_id")
    if worker_id is not None and decode_id is not None and worker_id != decode_id:
        violations.add(
            "routing.decode_worker_id",
            f"names {decode_id} but worker_id names {worker_id}; give one of them, or the same in both",
        )
    if "dp_rank" in given and worker_id is None and decode_id is None and prefill_id is None:
        violations.add("routing.dp_rank", "is given without a worker; pin one with worker_id")
    if "prefill_dp_rank" in given and worker_id is None and prefill_id is None:
        violations.add("routing.prefill_dp_rank", "is given without a worker; pin one with prefill_worker_id")
    rank = given.get("dp_rank")
    if role is Role.PREFILL:
        pin = worker_id if prefill_id is None else prefill_id
        rank = given.get("prefill_dp_rank", rank)
    else:
        pin = worker_id if decode_id is None else decode_id
    return pin, None if pin is None else rank


def _read_taints(field: str, taints: Sequence[str], violations: Violations) -> frozenset[str]:
    if not violations.check_count(field, taints, MAX_TAINTS):
        return frozenset()
    for taint in taints:
        _check_taint(field, taint, violations)
    return frozenset(taints)


def _read_preferences(routing: router_pb2.RoutingHints, violations: Violations) -> Mapping[str, float]:
    preferences = routing.preferred_taints
    field = "routing.preferred_taints"
    if not violations.check_count(field, preferences, MAX_TAINTS):
        return {}
    for taint, weight in preferences.items():
        if _check_taint(field, taint, violations):
            violations.check_number(f"{field}[{taint}]", weight, _EITHER_SIGN)
    return dict(preferences)


def _check_taint(field: str, taint: str, violations: Violations) -> bool:
    if not taint:
        violations.add(field, "has an empty taint")
        return False
    return violations.check_text(field, taint, MAX_TAINT)


def _read_priority_jump(seconds: float, violations: Violations) -> float:
    violations.check_number("routing.priority_jump_s", seconds, Bounds(0, MAX_PRIORITY_JUMP_S))
    return seconds
