"""Messages about overload: the thresholds of endpoints and what waits in their queues."""

from kvrouter_grpc._gen import admin_pb2
from kvrouter_grpc.routing.gate import Thresholds
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server import duration
from kvrouter_grpc.server.violations import Bounds, Violations

_MOST_TOKENS = 1 << 40
_BOUNDS = {
    "active_decode_blocks": Bounds(0, 1),
    "active_prefill_tokens": Bounds(0, _MOST_TOKENS),
    "active_prefill_tokens_frac": Bounds(0, 1_000_000),
}


def read_thresholds(message: admin_pb2.Thresholds, violations: Violations) -> Thresholds:
    """Thresholds as they are set; a field that is absent is no limit."""
    given = {field.name: value for field, value in message.ListFields()}
    for name, value in given.items():
        violations.check_number(f"thresholds.{name}", value, _BOUNDS[name])
    return Thresholds(**given)


def thresholds_message(router: Router) -> admin_pb2.EndpointThresholds:
    """The thresholds of an endpoint."""
    now = router.gate.thresholds
    return admin_pb2.EndpointThresholds(
        endpoint=router.endpoint,
        thresholds=admin_pb2.Thresholds(
            active_decode_blocks=now.active_decode_blocks,
            active_prefill_tokens=now.active_prefill_tokens,
            active_prefill_tokens_frac=now.active_prefill_tokens_frac,
        ),
    )


def queue_status(router: Router) -> admin_pb2.QueueStatus | None:
    """The queue of an endpoint, if it has one."""
    admission = router.admission
    if admission is None:
        return None
    outcomes = admission.outcomes
    status = admin_pb2.QueueStatus(
        endpoint=router.endpoint,
        admitted=outcomes["admitted"],
        refused=outcomes["refused"],
        timed_out=outcomes["timed_out"],
        gone=outcomes["gone"],
    )
    now = router.loads.clock()
    for each in admission.queue.classes():
        message = status.classes.add(
            strict_priority=each.strict_priority, waiting=each.waiting, waiting_tokens=each.tokens
        )
        duration.write(message.longest_wait, now - each.oldest_at)
    duration.write(status.estimated_wait, admission.estimated_wait_s if status.classes else 0)
    return status
