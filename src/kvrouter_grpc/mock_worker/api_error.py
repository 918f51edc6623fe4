"""Errors in the form of vLLM's OpenAI surface."""

import json
import re

import msgspec


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status.
        late: vLLM notices it after a stream has begun, so a stream carries it inside a 200.
    """

    def __init__(self, status: int, kind: str, message: str, param: str | None = None, *, late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.late = late
        self._error = {"message": message, "type": kind, "param": param, "code": status}

    def body(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return msgspec.json.encode({"error": self._error})

    def event(self) -> bytes:
        """The same as a server-sent event."""
        return b"data: " + json.dumps({"error": self._error}).encode() + b"\n\n"


def bad_request(message: str, param: str | None = None, *, late: bool = False) -> ApiError:
    """The engine cannot do what is asked."""
    return ApiError(400, "BadRequestError", message, param, late=late)


def not_found(message: str, param: str | None = None) -> ApiError:
    """There is no such thing."""
    return ApiError(404, "NotFoundError", message, param)


def malformed(raw: bytes, error: Exception) -> ApiError:
    """The body is not JSON, or not of the right types."""
    if isinstance(error, msgspec.ValidationError):
        message, _, path = str(error).partition(" - at ")
        place = "body" + re.sub(r"\[([^]]*)\]", r".\1", path.strip("`").removeprefix("$"))
        return ApiError(400, "Bad Request", f"1 validation error:\n  {message}", place)
    return ApiError(400, "Bad Request", "1 validation error:\n  JSON decode error", f"body.{len(raw)}")


def internal(message: str) -> ApiError:
    """The engine failed."""
    return ApiError(500, "InternalServerError", message)


def unavailable(message: str) -> ApiError:
    """Too much to do, or about to stop."""
    return ApiError(503, "ServiceUnavailableError", message)
