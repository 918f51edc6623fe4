"""A plain client of the mock worker: HTTP, server-sent events and raw ZMQ sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import zmq
import zmq.asyncio

from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig

FAST = MockWorkerConfig(speedup=0.0, block_size=16, num_blocks=64, vocab_size=1024)
DEADLINE_S = 10.0

Frames = list[bytes]


def fast(**changes: Any) -> MockWorkerConfig:
    return replace(FAST, **changes)


@asynccontextmanager
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        yield session


@asynccontextmanager
async def zmq_socket(kind: int, endpoint: str) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        socket.close(linger=0)
        context.term()


async def replayed(endpoint: str, start: int = 0) -> list[Frames]:
    """Every reply to one replay request, the end marker included."""
    async with zmq_socket(zmq.DEALER, endpoint) as dealer, asyncio.timeout(DEADLINE_S):
        await dealer.send_multipart([b"", start.to_bytes(8, "big")])
        replies = [await dealer.recv_multipart()]
        while replies[-1][-2] != b"\xff" * 8:
            replies.append(await dealer.recv_multipart())
        return replies


def prompt(seed: int, length: int) -> list[int]:
    return [300 + (seed * 7919 + position * 31) % 700 for position in range(length)]


async def complete(
    http: aiohttp.ClientSession, worker: MockWorker, headers: dict[str, str] | None = None, **body: Any
) -> tuple[int, dict[str, Any]]:
    async with http.post(f"{worker.url}/v1/completions", json=body, headers=headers) as response:
        return response.status, await response.json()


async def stream(
    http: aiohttp.ClientSession, worker: MockWorker, headers: dict[str, str] | None = None, **body: Any
) -> list[dict[str, Any]]:
    """The messages of a stream that ended with [DONE]."""
    async with http.post(f"{worker.url}/v1/completions", json={"stream": True, **body}, headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def metric(http: aiohttp.ClientSession, worker: MockWorker, name: str) -> float:
    """Sum over the ranks."""
    async with http.get(f"{worker.url}/metrics") as response:
        text = await response.text()
    values = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)]
    assert values, f"no metric {name}"
    return sum(values)


async def until(condition: Callable[[], bool]) -> None:
    """Poll what has no event of its own."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
