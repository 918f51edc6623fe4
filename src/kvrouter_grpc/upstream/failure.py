"""How an engine fails, and whose fault that is: the one place that makes engine faults errors of the router.

`started` says in each of these whether chunks of the answer were handed on: what can still be tried on
another worker before that is an interrupted stream after it.
"""

from kvrouter_grpc.errors import (
    EngineRejectedError,
    RouterError,
    StreamInterruptedError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from kvrouter_grpc.upstream.chunk import ErrorInfo

MAX_MESSAGE_CHARS = 500
_MAX_PARAM_CHARS = 100
_REJECTED = frozenset({400, 413, 422})  # the request is wrong, whatever the body says
_NOT_FOUND = 404
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_TURNED_AWAY = frozenset({_TOO_MANY_REQUESTS, 503})  # the engine did not begin with the request


def engine_error(worker: str, status: int, error: ErrorInfo | str | None, *, started: bool) -> RouterError:
    """Judge an error that the engine reported, by HTTP status or inside its stream.

    Args:
        worker: URL of the worker.
        status: HTTP status; the `code` of an error inside a stream is one too.
        error: The engine's error object, if its body had one.
        started: See above.
    """
    # Only a 404 with vLLM's error object is about the model; a bare one means that there is no such API at
    # this URL.
    if status in _REJECTED or (status == _NOT_FOUND and isinstance(error, ErrorInfo)):
        return _rejected(worker, status, error)
    if started:
        return lost(worker, started=True)
    return unexpected_status(worker, status)


def unexpected_status(worker: str, status: int) -> UpstreamError:
    """Judge an HTTP status that is not about a request: the server is busy or failing, or it is no vLLM."""
    metadata = {"worker_url": worker, "http_status": str(status)}
    if status == _TOO_MANY_REQUESTS or status >= _SERVER_ERROR:
        failing = UpstreamUnavailableError("the worker's engine is busy or failing", metadata=metadata)
        failing.had_request = status not in _TURNED_AWAY
        return failing
    failure = UpstreamError(
        "the worker gave an unexpected HTTP status: its url must be that of a vLLM OpenAI server",
        metadata=metadata,
    )
    failure.before_first_token = True
    return failure


def lost(worker: str, *, started: bool, sent: bool = True) -> UpstreamError:
    """The engine is gone or gave up: no connection, a cut one, an answer without its end.

    `sent` says whether it got the request.
    """
    if started:
        return StreamInterruptedError(
            "the engine failed before the answer was complete; send the request again to start over",
            metadata={"worker_url": worker},
        )
    failure = UpstreamUnavailableError(
        "the worker could not be reached, or failed before its first token",
        metadata={"worker_url": worker},
    )
    failure.had_request = sent
    return failure


def malformed(worker: str, *, started: bool) -> UpstreamError:
    """The engine's answer is not one of vLLM's, or breaks the size limit."""
    text = "the worker sent an answer that is not of the vLLM completions API, or exceeds the size limit"
    failure = (StreamInterruptedError if started else UpstreamError)(text, metadata={"worker_url": worker})
    failure.before_first_token = not started
    return failure


def timed_out(
    worker: str, waited_for: str, limit_s: float, *, started: bool, sent: bool = True
) -> UpstreamTimeoutError:
    """The engine was silent for too long; `waited_for` completes "no ... within". For `sent` see `lost`."""
    failure = UpstreamTimeoutError(
        f"no {waited_for} from the worker within {limit_s:g} s", metadata={"worker_url": worker}
    )
    failure.before_first_token = not started
    failure.had_request = sent
    return failure


def _rejected(worker: str, status: int, error: ErrorInfo | str | None) -> EngineRejectedError:
    metadata = {"worker_url": worker, "http_status": str(status)}
    message = ""
    if isinstance(error, ErrorInfo):
        message = printable(error.message, MAX_MESSAGE_CHARS)
        if error.param:
            metadata["param"] = printable(error.param, _MAX_PARAM_CHARS)
    return EngineRejectedError(f"the engine refused the request: {message or 'it did not say why'}", metadata=metadata)


def printable(text: str, limit: int) -> str:
    """One line of at most `limit` printable characters; what cannot be printed becomes "?"."""
    words = " ".join(text[: 4 * limit].split())
    line = "".join(char if char.isprintable() else "?" for char in words[:limit])
    return line if len(words) <= limit and len(text) <= 4 * limit else line[: limit - 1] + "…"
