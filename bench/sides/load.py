"""Side: the load generator for gRPC. Messages are prebuilt bytes and answers are not parsed, so it costs little."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import uvloop

from bench import meter, work
from bench.side import serve
from kvrouter_grpc._gen import router_pb2

SERVICE = "/kvrouter.v1.KvRouter/"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
channels: dict[str, grpc.aio.Channel] = {}
bodies: dict[tuple[str, int], list[bytes]] = {}

Call = Callable[[bytes], Awaitable[float | None]]  # seconds to the first message of a stream


def _channel(address: str) -> grpc.aio.Channel:
    if address not in channels:
        channels[address] = grpc.aio.insecure_channel(address, options=OPTIONS)
    return channels[address]


def _bodies(kind: str, length: int) -> list[bytes]:
    if (kind, length) not in bodies:
        bodies[kind, length] = [_body(kind, prompt) for prompt in work.pool(length).queries]
    return bodies[kind, length]


def _body(kind: str, prompt: Any) -> bytes:
    if kind == "best_worker":
        return router_pb2.BestWorkerIdRequest(token_ids=prompt).SerializeToString()
    stop = router_pb2.StopConditions(max_tokens=32, ignore_eos=True)
    return router_pb2.GenerateRequest(token_ids=prompt, stop_conditions=stop).SerializeToString()


async def one_reply(address: str, length: int) -> str:
    """The reply to one BestWorkerId, in hex."""
    call: Any = _channel(address).unary_unary(SERVICE + "BestWorkerId")
    reply: bytes = await call(_bodies("best_worker", length)[0])
    return reply.hex()


async def drive(address: str, kind: str, length: int, concurrency: int, seconds: float) -> dict[str, float]:
    """A closed loop of `concurrency` calls in flight.

    Returns:
        `calls`, `p50_ms`, `p99_ms`, and for streams `first_ms`, the median time to the first message.
    """
    call = {"best_worker": _best_worker, "generate": _generate}[kind](_channel(address))
    messages = itertools.cycle(_bodies(kind, length))
    taken: list[float] = []
    firsts: list[float] = []
    ends = time.perf_counter() + seconds

    async def loop() -> None:
        while (started := time.perf_counter()) < ends:
            first = await call(next(messages))
            taken.append(time.perf_counter() - started)
            if first is not None:
                firsts.append(first - started)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(loop())
    taken.sort()
    firsts.sort()
    found = {
        "calls": len(taken),
        "p50_ms": meter.percentile(taken, 0.5) * 1000,
        "p99_ms": meter.percentile(taken, 0.99) * 1000,
    }
    return found | ({"first_ms": meter.percentile(firsts, 0.5) * 1000} if firsts else {})


def _best_worker(channel: grpc.aio.Channel) -> Call:
    method: Any = channel.unary_unary(SERVICE + "BestWorkerId")

    async def call(body: bytes) -> None:
        await method(body)

    return call


def _generate(channel: grpc.aio.Channel) -> Call:
    method: Any = channel.unary_stream(SERVICE + "Generate")

    async def call(body: bytes) -> float:
        first = 0.0
        async for _ in method(body):
            first = first or time.perf_counter()
        return first

    return call


if __name__ == "__main__":
    serve([one_reply, drive], uvloop.run)
