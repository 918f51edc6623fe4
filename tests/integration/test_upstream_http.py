import asyncio
import json
import socket
import struct
import threading
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kvrouter_grpc.config import UpstreamConfig
from kvrouter_grpc.errors import (
    EngineRejectedError,
    RouterError,
    StreamInterruptedError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from kvrouter_grpc.types import EngineChunk, EngineRequest, Usage, WorkerFacts
from kvrouter_grpc.upstream import vllm_http
from kvrouter_grpc.upstream.session import engine_session
from kvrouter_grpc.upstream.vllm_http import Health, VllmHttpClient

WIRE = Path(__file__).parents[1] / "unit" / "vllm_wire"  # recorded from vLLM 0.32.0
STREAM = (WIRE / "stream.sse").read_bytes()
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def token(token_id: int, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": f"t{token_id}", "token_ids": [token_id], "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def request(**fields: Any) -> EngineRequest:
    return EngineRequest(
        **{"request_id": "r-1", "model": "tiny", "tokens": array("I", range(5)), "params": {}} | fields
    )


PREFILL_LEG = {"kv_transfer_params": {"do_remote_decode": True}}


@dataclass
class Engine:
    """What the server of a test saw."""

    url: str = ""
    connections: set[object] = field(default_factory=set)
    requests: list[tuple[dict[str, Any], Mapping[str, str]]] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # a client left before its answer was complete


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(*routes: web.RouteDef, engine: Engine | None = None) -> AsyncIterator[Engine]:
    engine = engine or Engine()
    app = web.Application(client_max_size=1 << 28)
    app.add_routes(routes)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        engine.url = f"http://{host}:{port}"
        yield engine
    finally:
        await runner.cleanup()


@asynccontextmanager
async def completing(answer: Handler) -> AsyncIterator[Engine]:
    engine = Engine()

    async def handler(call: web.Request) -> web.StreamResponse:
        engine.connections.add(call.transport)
        engine.requests.append((await call.json(), call.headers))
        engine.called.set()
        try:
            return await answer(call)
        except (asyncio.CancelledError, ConnectionError):
            engine.gone.set()
            raise

    async with serving(web.post("/v1/completions", handler), engine=engine):
        yield engine


@asynccontextmanager
async def raw(*steps: bytes | asyncio.Event, reset: bool = False) -> AsyncIterator[Engine]:
    """A server that reads a request, writes or waits as told, and closes (or resets) the connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        for step in steps:
            if isinstance(step, asyncio.Event):
                await step.wait()
            else:
                writer.write(step)
                await writer.drain()
        if reset:
            linger_zero = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_zero)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Engine(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


@asynccontextmanager
async def client_of(url: str, **settings: float) -> AsyncIterator[VllmHttpClient]:
    async with engine_session() as session:
        yield VllmHttpClient(url, session, UpstreamConfig(**settings))


async def collect(
    client: VllmHttpClient, asked: EngineRequest | None = None, dp_rank: int | None = None
) -> list[EngineChunk]:
    async with aclosing(client.generate(asked or request(), dp_rank)) as answer:
        return [chunk async for chunks in answer for chunk in chunks]


async def drain(answer: AsyncIterator[list[EngineChunk]], seen: list[EngineChunk]) -> None:
    async for chunks in answer:
        seen += chunks


async def fail(
    url: str, kind: type[RouterError], chunks: int = 0, asked: EngineRequest | None = None, **settings: float
) -> RouterError:
    """Ask; expect so many chunks and then that error."""
    seen: list[EngineChunk] = []
    async with client_of(url, **settings) as client:
        answer = client.generate(asked or request(), None)
        with pytest.raises(RouterError) as caught:
            await drain(answer, seen)
    assert type(caught.value) is kind
    assert len(seen) == chunks
    assert caught.value.metadata["worker_url"] == url
    if isinstance(caught.value, UpstreamError):
        assert caught.value.before_first_token is (chunks == 0)
    return caught.value


def streaming(*parts: bytes) -> Handler:
    async def answer(call: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(call)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0)
        return response

    return answer


def endless(interval_s: float) -> Handler:
    async def answer(call: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(call)
        while True:
            await response.write(token(1))
            await asyncio.sleep(interval_s)

    return answer


async def silent(call: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def anext_until_fault(client: VllmHttpClient) -> tuple[int, UpstreamError]:
    seen = 0
    try:
        async with aclosing(client.generate(request(), None)) as answer:
            async for chunks in answer:
                seen += len(chunks)
    except UpstreamError as fault:
        return seen, fault
    raise AssertionError


class TestAnswers:
    async def test_stream(self) -> None:
        async with completing(streaming(STREAM)) as engine, client_of(engine.url) as client:
            chunks = await collect(client, request(params={"max_tokens": 4}), dp_rank=1)
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [23, 475, 276, 398]
        assert chunks[-1].usage == Usage(5, 4, 0)
        ((body, headers),) = engine.requests
        assert (body["prompt"], body["max_tokens"], body["stream"]) == ([0, 1, 2, 3, 4], 4, True)
        assert (headers["X-Request-Id"], headers["X-data-parallel-rank"]) == ("r-1", "1")

    @pytest.mark.parametrize("size", [1, 2, 13, 400])
    async def test_stream_cut_into_small_reads(self, size: int) -> None:
        parts = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
        async with completing(streaming(*parts)) as engine, client_of(engine.url) as client:
            chunks = await collect(client)
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [23, 475, 276, 398]

    async def test_prefill_leg_is_not_streamed(self) -> None:
        params = {"do_remote_prefill": True, "remote_block_ids": [[1]]}
        body = json.loads((WIRE / "completion.json").read_bytes()) | {"kv_transfer_params": params}

        async def answer(call: web.Request) -> web.StreamResponse:
            return web.json_response(body)

        async with completing(answer) as engine, client_of(engine.url) as client:
            (chunk,) = await collect(client, request(**PREFILL_LEG))
        assert chunk.kv_transfer_params == params
        assert chunk.usage == Usage(5, 4, 0)
        assert engine.requests[0][0]["stream"] is False

    @pytest.mark.parametrize("asked", [request(), request(**PREFILL_LEG)], ids=["stream", "whole"])
    async def test_connection_is_used_again(self, asked: EngineRequest) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            if asked.streams:
                return await streaming(STREAM)(call)
            return web.Response(body=(WIRE / "completion.json").read_bytes())

        async with completing(answer) as engine, client_of(engine.url) as client:
            for _ in range(5):
                await collect(client, asked)
        assert len(engine.requests) == 5
        assert len(engine.connections) == 1

    async def test_long_prompt(self) -> None:
        tokens = array("I", range(1_000_000))
        async with completing(streaming(STREAM)) as engine, client_of(engine.url) as client:
            await collect(client, request(tokens=tokens))
        assert engine.requests[0][0]["prompt"] == tokens.tolist()

    async def test_chunks_that_wait_for_a_slow_caller_come_together(self) -> None:
        sent = asyncio.Event()

        async def answer(call: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(call)
            await response.write(token(0))
            for i in range(1, 50):
                await response.write(token(i, "stop" if i == 49 else None))
            await response.write(DONE)
            await response.write_eof()
            sent.set()
            return response

        async with completing(answer) as engine, client_of(engine.url) as client:
            answered = client.generate(request(), None)
            seen = [*(await anext(answered))]
            await sent.wait()
            steps = 1
            async for chunks in answered:
                seen += chunks
                steps += 1
        assert [chunk.token_ids for chunk in seen] == [[i] for i in range(50)]
        assert steps < 10


class TestAbort:
    async def test_closing_the_generator_reaches_the_engine(self) -> None:
        async with completing(endless(0.005)) as engine, client_of(engine.url) as client:
            answer = client.generate(request(), None)
            await anext(answer)
            start = time.perf_counter()
            await answer.aclose()
            await asyncio.wait_for(engine.gone.wait(), 5)
            assert time.perf_counter() - start < 0.5

    @pytest.mark.parametrize("answer", [silent, endless(3600)], ids=["before-first-token", "between-tokens"])
    @pytest.mark.parametrize("asked", [request(), request(**PREFILL_LEG)], ids=["stream", "whole"])
    async def test_cancelling_the_caller_reaches_the_engine(self, answer: Handler, asked: EngineRequest) -> None:
        async with completing(answer) as engine, client_of(engine.url) as client:
            task = asyncio.create_task(collect(client, asked))
            await asyncio.wait_for(engine.called.wait(), 5)
            task.cancel()
            await asyncio.wait_for(engine.gone.wait(), 5)
            with pytest.raises(asyncio.CancelledError):
                await task

    async def test_the_connection_of_an_aborted_answer_is_not_used_again(self) -> None:
        async with completing(endless(0.001)) as engine, client_of(engine.url) as client:
            for _ in range(3):
                async with aclosing(client.generate(request(), None)) as answer:
                    await anext(answer)
        assert len(engine.connections) == 3


class TestFaults:
    async def test_refused_connection(self) -> None:
        async with serving() as engine:
            pass
        await fail(engine.url, UpstreamUnavailableError)

    async def test_unknown_host(self) -> None:
        await fail("http://worker.invalid:8000", UpstreamUnavailableError)

    @pytest.mark.parametrize("reset", [False, True])
    async def test_connection_lost_before_the_answer(self, reset: bool) -> None:
        async with raw(reset=reset) as engine:
            await fail(engine.url, UpstreamUnavailableError)
        async with raw(HEAD, reset=reset) as engine:
            await fail(engine.url, UpstreamUnavailableError)

    @pytest.mark.parametrize("reset", [False, True])
    @pytest.mark.parametrize(
        "rest",
        [b"", b"5\r\ndata:", chunked(token(2)[:-9]), b"zz\r\n", b"0\r\n\r\n", chunked(DONE) + b"0\r\n\r\n"],
        ids=["nothing", "cut-frame", "cut-event", "garbage", "end-of-body", "done-without-finish"],
    )
    async def test_connection_lost_after_a_token(self, rest: bytes, reset: bool) -> None:
        delivered = asyncio.Event()
        steps = (HEAD + chunked(token(1)), delivered, rest)
        async with raw(*steps, reset=reset) as engine, client_of(engine.url) as client:
            answer = client.generate(request(), None)
            assert len(await anext(answer)) == 1
            delivered.set()
            with pytest.raises(StreamInterruptedError) as caught:
                await anext(answer)
        assert caught.value.before_first_token is False
        assert caught.value.metadata["worker_url"] == engine.url

    @pytest.mark.parametrize(
        "garbage",
        [
            b"\x00\x01\x02\r\n\r\n",
            b"SSH-2.0-OpenSSH\r\n",
            b"HTTP/1.1 banana\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\x00: x\r\n\r\n",
        ],
    )
    async def test_not_http(self, garbage: bytes) -> None:
        async with raw(garbage) as engine:
            await fail(engine.url, UpstreamUnavailableError)

    @pytest.mark.parametrize(
        ("status", "body", "kind"),
        [
            (400, (WIRE / "error_400_rank.json").read_bytes(), EngineRejectedError),
            (404, (WIRE / "error_404.json").read_bytes(), EngineRejectedError),
            (422, b'{"detail":[]}', EngineRejectedError),
            (400, b"\xff" * 100_000, EngineRejectedError),
            (404, b'{"detail":"Not Found"}', UpstreamError),
            (401, b'{"error":"Unauthorized"}', UpstreamError),
            (302, b"", UpstreamError),
            (204, b"", UpstreamError),
            (429, b"", UpstreamUnavailableError),
            (500, b'{"error":{"message":"boom","code":500}}', UpstreamUnavailableError),
            (503, b'{"error":{"message":"engine is currently busy","code":503}}', UpstreamUnavailableError),
        ],
    )
    async def test_http_status(self, status: int, body: bytes, kind: type[RouterError]) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=body, headers={"Location": "/elsewhere"})

        async with completing(answer) as engine:
            error = await fail(engine.url, kind)
            assert error.metadata["http_status"] == str(status)
            assert len(engine.requests) == 1  # no redirect is followed, nothing is sent twice

    async def test_the_engines_reason_is_passed_on(self) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            return web.Response(status=400, body=(WIRE / "error_400_multiline.json").read_bytes())

        async with completing(answer) as engine:
            error = await fail(engine.url, EngineRejectedError)
        assert error.message.startswith("the engine refused the request: 4 validation errors: {'type':")
        assert "\n" not in error.message
        assert error.metadata["param"] == "body.prompt.0"

    async def test_a_refusal_whose_body_never_comes_still_counts(self) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(status=503)
            await response.prepare(call)
            await asyncio.Event().wait()
            raise AssertionError

        async with completing(answer) as engine:
            await fail(engine.url, UpstreamUnavailableError, first_token_timeout_s=0.1)

    @pytest.mark.parametrize("body", [b"\x00" * 5000, b"data: " + b"x" * 5000, b"data: x\n" * 1000, b"data: {\n\n"])
    async def test_garbage_in_a_stream(self, body: bytes) -> None:
        async with completing(streaming(body)) as engine:
            await fail(engine.url, UpstreamError, max_response_bytes=1024)

    async def test_too_large_a_whole_answer(self) -> None:
        async def answer(call: web.Request) -> web.StreamResponse:
            return web.Response(body=b" " * 5000)

        async with completing(answer) as engine:
            await fail(engine.url, UpstreamError, asked=request(**PREFILL_LEG), max_response_bytes=1024)

    @pytest.mark.parametrize("asked", [request(), request(**PREFILL_LEG)], ids=["stream", "whole"])
    async def test_first_token_timeout(self, asked: EngineRequest) -> None:
        async with completing(silent) as engine:
            error = await fail(engine.url, UpstreamTimeoutError, asked=asked, first_token_timeout_s=0.05)
            assert error.message == "no answer from the worker within 0.05 s"
            await asyncio.wait_for(engine.gone.wait(), 5)  # the engine is told to stop

    async def test_inter_token_timeout(self) -> None:
        async with completing(endless(3600)) as engine:
            error = await fail(engine.url, UpstreamTimeoutError, chunks=1, inter_token_timeout_s=0.05)
            assert error.message == "no token from the worker within 0.05 s"
            await asyncio.wait_for(engine.gone.wait(), 5)

    @pytest.mark.parametrize(("answer", "chunks"), [(silent, 0), (endless(3600), 1)], ids=["no-answer", "no-token"])
    async def test_a_server_that_is_down_is_not_waited_for(
        self, answer: Handler, chunks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm_http, "_SILENCE_S", 0.05)
        async with completing(answer) as engine, client_of(engine.url) as client:
            for known_before in (False, True):
                client.set_down(known_before)
                engine.called.clear()
                got = asyncio.create_task(anext_until_fault(client))
                await asyncio.wait_for(engine.called.wait(), 5)
                client.set_down(True)
                seen, fault = await asyncio.wait_for(got, 5)
                assert seen == chunks
                assert type(fault) is (StreamInterruptedError if chunks else UpstreamUnavailableError)
                assert fault.before_first_token == (not chunks)

    async def test_a_server_that_is_back_in_time_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm_http, "_SILENCE_S", 0.2)
        go_on = asyncio.Event()

        async def late(call: web.Request) -> web.StreamResponse:
            await go_on.wait()
            return await streaming(STREAM)(call)

        async with completing(late) as engine, client_of(engine.url) as client:
            got = asyncio.create_task(collect(client))
            await asyncio.wait_for(engine.called.wait(), 5)
            client.set_down(True)
            client.set_down(False)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(got), 0.4)
            go_on.set()
            assert len(await got) > 0

    async def test_a_server_that_is_down_and_goes_on_answering_is_listened_to(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm_http, "_SILENCE_S", 0.2)

        async def steady(call: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(call)
            for number in range(20):
                await response.write(token(number, "stop" if number == 19 else None))
                await asyncio.sleep(0.03)
            await response.write(DONE)
            return response

        async with completing(steady) as engine, client_of(engine.url) as client:
            client.set_down(True)
            assert len(await collect(client)) == 20

    async def test_bytes_without_tokens_do_not_reset_the_timeout(self) -> None:
        async def drip(call: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(call)
            while True:
                await response.write(b": still here\n\n")
                await asyncio.sleep(0.005)

        async with completing(drip) as engine:
            await fail(engine.url, UpstreamTimeoutError, first_token_timeout_s=0.1)

    async def test_a_slow_caller_is_not_the_engines_silence(self) -> None:
        seen = 0
        async with (
            completing(streaming(token(1), token(2, "stop"), DONE)) as engine,
            client_of(engine.url, inter_token_timeout_s=0.05) as client,
        ):
            async for chunks in client.generate(request(), None):
                seen += len(chunks)
                await asyncio.sleep(0.1)  # longer than the timeout
        assert seen == 2

    async def test_connect_timeout(self) -> None:
        # A listener that accepts nothing and whose backlog is full lets no further connection in.
        with socket.socket() as listener, ExitStack() as stack:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            error = await fail(url, UpstreamTimeoutError, connect_timeout_s=0.1)
        assert error.message == "no connection from the worker within 0.1 s"


class TestProbes:
    @staticmethod
    def routes(**bodies: bytes) -> list[web.RouteDef]:
        def route(path: str, body: bytes) -> web.RouteDef:
            async def handler(_: web.Request) -> web.Response:
                return web.Response(body=body)

            return web.get(path, handler)

        return [route("/" + path.replace("__", "/"), body) for path, body in bodies.items()]

    async def test_facts_of_a_new_server(self) -> None:
        routes = self.routes(
            v1__models=(WIRE / "models.json").read_bytes(),
            metrics=(WIRE / "metrics.txt").read_bytes(),
            kv_event_sources=(WIRE / "kv_event_sources.json").read_bytes(),
            version=(WIRE / "version.json").read_bytes(),
        )
        async with serving(*routes) as engine, client_of(engine.url) as client:
            assert await client.facts() == WorkerFacts(
                models=("tiny",),
                max_model_len=1024,
                block_size=32,
                total_kv_blocks=64,
                dp_size=1,
                events="tcp://127.0.0.1:5557",
                replay="tcp://127.0.0.1:5562",
                topic="kv-events",
                kv_events=True,
                process_start_time=1.79516260877e9,
                version="0.32.0",
                prefix_caching=True,
            )

    async def test_facts_of_an_old_server(self) -> None:
        routes = self.routes(v1__models=(WIRE / "models.json").read_bytes())
        async with serving(*routes) as engine, client_of(engine.url) as client:
            assert await client.facts() == WorkerFacts(models=("tiny",), max_model_len=1024)

    async def test_facts_pass_over_what_they_cannot_read(self) -> None:
        routes = self.routes(
            v1__models=(WIRE / "models.json").read_bytes(),
            metrics=b"\xff",
            kv_event_sources=b"[]",
            version=b"{}",
        )
        async with serving(*routes) as engine, client_of(engine.url) as client:
            assert await client.facts() == WorkerFacts(models=("tiny",), max_model_len=1024)

    async def test_facts_need_the_models(self) -> None:
        async with serving(*self.routes(v1__models=b"{}")) as engine, client_of(engine.url) as client:
            with pytest.raises(UpstreamError) as caught:
                await client.facts()
        assert type(caught.value) is UpstreamError
        async with serving() as engine, client_of(engine.url) as client:
            with pytest.raises(UpstreamError) as caught:
                await client.facts()
        assert caught.value.metadata["http_status"] == "404"
        async with client_of(engine.url) as client:
            with pytest.raises(UpstreamUnavailableError):
                await client.facts()

    async def test_health(self) -> None:
        async with serving(*self.routes(health=b"")) as engine, client_of(engine.url) as client:
            assert await client.health() is Health.GOOD
        async with client_of(engine.url) as client:
            assert await client.health() is Health.GONE
        async with serving() as engine, client_of(engine.url) as client:
            assert await client.health() is Health.FAILED
        async with (
            serving(web.get("/health", silent)) as engine,
            client_of(engine.url, health_timeout_s=0.05) as client,
        ):
            assert await client.health() is Health.SLOW
        async with raw(b"\x00" * 100) as engine, client_of(engine.url) as client:
            assert await client.health() is Health.GONE


async def test_an_answer_that_comes_while_the_router_is_held_up_is_read() -> None:
    rest = token(2, "length") + DONE
    sent, more = threading.Event(), threading.Event()

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as reader:
            while not (line := reader.readline()).lower().startswith(b"content-length:"):
                pass
            while reader.readline() != b"\r\n":
                pass
            reader.read(int(line.split(b":")[1]))
            connection.sendall(HEAD + chunked(token(1)))
            more.wait()
            connection.sendall(chunked(rest) + b"0\r\n\r\n")
            sent.set()
            reader.read()  # until the client leaves

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        async with engine_session() as session:
            client = VllmHttpClient(f"http://127.0.0.1:{listening.getsockname()[1]}", session, UpstreamConfig())
            answer = client.generate(request(), None)
            first = await anext(answer)
            waiting = asyncio.ensure_future(anext(answer))
            for _ in range(3):
                await asyncio.sleep(0)  # it waits for bytes now
            more.set()
            sent.wait()
            time.sleep(0.6)  # noqa: ASYNC251 - longer than between two looks at the connection
            second = await waiting
            assert [chunk.token_ids for chunk in [*first, *second]] == [[1], [2]]
            assert [_ async for _ in answer] == []
        thread.join()
