"""The error boundary around every call: a status of the table leaves it, never the text of an exception."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from kvrouter_grpc.errors import InvalidRequestError, RouterError
from kvrouter_grpc.server.status import DETAILS_KEY, defect, status_of
from kvrouter_grpc.server.violations import Violations

MAX_REQUEST_ID = 256

Context = grpc.aio.ServicerContext[Any, Any]
Unary = Callable[[Any, Context], Awaitable[Any]]
Streaming = Callable[[Any, Context], AsyncGenerator[Any, None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for the type checker only

_log = structlog.get_logger(__name__)
_request_id: ContextVar[str] = ContextVar("request_id")


def current_request_id() -> str:
    """The id of the call being served: the caller's `request_id`, or one that was made up."""
    return _request_id.get()


def check_request_id(text: str, violations: Violations) -> None:
    """Record a caller's request id that cannot be used; an empty one can be made up."""
    if text and not _usable(text):
        violations.add("request_id", f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters without spaces")


class ErrorBoundary(grpc.aio.ServerInterceptor):
    """Names every call for the log and turns what it raises into a status.

    Without it grpc.aio sends the text of an uncaught exception to the client. Cancellation passes through: it
    says that the client went away, that its deadline passed or that the server stops.

    Args:
        write_timeout_s: Seconds that a client may leave one message of a stream untaken.
    """

    def __init__(self, write_timeout_s: float) -> None:
        self._write_timeout_s = write_timeout_s
        self._guarded: dict[str, Handler] = {}  # by method; servicers do not change

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Give the call's handler with the boundary around it."""
        method = handler_call_details.method
        guarded = self._guarded.get(method)
        if guarded is None:
            handler = await continuation(handler_call_details)
            if handler is None:  # not stored: callers choose the names of unknown methods
                return None
            guarded = self._guarded[method] = _guard(handler, method, self._write_timeout_s)
        return guarded


def _guard(handler: Any, method: str, write_timeout_s: float) -> Any:
    attribute, make = _KINDS[handler.request_streaming, handler.response_streaming]
    inner = getattr(handler, attribute)
    guarded = (
        _guard_streaming(inner, method, write_timeout_s) if handler.response_streaming else _guard_unary(inner, method)
    )
    return make(guarded, _reader(handler.request_deserializer), handler.response_serializer)


_KINDS: Mapping[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""By whether requests and responses are streamed: the handler's attribute and what makes such a handler."""


class _Unreadable:
    """Stands for a request that is no message of the rpc's type."""


def _reader(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserializer that does not raise: what it raises would reach the client before any handler could stop it."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return read


def _guard_unary(inner: Unary, method: str) -> Unary:
    async def handle(request: Any, context: Context) -> Any:
        _name_call(request)
        try:
            _check_readable(request)
            return await inner(request, context)
        except Exception as error:  # noqa: BLE001 - this is the boundary
            await _abort(context, error, method)

    return handle


def _guard_streaming(inner: Streaming, method: str, write_timeout_s: float) -> Unary:
    # A coroutine that writes, not a generator: grpc.aio drops a generator when the call is cancelled while a
    # message is being sent, and leaves its clean-up (lease, engine connection) to the garbage collector.
    async def handle(request: Any, context: Context) -> None:
        _name_call(request)
        try:
            _check_readable(request)
            async with aclosing(inner(request, context)) as messages:
                async for message in messages:
                    await _write(context, message, write_timeout_s)
        except Exception as error:  # noqa: BLE001 - this is the boundary
            await _abort(context, error, method)

    return handle


async def _write(context: Context, message: Any, timeout_s: float) -> None:
    """Send a message; a client that does not take it is treated as one that went away."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except grpc.aio.InternalError:  # it went away just now
        raise asyncio.CancelledError from None
    except TimeoutError:
        # A status cannot be sent either: it would queue up behind the message.
        _log.warning("client does not read", write_timeout_s=timeout_s)
        raise asyncio.CancelledError from None


def _check_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise InvalidRequestError([("", "the message is not of the rpc's request type; is the client's contract old?")])


def _usable(request_id: str) -> bool:
    # It travels in an HTTP header and stands in logs.
    printable = request_id.isascii() and request_id.isprintable() and " " not in request_id
    return printable and 0 < len(request_id) <= MAX_REQUEST_ID


def _name_call(request: Any) -> None:
    given = getattr(request, "request_id", "")
    request_id = given if _usable(given) else uuid.uuid4().hex
    _request_id.set(request_id)  # each call runs in a task, and so in a context, of its own
    structlog.contextvars.bind_contextvars(request_id=request_id)


async def _abort(context: Context, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    request_id = current_request_id()
    if isinstance(error, RouterError):
        status = status_of(error, request_id)
        _log.debug("call refused", method=method, code=status.code.name, reason=error.reason)
    else:
        status = defect(request_id)
        _log.error("call failed by a defect", method=method, exc_info=error)
    await context.abort(status.code, status.message, ((DETAILS_KEY, status.details),))
