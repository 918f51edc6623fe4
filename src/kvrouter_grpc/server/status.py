"""The one table from what can go wrong to a gRPC status, and the details sent with it.

Details are a `google.rpc.Status` in the trailing metadata `grpc-status-details-bin`, as in
https://google.aip.dev/193: always an `ErrorInfo`, a `BadRequest` that names each field, a `RetryInfo` where a
retry helps.
"""

from collections.abc import Mapping
from typing import NamedTuple

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from kvrouter_grpc import errors
from kvrouter_grpc.errors import EngineRejectedError, InvalidRequestError, RouterError

DOMAIN = "kvrouter.dev"
DETAILS_KEY = "grpc-status-details-bin"

CODES: Mapping[type[RouterError], grpc.StatusCode] = {
    RouterError: grpc.StatusCode.INTERNAL,  # no class of its own: a defect of the router
    # The caller's fault.
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.EngineRejectedError: grpc.StatusCode.INVALID_ARGUMENT,  # or NOT_FOUND, see `code_of`
    errors.UnknownEndpointError: grpc.StatusCode.NOT_FOUND,
    errors.UnknownWorkerError: grpc.StatusCode.NOT_FOUND,
    errors.UnknownModelError: grpc.StatusCode.NOT_FOUND,
    errors.UnknownReservationError: grpc.StatusCode.NOT_FOUND,
    errors.UnknownDecisionError: grpc.StatusCode.NOT_FOUND,
    errors.ConfiguredWorkerError: grpc.StatusCode.ALREADY_EXISTS,
    errors.DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    errors.PinnedWorkerNotAllowedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnauthorizedError: grpc.StatusCode.PERMISSION_DENIED,
    # The fleet's state.
    errors.NoWorkersError: grpc.StatusCode.UNAVAILABLE,
    errors.PinnedWorkerUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.NotReadyError: grpc.StatusCode.UNAVAILABLE,
    errors.DrainingError: grpc.StatusCode.UNAVAILABLE,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AllWorkersOverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.PinnedWorkerOverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.WorkersBusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QueueTimeoutError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # The engine's fault.
    errors.UpstreamError: grpc.StatusCode.UNAVAILABLE,
    errors.UpstreamUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.StreamInterruptedError: grpc.StatusCode.ABORTED,
    errors.UpstreamTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
}

# Clients drop metadata beyond 8 KiB (gRPC's default), and with it the status; these bounds, in bytes of
# UTF-8, keep the message (percent-encoded on the wire) and the details (base64) below that together.
_MAX_MESSAGE = 512
_MAX_METADATA = 8
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 160
_MAX_FIELD = 96
_MAX_DESCRIPTION = 256
_MAX_VIOLATIONS = 1600  # over all violations; how many were left out is said


class Status(NamedTuple):
    """What a failed call ends with."""

    code: grpc.StatusCode
    message: str
    details: bytes  # serialized google.rpc.Status


def status_of(error: RouterError, request_id: str) -> Status:
    """The status of an error that the caller may see in full."""
    details: list[Message] = [_error_info(error.reason, error.metadata, request_id)]
    if isinstance(error, InvalidRequestError):
        details.append(_bad_request(error.violations))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(retry)
    return _status(code_of(error), error.message, details)


def defect(request_id: str) -> Status:
    """The status of an exception that nobody expected: its text is in the log, found by the request id."""
    message = "internal error of the router; its log has the details under the request id"
    return _status(grpc.StatusCode.INTERNAL, message, [_error_info("INTERNAL", {}, request_id)])


def code_of(error: RouterError) -> grpc.StatusCode:
    """Look an error up in the table; a subclass without a row of its own has its parent's."""
    if isinstance(error, EngineRejectedError) and error.metadata.get("http_status") == "404":
        return grpc.StatusCode.NOT_FOUND
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> Status:
    message = _clip(message, _MAX_MESSAGE)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return Status(code, message, status.SerializeToString())


def _error_info(reason: str, metadata: Mapping[str, str], request_id: str) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    for key, value in list(metadata.items())[:_MAX_METADATA]:
        info.metadata[_clip(key, _MAX_METADATA_KEY)] = _clip(value, _MAX_METADATA_VALUE)
    info.metadata["request_id"] = request_id
    return info


def _bad_request(violations: list[tuple[str, str]]) -> error_details_pb2.BadRequest:
    bad_request = error_details_pb2.BadRequest()
    size = 0
    for index, (field, description) in enumerate(violations):
        field, description = _clip(field, _MAX_FIELD), _clip(description, _MAX_DESCRIPTION)  # noqa: PLW2901
        size += len(field.encode()) + len(description.encode())
        if size > _MAX_VIOLATIONS:
            bad_request.field_violations.add(description=f"and {len(violations) - index} more")
            break
        bad_request.field_violations.add(field=field, description=description)
    return bad_request


def _clip(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, cut between characters."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode(errors="ignore") + "…"
