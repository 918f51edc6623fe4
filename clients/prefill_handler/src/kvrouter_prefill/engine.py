"""A vLLM server's completions API over HTTP, as little of it as handing a prompt over needs."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp

Json = dict[str, Any]

MAX_EVENT_BYTES = 16 << 20
_MAX_REFUSAL_BYTES = 64 << 10
_MAX_MESSAGE_CHARS = 500
_CONNECT_TIMEOUT_S = 2.0
_OK = 200
_BAD_REQUEST = 400
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500


class EngineError(Exception):
    """An engine refused a request or failed.

    Attributes:
        status: The HTTP status, or the code that the engine put into its stream; 0 when it could not be reached or its
            answer broke off.
        message: What it said, as one line; a sentence of ours when it said nothing.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} ({status})" if status else message)
        self.status = status
        self.message = message

    @property
    def refused(self) -> bool:
        """Whether the request itself is wrong, so that no engine would take it."""
        return _BAD_REQUEST <= self.status < _SERVER_ERROR and self.status != _TOO_MANY_REQUESTS


class Engine:
    """One vLLM server.

    Args:
        url: `http://host:port`.
        session: For its connections; the caller closes it.
        silence_s: Longest wait for the next bytes of an answer.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, silence_s: float) -> None:
        self.url = url
        self._session = session
        self._completions = f"{url.rstrip('/')}/v1/completions"
        self._timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT_S, sock_read=silence_s)

    async def whole(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Json:
        """Send a request that does not stream, and give its answer.

        Raises:
            EngineError: It has none.
        """
        try:
            async with self._post(body, headers) as response:
                if response.status != _OK:
                    raise await _refusal(response)
                data = bytearray()
                async for piece in response.content.iter_any():
                    data += piece
                    if len(data) > MAX_EVENT_BYTES:
                        raise EngineError(0, f"the engine's answer is longer than {MAX_EVENT_BYTES} bytes")
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise _broken() from None
        return _object(bytes(data))

    async def events(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncGenerator[Json, None]:
        """Send a request and give the events of its answer as they come; closing it makes the engine drop the request.

        Raises:
            EngineError: The engine refused, failed, fell silent, or broke the stream off.
        """
        try:
            async with self._post(body, headers) as response:
                if response.status != _OK:
                    raise await _refusal(response)
                pending = bytearray()
                async for piece in response.content.iter_any():
                    pending += piece
                    *lines, rest = bytes(pending).split(b"\n")
                    pending = bytearray(rest)
                    if len(pending) > MAX_EVENT_BYTES:
                        raise EngineError(0, f"an event of the engine is longer than {MAX_EVENT_BYTES} bytes")
                    for line in lines:
                        if not line.startswith(b"data:"):
                            continue
                        data = line[5:].strip()
                        if data == b"[DONE]":
                            return
                        yield _event(data)
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise _broken() from None
        raise _broken()

    def _post(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        return self._session.post(
            self._completions, json=body, headers=headers, timeout=self._timeout, allow_redirects=False
        )


def _event(data: bytes) -> Json:
    event = _object(data)
    if event.get("error") is not None:
        raise _error(event, _SERVER_ERROR)
    return event


async def _refusal(response: aiohttp.ClientResponse) -> EngineError:
    """What a status other than 200 means."""
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            answer = _object(await response.content.read(_MAX_REFUSAL_BYTES))
    except (aiohttp.ClientError, TimeoutError, OSError, EngineError):
        answer = {}
    return _error(answer, response.status)


def _error(answer: Json, status: int) -> EngineError:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    text = " ".join(str(message or "the engine did not say why").split())[:_MAX_MESSAGE_CHARS]
    return EngineError(code if isinstance(code, int) else status, text)


def _object(data: bytes) -> Json:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise EngineError(0, "the engine's answer is not of the vLLM completions API")
    return value


def _broken() -> EngineError:
    return EngineError(0, "the engine could not be reached, fell silent or broke its answer off")
