"""Lives of reservations and registrations."""

from google.protobuf.duration_pb2 import Duration

from kvrouter_grpc.server.violations import Bounds, Violations

BOUNDS = Bounds(1, 86_400)  # seconds


def read(field: str, message: Duration, violations: Violations) -> float:
    """Seconds of a duration between 1 s and 24 h."""
    seconds = message.seconds + message.nanos / 1e9
    if not BOUNDS.hold(seconds):
        violations.add(field, f"must be from 1 s to 24 h, got {seconds:g} s")
    return seconds


def write(message: Duration, seconds: float) -> None:
    """Set a duration to `seconds`, at least 0."""
    message.FromNanoseconds(max(0, round(seconds * 1e9)))
