"""The one error a call ends with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

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
        reason = ""
        metadata: dict[str, str] = {}
        violations: list[Violation] = []
        retry_after_s: float | None = None
        for detail in _details(error):
            if isinstance(detail, error_details_pb2.ErrorInfo):
                reason, metadata = detail.reason, dict(detail.metadata)
            elif isinstance(detail, error_details_pb2.BadRequest):
                violations += (Violation(each.field, each.description) for each in detail.field_violations)
            elif isinstance(detail, error_details_pb2.RetryInfo):
                retry_after_s = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        return cls(
            error.code(),
            error.details() or "",
            reason=reason,
            metadata=metadata,
            violations=violations,
            retry_after_s=retry_after_s,
        )


_KINDS: tuple[type[Message], ...] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
)


def _details(error: grpc.aio.AioRpcError) -> list[Message]:
    """The details of the kinds that the router sends, in their order.

    Source: `google.rpc.Status`, which gRPC carries serialized in the trailing metadata.
    """
    found: list[Message] = []
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        # A proxy between us and the router may write anything here; the code and the text stand without it.
        try:
            for packed in status_pb2.Status.FromString(value).details:
                for kind in _KINDS:
                    detail = kind()
                    if packed.Unpack(detail):
                        found.append(detail)
        except DecodeError:
            continue
    return found


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
