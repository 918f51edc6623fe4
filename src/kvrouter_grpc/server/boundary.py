"""The error boundary around every call: a status of the table leaves it, never the text of an exception."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeAlias, cast

import grpc
import structlog

from kvrouter_grpc.errors import RouterError
from kvrouter_grpc.server.incoming import Asked, readable, reader
from kvrouter_grpc.server.status import DETAILS_KEY, Status, defect, status_of
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.upstream.patience import Patience

MAX_REQUEST_ID = 256

Context = grpc.aio.ServicerContext[Any, Any]
Unary = Callable[[Any, Context], Awaitable[Any]]
Streaming = Callable[[Any, Context], AsyncGenerator[Any, None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for the type checker only

_log = structlog.get_logger(__name__)
_request_id: ContextVar[str] = ContextVar("request_id")  # each call runs in a task, and so in a context, of its own


def name_call(given: str) -> str:
    """The id of the call being served: the caller's, or one that is made up. From then on its log lines carry it.

    A call is named when something is to be said of it, which costs too much to be done for every decision.
    """
    request_id = _request_id.get("")
    if not request_id:
        request_id = request_id_for(given)
        _request_id.set(request_id)
        structlog.contextvars.bind_contextvars(request_id=request_id)
    return request_id


def is_request_id(request_id: str) -> bool:
    """Whether a request can be called so."""
    # It travels in an HTTP header and stands in logs.
    printable = request_id.isascii() and request_id.isprintable() and " " not in request_id
    return printable and 0 < len(request_id) <= MAX_REQUEST_ID


def request_id_for(given: str) -> str:
    """The caller's request id if it can be used, else one that is made up."""
    return given if is_request_id(given) else secrets.token_hex(16)


def check_request_id(text: str, violations: Violations) -> None:
    """Record a caller's request id that cannot be used; an empty one can be made up."""
    if text and not is_request_id(text):
        violations.add("request_id", f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters without spaces")


def judge(error: Exception, request_id: str, method: str) -> Status:
    """Log what a request failed with, and give the status that says so."""
    if isinstance(error, RouterError):
        status = status_of(error, request_id)
        _log.debug("call refused", method=method, code=status.code.name, reason=error.reason)
    else:
        status = defect(request_id)
        _log.error("call failed by a defect", method=method, exc_info=error)
    return status


class ErrorBoundary:
    """Stands between the services and a server: puts the boundary around every handler that is added.

    Without it grpc.aio sends the text of an uncaught exception to the client. Cancellation passes through: it
    says that the client went away, that its deadline passed or that the server stops.

    Args:
        server: Where the handlers go. Generated code (`add_..._to_server`) takes the boundary for it.
        write_timeout_s: Seconds that a client may leave one message of a stream untaken.
        apart: Methods (`/service/method`) whose calls gRPC queues apart from all others: when a queue is full, calls in
            it are cancelled, so a flood of one of these leaves the others alone. Each costs every call a microsecond.
    """

    def __init__(self, server: grpc.aio.Server, write_timeout_s: float, apart: Collection[str] = ()) -> None:
        self._server = server
        self._write_timeout_s = write_timeout_s
        self._apart = apart

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Serve the methods of a service, as generated code adds them."""
        self.add(service, {name: _reading(handler) for name, handler in handlers.items()})

    def add(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Serve the methods of a service whose deserializers do not raise."""
        guarded = {
            name: _guard(handler, f"/{service}/{name}", self._write_timeout_s) for name, handler in handlers.items()
        }
        apart = {name: handler for name, handler in guarded.items() if f"/{service}/{name}" in self._apart}
        self._server.add_registered_method_handlers(service, apart)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        """Nothing: generated code adds each method in both ways."""


def _guard(handler: Any, method: str, write_timeout_s: float) -> Handler:
    attribute, make = _KINDS[handler.request_streaming, handler.response_streaming]
    inner = getattr(handler, attribute)
    guarded = (
        _guard_streaming(inner, method, write_timeout_s) if handler.response_streaming else _guard_unary(inner, method)
    )
    return cast("Handler", make(guarded, handler.request_deserializer, handler.response_serializer))


def _reading(handler: Any) -> Handler:
    """The handler, its deserializer one that does not raise."""
    attribute, make = _KINDS[handler.request_streaming, handler.response_streaming]
    inner = getattr(handler, attribute)
    return cast("Handler", make(inner, reader(handler.request_deserializer), handler.response_serializer))


_KINDS: Mapping[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""By whether requests and responses are streamed: the handler's attribute and what makes such a handler."""


def _guard_unary(inner: Unary, method: str) -> Unary:
    async def handle(request: Any, context: Context) -> Any:
        try:
            return await inner(readable(request), context)
        except Exception as error:  # noqa: BLE001 - this is the boundary
            await _abort(context, error, request, method)

    return handle


def _guard_streaming(inner: Streaming, method: str, write_timeout_s: float) -> Unary:
    # A coroutine that writes, not a generator: grpc.aio drops a generator when the call is cancelled while a
    # message is being sent, and leaves its clean-up (lease, engine connection) to the garbage collector.
    async def handle(request: Any, context: Context) -> None:
        try:
            with Patience() as patience:
                async with aclosing(inner(readable(request), context)) as messages:
                    async for message in messages:
                        await _write(context, message, patience, write_timeout_s)
        except Exception as error:  # noqa: BLE001 - this is the boundary
            await _abort(context, error, request, method)

    return handle


async def _write(context: Context, message: Any, patience: Patience, timeout_s: float) -> None:
    """Send a message; a client that does not take it is treated as one that went away."""
    try:
        await patience.within(timeout_s, context.write(message))
    except grpc.aio.InternalError:  # it went away just now
        raise asyncio.CancelledError from None
    except TimeoutError:
        # A status cannot be sent either: it would queue up behind the message.
        _log.warning("client does not read", write_timeout_s=timeout_s)
        raise asyncio.CancelledError from None


async def _abort(context: Context, error: Exception, request: Any, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    message = request.message if isinstance(request, Asked) else request
    status = judge(error, name_call(getattr(message, "request_id", "")), method)
    await context.abort(status.code, status.message, ((DETAILS_KEY, status.details),))
