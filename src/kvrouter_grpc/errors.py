"""What can go wrong, one class per reason, each saying whose fault it is.

The server turns these into gRPC status codes in one table (`server/status.py`); nothing else does. `message` is
written for the caller: it names the field and the fix and never carries the text of another exception.
"""

from collections.abc import Mapping


class RouterError(Exception):
    """Base of every error a caller may see.

    Attributes:
        message: One sentence for the caller.
        reason: Stable UPPER_SNAKE_CASE identifier (`google.rpc.ErrorInfo.reason`).
        metadata: Machine-readable facts (`google.rpc.ErrorInfo.metadata`).
        retry_after_s: Seconds after which a retry can help, or None when a retry alone cannot.
    """

    reason = "ROUTER_ERROR"
    retry_after_s: float | None = None

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class ConfigError(Exception):
    """The configuration is not usable; `faults` lists every fault found, one sentence each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


# --- the caller's fault ------------------------------------------------------------------------------------------


class InvalidRequestError(RouterError):
    """The request breaks the contract; `violations` is a list of (field path, what is wrong and the fix)."""

    reason = "INVALID_REQUEST"

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations))
        self.violations = violations


class EngineRejectedError(RouterError):
    """The engine read the request and refused it (HTTP 4xx, or an error of that kind inside its stream)."""

    reason = "ENGINE_REJECTED"


class UnknownEndpointError(RouterError):
    """The request names an endpoint that this router does not serve."""

    reason = "UNKNOWN_ENDPOINT"


class UnknownWorkerError(RouterError):
    """No worker has the id or name that was given."""

    reason = "UNKNOWN_WORKER"


class ConfiguredWorkerError(RouterError):
    """A worker of that name stands in the router's own configuration, which registrations do not change."""

    reason = "CONFIGURED_WORKER"


class UnknownModelError(RouterError):
    """No worker of the endpoint serves the model or LoRA adapter that was named."""

    reason = "UNKNOWN_MODEL"


class UnknownReservationError(RouterError):
    """No reservation is open under that request id: it was freed, it expired, or it never was."""

    reason = "UNKNOWN_RESERVATION"


class UnknownDecisionError(RouterError):
    """No decision under that request id is remembered: it is too long ago, there was none, or none are remembered."""

    reason = "UNKNOWN_DECISION"


class DuplicateRequestError(RouterError):
    """A reservation is already open under that request id."""

    reason = "DUPLICATE_REQUEST"


class PinnedWorkerNotAllowedError(RouterError):
    """The request pins a worker that its own constraints exclude."""

    reason = "PINNED_WORKER_NOT_ALLOWED"


class UnauthorizedError(RouterError):
    """The caller may not do this."""

    reason = "UNAUTHORIZED"


# --- the fleet's state -------------------------------------------------------------------------------------------


class NoWorkersError(RouterError):
    """The endpoint has no worker that could take the request now."""

    reason = "NO_WORKERS"
    retry_after_s = 1.0


class PinnedWorkerUnavailableError(RouterError):
    """The pinned worker exists but cannot take requests now; a pin is never rerouted."""

    reason = "PINNED_WORKER_UNAVAILABLE"
    retry_after_s = 1.0


class NotReadyError(RouterError):
    """The router (or the endpoint) is not ready, with the sentence that says what to change."""

    reason = "NOT_READY"
    retry_after_s = 1.0


class DrainingError(RouterError):
    """The router is shutting down and takes no new requests."""

    reason = "DRAINING"
    retry_after_s = 1.0


class OverloadedError(RouterError):
    """Every eligible worker, or the router itself, is over its limit."""

    reason = "OVERLOADED"
    retry_after_s = 1.0


class AllWorkersOverloadedError(OverloadedError):
    """Every worker that could take the request is above a threshold of the endpoint."""

    reason = "ALL_WORKERS_OVERLOADED"


class PinnedWorkerOverloadedError(OverloadedError):
    """The pinned worker is above a threshold of the endpoint; a pin is never rerouted."""

    reason = "PINNED_WORKER_OVERLOADED"


class WorkersBusyError(OverloadedError):
    """Every worker that could take the request is busy, and the request does not wait."""

    reason = "WORKERS_BUSY"


class QueueFullError(OverloadedError):
    """There is no room for the request in the endpoint's queue, or no longer."""

    reason = "QUEUE_FULL"


class QueueTimeoutError(OverloadedError):
    """The request waited in the endpoint's queue for as long as it may."""

    reason = "QUEUE_TIMEOUT"


# --- the engine's fault ------------------------------------------------------------------------------------------


class UpstreamError(RouterError):
    """The engine failed.

    Attributes:
        before_first_token: Whether another worker may still be tried.
        had_request: Whether the engine failed with the request in its hands, which may be why.
    """

    reason = "UPSTREAM_FAILED"
    before_first_token = False
    had_request = False


class UpstreamUnavailableError(UpstreamError):
    """The engine could not be reached or refused for lack of capacity, before it produced anything."""

    reason = "UPSTREAM_UNAVAILABLE"
    retry_after_s = 1.0
    before_first_token = True


class StreamInterruptedError(UpstreamError):
    """The engine failed after tokens had been delivered: only the caller can decide to start over."""

    reason = "STREAM_INTERRUPTED"


class UpstreamTimeoutError(UpstreamError):
    """The engine was silent for longer than allowed."""

    reason = "UPSTREAM_TIMEOUT"
