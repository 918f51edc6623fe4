"""A server that answers as one test says, and the client of an engine that is sent to it."""

import asyncio
import json
import socket
import struct
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kvrouter_grpc.config import UpstreamConfig
from kvrouter_grpc.errors import (
    RouterError,
    UpstreamError,
)
from kvrouter_grpc.types import EngineChunk, EngineRequest
from kvrouter_grpc.upstream.session import engine_session
from kvrouter_grpc.upstream.vllm_http import VllmHttpClient

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
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
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
