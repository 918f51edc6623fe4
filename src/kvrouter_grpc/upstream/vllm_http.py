"""Client of one vLLM server over HTTP: the completions API with token ids in and out, and the probes."""

import asyncio
import io
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from typing import TypeVar

import aiohttp
import yarl

from kvrouter_grpc.config import UpstreamConfig
from kvrouter_grpc.errors import RouterError, UpstreamError, UpstreamTimeoutError
from kvrouter_grpc.types import EngineChunk, EngineReport, EngineRequest, WorkerFacts
from kvrouter_grpc.upstream.answer import Answer, StreamedAnswer, WholeAnswer
from kvrouter_grpc.upstream.chunk import MalformedAnswerError, decode_completion
from kvrouter_grpc.upstream.facts import (
    EngineSettings,
    cache_config,
    engine_reports,
    engine_settings,
    event_sources,
    served_models,
    server_version,
    tokens_of,
)
from kvrouter_grpc.upstream.failure import engine_error, lost, malformed, timed_out, unexpected_status
from kvrouter_grpc.upstream.patience import Patience
from kvrouter_grpc.upstream.request import request_body, request_headers

_T = TypeVar("_T")

_OK = 200
_MAX_REFUSAL_BYTES = 64 * 1024
_MAX_PROBE_BYTES = 16 * 1024 * 1024  # a metrics page with the histograms of many engines
_FACTS_TIMEOUT_S = 5.0  # per question; a server under load builds its metrics page slowly
_LOOK_AT_CONNECTION_S = 0.5
_SILENCE_S = 2.5  # of an answer, after which it is not waited for while the server is down
_LAST_BYTES_TIMEOUT_S = 0.2  # `[DONE]` and the end of the body leave the server together


class Health(Enum):
    """The outcome of a health check."""

    GOOD = "good"
    SLOW = "no answer in time"  # busy, stopped or cut off: only time tells
    GONE = "connection refused or lost"
    FAILED = "the engine says that it failed"


class VllmHttpClient:
    """Client of one worker.

    Args:
        url: http://host:port of the server, without a trailing slash.
        session: Made by `engine_session`, shared by the clients of all workers, closed by its owner.
        config: Timeouts and limits.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, config: UpstreamConfig) -> None:
        self._worker = url
        self._url = yarl.URL(url)
        self._completions = self._url / "v1/completions"
        self._session = session
        self._config = config
        self._down = False
        self._posting: dict[asyncio.Timeout, float] = {}  # requests without an answer, and their deadlines
        # Only connecting is limited here; everything else is limited step by step, since a long answer is no
        # fault.
        self._timeout = aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_s)

    def set_down(self, down: bool) -> None:
        """Whoever watches the server's health says whether it answers.

        While it does not, answers that are silent, too, are given up: an engine that hangs closes no connection, and
        the limits for healthy ones are long.
        """
        if down == self._down:
            return
        self._down = down
        for limit, deadline in self._posting.items():
            if not limit.expired():
                limit.reschedule(self._patient_until(deadline))

    def _patient_until(self, deadline: float) -> float:
        return min(deadline, asyncio.get_running_loop().time() + _SILENCE_S) if self._down else deadline

    async def generate(self, request: EngineRequest, dp_rank: int | None) -> AsyncGenerator[list[EngineChunk], None]:
        """Send a request and yield its answer; chunks that arrived together are handed on together.

        Close the generator (`contextlib.aclosing`) or cancel its task to abort: the connection is closed at
        once, which makes the engine drop the request. A connection is used again only after a complete
        answer.

        Args:
            request: What to send.
            dp_rank: Data-parallel rank that shall serve it, None to let the server choose.

        Raises:
            InvalidRequestError: `request` holds what JSON cannot carry.
            EngineRejectedError: The engine read the request and refused it.
            UpstreamUnavailableError: The engine could not be reached, or failed before the first chunk.
            UpstreamTimeoutError: No connection, no first chunk or no next chunk within its time.
            StreamInterruptedError: The engine failed after chunks had been yielded.
            UpstreamError: What is behind the URL does not speak vLLM's API.
        """
        config, loop = self._config, asyncio.get_running_loop()
        kind = StreamedAnswer if request.streams else WholeAnswer
        answer: Answer = kind(self._worker, config.max_response_bytes)
        limit_s = config.first_token_timeout_s
        deadline = loop.time() + limit_s
        body, headers = request_body(request), request_headers(request, dp_rank)
        with self._judged("answer", limit_s):
            response = await self._post(body, headers, deadline)
        try:
            if response.status != _OK:
                raise await self._refusal(response, deadline)
            with Patience() as patience:
                while not answer.done:
                    try:
                        data = await self._read(response, patience, deadline)
                    except (TimeoutError, aiohttp.ClientError, OSError) as error:
                        raise self._judge(error, "token", limit_s, started=answer.started) from error
                    chunks = answer.feed(data) if data else answer.end()
                    if chunks:
                        yield chunks
                        limit_s = config.inter_token_timeout_s
                        # From here on: the time that the caller took for the chunks is not the engine's silence.
                        deadline = loop.time() + limit_s
                    if answer.failure:
                        raise answer.failure
                # Read past `[DONE]` to the end of the body, which gives the connection back to the session.
                with suppress(TimeoutError, aiohttp.ClientError, OSError):
                    await patience.within(_LAST_BYTES_TIMEOUT_S, response.content.readany())
        finally:
            response.close()  # without effect on a connection that was given back

    async def facts(self) -> WorkerFacts:
        """Ask the server what it is. The model list must be there; older versions do not tell all else.

        Raises:
            UpstreamUnavailableError: The server could not be reached, or is busy or failing.
            UpstreamTimeoutError: It did not answer in time.
            UpstreamError: What is behind the URL does not speak vLLM's API.
        """
        status, body = await self._get("v1/models", _FACTS_TIMEOUT_S)
        if status != _OK:
            raise unexpected_status(self._worker, status)
        try:
            served = served_models(body)
        except MalformedAnswerError as error:
            raise malformed(self._worker, started=False) from error
        host = self._url.host or ""
        cache = await self._told("metrics", cache_config)
        sources = await self._told("kv_event_sources", lambda answer: event_sources(answer, host))
        return WorkerFacts(
            models=served.models,
            loras=served.loras,
            max_model_len=served.max_model_len,
            block_size=cache and cache.block_size,
            total_kv_blocks=cache and cache.blocks_per_engine,
            dp_size=max(cache.engines if cache else 1, sources.ranks if sources else 1),
            events=sources and sources.events,
            replay=sources and sources.replay,
            topic=sources.topic if sources else "",
            kv_events=sources and sources.enabled,
            process_start_time=cache and cache.process_start_time,
            version=await self._told("version", server_version),
            prefix_caching=cache and cache.prefix_caching,
        )

    async def settings(self) -> EngineSettings | None:
        """What the server says of its settings, or None: it does so in development mode only.

        Raises:
            UpstreamUnavailableError: The server could not be reached, or is busy or failing.
            UpstreamTimeoutError: It did not answer in time.
        """
        return await self._told("server_info?config_format=json", engine_settings)

    async def tokenize(self, text: str, model: str) -> list[int] | None:
        """The token ids of a text, with special tokens, as the server's own tokenizer makes them; None: it will not.

        Raises:
            UpstreamUnavailableError: The server could not be reached, or is busy or failing.
            UpstreamTimeoutError: It did not answer in time.
        """
        with self._judged("answer to a probe", _FACTS_TIMEOUT_S):
            async with (
                asyncio.timeout(_FACTS_TIMEOUT_S),
                self._session.post(
                    self._url / "tokenize",
                    json={"model": model, "prompt": text, "add_special_tokens": True},
                    timeout=self._timeout,
                    allow_redirects=False,
                ) as response,
            ):
                body = await _body(response, _MAX_PROBE_BYTES)
                try:
                    return tokens_of(body) if response.status == _OK else None
                except MalformedAnswerError:
                    return None

    async def health(self) -> Health:
        """What `GET /health` says within `health_timeout_s`."""
        try:
            status, _ = await self._get("health", self._config.health_timeout_s)
        except UpstreamTimeoutError:
            return Health.SLOW
        except UpstreamError:
            return Health.GONE
        return Health.GOOD if status == _OK else Health.FAILED

    async def reports(self) -> list[EngineReport]:
        """What each rank says of its work at this moment, in the order of the ranks; see `engine_reports`.

        Raises:
            UpstreamUnavailableError: The server could not be reached, or is busy or failing.
            UpstreamTimeoutError: It did not answer in time.
            UpstreamError: What is behind the URL does not speak vLLM's API.
        """
        status, page = await self._get("metrics", _FACTS_TIMEOUT_S)
        if status != _OK:
            raise unexpected_status(self._worker, status)
        return engine_reports(page)

    async def _told(self, path: str, read: Callable[[bytes], _T]) -> _T | None:
        """Ask a question that older versions do not know; None is "cannot tell"."""
        status, body = await self._get(path, _FACTS_TIMEOUT_S)
        if status != _OK:
            return None
        try:
            return read(body)
        except MalformedAnswerError:
            return None

    async def _get(self, path: str, limit_s: float) -> tuple[int, bytes]:
        """Give the status and the body of a probe; a body over the limit is cut."""
        with self._judged("answer to a probe", limit_s):
            async with (
                asyncio.timeout(limit_s),
                self._session.get(
                    self._url.join(yarl.URL(path)), timeout=self._timeout, allow_redirects=False
                ) as response,
            ):
                return response.status, await _body(response, _MAX_PROBE_BYTES)

    async def _refusal(self, response: aiohttp.ClientResponse, deadline: float) -> RouterError:
        """Judge an answer whose status is not 200; the status counts even if its body does not arrive."""
        error = None
        with suppress(TimeoutError, aiohttp.ClientError, OSError, MalformedAnswerError):
            async with asyncio.timeout_at(deadline):
                error = decode_completion(await _body(response, _MAX_REFUSAL_BYTES)).error
        return engine_error(self._worker, response.status, error, started=False)

    async def _post(self, body: bytes, headers: Mapping[str, str], deadline: float) -> aiohttp.ClientResponse:
        """Send a request and wait for the head of its answer."""
        try:
            async with asyncio.timeout_at(self._patient_until(deadline)) as limit:
                self._posting[limit] = deadline
                try:
                    return await self._session.post(
                        self._completions,
                        data=io.BytesIO(body),  # a buffer is sent in slices, bytes all at once
                        headers=headers,
                        timeout=self._timeout,
                        allow_redirects=False,
                    )
                finally:
                    del self._posting[limit]
        except TimeoutError as error:
            if self._down and not isinstance(error, aiohttp.ClientError):
                raise aiohttp.ServerDisconnectedError from None
            raise

    async def _read(self, response: aiohttp.ClientResponse, patience: Patience, deadline: float) -> bytes:
        """Wait for bytes of the body; b"" is its end.

        A broken chunk header makes aiohttp (3.14) close the connection but not end the body, which would be waited for
        until the deadline: hence a look at the connection, and at the server, now and then.
        """
        clock = asyncio.get_running_loop().time
        silent_since = clock()
        while True:
            try:
                left_s = deadline - clock()
                return await patience.within(min(left_s, _LOOK_AT_CONNECTION_S), response.content.readany())
            except TimeoutError:
                # A complete body gives its connection back. After the process was held up, one may have come at the
                # very end of the wait: it is there to be read.
                if response.content.is_eof():
                    continue
                now = clock()
                if now >= deadline:
                    raise
                protocol = response.connection and response.connection.protocol
                hung = self._down and now - silent_since >= _SILENCE_S
                if hung or protocol is None or not protocol.is_connected():
                    raise aiohttp.ServerDisconnectedError from None

    @contextmanager
    def _judged(self, waited_for: str, limit_s: float) -> Iterator[None]:
        """Turn the faults of a connection into errors of the router."""
        try:
            yield
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._judge(error, waited_for, limit_s, started=False) from error

    def _judge(self, error: Exception, waited_for: str, limit_s: float, *, started: bool) -> UpstreamError:
        """What the fault of a connection means."""
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return timed_out(self._worker, "connection", self._config.connect_timeout_s, started=False, sent=False)
        if isinstance(error, TimeoutError):
            return timed_out(self._worker, waited_for, limit_s, started=started)
        return lost(self._worker, started=started, sent=not isinstance(error, aiohttp.ClientConnectorError))


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read the body, or its first bytes where it is longer than `limit`."""
    body = bytearray()
    while len(body) < limit and (data := await response.content.readany()):
        body += data
    return bytes(body)
