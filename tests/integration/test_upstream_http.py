"""The engine client over real sockets: answers, aborts, and what a worker says of itself."""

import asyncio
import json
import socket
import threading
import time
from array import array
from contextlib import aclosing

import pytest
from aiohttp import web

from integration.engine_server import (
    DONE,
    HEAD,
    PREFILL_LEG,
    STREAM,
    WIRE,
    Handler,
    chunked,
    client_of,
    collect,
    completing,
    endless,
    raw,
    request,
    serving,
    silent,
    streaming,
    token,
)
from kvrouter_grpc.config import UpstreamConfig
from kvrouter_grpc.errors import (
    UpstreamError,
    UpstreamUnavailableError,
)
from kvrouter_grpc.types import EngineRequest, Usage, WorkerFacts
from kvrouter_grpc.upstream.session import engine_session
from kvrouter_grpc.upstream.vllm_http import Health, VllmHttpClient


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
