"""The one error a call ends with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from ._gen import router_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class Violation(NamedTuple):
    """One field of a request that breaks the contract."""

    field: str  # path, e.g. "sampling_options.top_p"
    description: str  # what is wrong and how to put it right


class KvRouterError(Exception):
    """A call failed.

    Attributes:
        code: The gRPC status code.
        message: A sentence for people.
        reason: A stable UPPER_SNAKE_CASE identifier for programs (`google.rpc.ErrorInfo.reason`); empty when
            the failure did not come from the router itself, e.g. when it could not be reached.
        metadata: Machine-readable facts (`google.rpc.ErrorInfo.metadata`).
        violations: Every field that was wrong (`google.rpc.BadRequest`), for INVALID_ARGUMENT.
        retry_after_s: Seconds after which a retry can help (`google.rpc.RetryInfo`); None when it cannot.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: Iterable[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}" + (f" [{reason}]" if reason else ""))
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = MappingProxyType(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    @property
    def request_id(self) -> str:
        """The id that finds this failure in the router's log, or an empty string."""
        return self.metadata.get("request_id", "")

    @classmethod
    def from_rpc_error(cls, error: grpc.aio.AioRpcError) -> "KvRouterError":
        """Decode a failed call; details that cannot be read are left out, the status never is."""
        details: list[Any] = []
        for key, value in error.trailing_metadata() or ():
            if key == _DETAILS_KEY and isinstance(value, bytes):
                # A proxy between us and the router may write anything here; the code and the text stand without it.
                with suppress(DecodeError):
                    details += status_pb2.Status.FromString(value).details
        return cls._from_details(error.code(), error.details() or "", details)

    @classmethod
    def from_status(cls, status: router_pb2.Status) -> "KvRouterError":
        """Decode the status of one request of a batch."""
        code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
        return cls._from_details(code, status.message, status.details)

    @classmethod
    def _from_details(cls, code: grpc.StatusCode, message: str, details: Iterable[Any]) -> "KvRouterError":
        reason = ""
        metadata: dict[str, str] = {}
        violations: list[Violation] = []
        retry_after_s: float | None = None
        for detail in _unpacked(details):
            if isinstance(detail, error_details_pb2.ErrorInfo):
                reason, metadata = detail.reason, dict(detail.metadata)
            elif isinstance(detail, error_details_pb2.BadRequest):
                violations += (Violation(each.field, each.description) for each in detail.field_violations)
            elif isinstance(detail, error_details_pb2.RetryInfo):
                retry_after_s = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        return cls(code, message, reason=reason, metadata=metadata, violations=violations, retry_after_s=retry_after_s)


_CODES = {code.value[0]: code for code in grpc.StatusCode}
_KINDS: tuple[type[Message], ...] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
)


def _unpacked(details: Iterable[Any]) -> Iterator[Message]:
    """The details (`google.protobuf.Any`) of the kinds that the router sends, in their order."""
    for packed in details:
        for kind in _KINDS:
            detail = kind()
            with suppress(DecodeError):
                if packed.Unpack(detail):
                    yield detail


@contextmanager
def rpc_errors() -> Iterator[None]:
    """Turn the transport's error into ours.

    Raises:
        KvRouterError: The call inside failed.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise KvRouterError.from_rpc_error(error) from error
