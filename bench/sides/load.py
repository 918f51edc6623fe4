"""Side: the load generator. Messages are prebuilt bytes and answers are not parsed, so it costs little."""

import asyncio
import itertools
import json
import time
from array import array
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import uvloop

from bench import meter, work
from bench.side import serve
from kvrouter_grpc._gen import router_pb2

SERVICE = "/kvrouter.v1.KvRouter/"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
OUTPUT_TOKENS = 32
channels: dict[str, grpc.aio.Channel] = {}
bodies: dict[tuple[str, int, int], list[bytes]] = {}

Call = Callable[[bytes], Awaitable[float | None]]  # when the first message of a stream came


async def one_reply(address: str, length: int) -> str:
    """The reply to one BestWorkerId, in hex."""
    call: Any = _channel(address).unary_unary(SERVICE + "BestWorkerId")
    reply: bytes = await call(_bodies("best_worker", length)[0])
    return reply.hex()


async def drive(
    address: str, kind: str, length: int, concurrency: int, seconds: float, batch: int = 1
) -> dict[str, float]:
    """A closed loop of `concurrency` calls in flight.

    Args:
        address: Of the server.
        kind: One of `KINDS`.
        length: Tokens per prompt.
        concurrency: Loops.
        seconds: For how long new calls are begun.
        batch: Requests per call, where the kind has that.

    Returns:
        `calls` (single requests), `p50_ms`, `p99_ms` of what was sent together, and for streamed answers `first_ms`,
        the median time to the first message.
    """
    messages = itertools.cycle(_bodies(kind, length, batch))
    taken: list[float] = []
    firsts: list[float] = []

    async def loop() -> None:
        call, close = await KINDS[kind](address)
        ends = time.perf_counter() + seconds
        while (started := time.perf_counter()) < ends:
            first = await call(next(messages))
            taken.append(time.perf_counter() - started)
            if first is not None:
                firsts.append(first - started)
        await close()

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(loop())
    taken.sort()
    firsts.sort()
    found = {
        "calls": len(taken) * batch,
        "p50_ms": meter.percentile(taken, 0.5) * 1000,
        "p99_ms": meter.percentile(taken, 0.99) * 1000,
    }
    return found | ({"first_ms": meter.percentile(firsts, 0.5) * 1000} if firsts else {})


# --- kinds of calls --------------------------------------------------------------------------------------------------

Opened = tuple[Call, Callable[[], Awaitable[None]]]


async def _nothing() -> None:
    pass


def _unary(method: str) -> Callable[[str], Awaitable[Opened]]:
    async def opened(address: str) -> Opened:
        send: Any = _channel(address).unary_unary(SERVICE + method)

        async def call(body: bytes) -> None:
            await send(body)

        return call, _nothing

    return opened


async def _generate(address: str) -> Opened:
    send: Any = _channel(address).unary_stream(SERVICE + "Generate")

    async def call(body: bytes) -> float:
        first = 0.0
        async for _ in send(body):
            first = first or time.perf_counter()
        return first

    return call, _nothing


async def _stream(address: str) -> Opened:
    """One stream per loop, on which every message is answered before the next."""
    stream: Any = _channel(address).stream_stream(SERVICE + "BestWorkerIdStream")()

    async def call(body: bytes) -> None:
        await stream.write(body)
        if await stream.read() is grpc.aio.EOF:
            raise ConnectionError(f"the stream ended: {await stream.code()}")

    return call, stream.done_writing


async def _http(address: str) -> Opened:
    """One connection per loop, kept alive."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def call(body: bytes) -> None:
        writer.write(body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise ConnectionError(head.decode())
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))

    async def close() -> None:
        writer.close()
        await writer.wait_closed()

    return call, close


KINDS: dict[str, Callable[[str], Awaitable[Opened]]] = {
    "best_worker": _unary("BestWorkerId"),
    "batch": _unary("BestWorkerIdBatch"),
    "stream": _stream,
    "generate": _generate,
    "http_select": _http,
}


def _channel(address: str) -> grpc.aio.Channel:
    if address not in channels:
        channels[address] = grpc.aio.insecure_channel(address, options=OPTIONS)
    return channels[address]


# --- messages --------------------------------------------------------------------------------------------------------


def _bodies(kind: str, length: int, batch: int = 1) -> list[bytes]:
    key = (kind, length, batch)
    if key not in bodies:
        prompts = work.pool(length).queries
        groups = [
            [prompts[(start + offset) % len(prompts)] for offset in range(batch)]
            for start in range(0, len(prompts), min(batch, len(prompts)))
        ]
        bodies[key] = [_body(kind, group) for group in groups]
    return bodies[key]


def _body(kind: str, prompts: list["array[int]"]) -> bytes:
    match kind:
        case "best_worker":
            return _request(prompts[0]).SerializeToString()
        case "batch":
            return router_pb2.BestWorkerIdBatchRequest(requests=map(_request, prompts)).SerializeToString()
        case "stream":
            return router_pb2.BestWorkerIdStreamRequest(requests=map(_request, prompts)).SerializeToString()
        case "generate":
            stop = router_pb2.StopConditions(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            return router_pb2.GenerateRequest(token_ids=prompts[0], stop_conditions=stop).SerializeToString()
        case "http_select":
            content = json.dumps({"token_ids": prompts[0].tolist()}, separators=(",", ":")).encode()
            head = "POST /select HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    raise ValueError(f"no such kind: {kind}")


def _request(prompt: "array[int]") -> router_pb2.BestWorkerIdRequest:
    return router_pb2.BestWorkerIdRequest(token_ids=prompt)


if __name__ == "__main__":
    serve([one_reply, drive], uvloop.run)
