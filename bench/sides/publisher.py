"""Side: workers that only tell of their caches: vLLM's event sockets, and as much HTTP as introduces them."""

import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
import zmq
from aiohttp import web

from bench import work
from bench.side import serve

sockets: list["zmq.Socket[bytes]"] = []
sequence: list[int] = []
prepared: dict[str, tuple[list[tuple[int, bytes]], int]] = {}  # name to (messages, blocks)


async def open_workers(workers: int) -> dict[str, Any]:
    """Start `workers` workers; returns the `url` they share and the `events` address of each."""
    context = zmq.Context()
    context.max_sockets = 4 * workers + 16
    events = []
    for _ in range(workers):
        socket = context.socket(zmq.XPUB)  # a PUB socket that tells who listens
        socket.sndhwm = 0
        socket.xpub_verbose = True  # of each, not only of the first
        events.append(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        sockets.append(socket)
        sequence.append(0)
    application = web.Application()
    application.router.add_get("/health", _health)
    application.router.add_get("/v1/models", _models)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return {"url": f"http://127.0.0.1:{runner.addresses[0][1]}", "events": events}


async def _health(_: web.Request) -> web.Response:
    return web.Response()


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": work.MODEL}]})


def await_listeners(count: int) -> None:
    """Wait until so many listen to every worker.

    Raises:
        TimeoutError: They do not.
    """
    for socket in sockets:
        for _ in range(count):
            if not socket.poll(30_000):
                raise TimeoutError("the events of a worker have fewer subscribers than expected")
            socket.recv()


def prepare_fleet(blocks_each: int, per_event: int, per_message: int) -> dict[str, int]:
    """Build the messages "stored" and "removed" of a fleet's work."""
    shape = work.Shape(per_event, per_message)
    fleet = list(work.fleet(len(sockets), blocks_each))
    blocks = sum(len(run.names) for runs in fleet for run in runs)
    # An engine evicts one block at a time, but the removals of a step are one message; ours are as large as the stores.
    for name, build in (("stored", work.stored_messages), ("removed", work.removed_messages)):
        prepared[name] = (list(work.rounds([build(runs, shape) for runs in fleet])), blocks)
    return {"blocks": blocks, "messages": len(prepared["stored"][0])}


def prepare_pools(lengths: list[int]) -> int:
    """Build the message "warm": the workers hold the warm prompts of these lengths."""
    workers, shape = len(sockets), work.Shape(256)
    held = [
        [run for length in lengths for run in work.pool(length).held_by(worker, workers)] for worker in range(workers)
    ]
    blocks = sum(len(run.names) for runs in held for run in runs)
    prepared["warm"] = (list(work.rounds([work.stored_messages(runs, shape) for runs in held])), blocks)
    return blocks


def publish(name: str, per_second: float = 0, seconds: float = 0) -> dict[str, float]:
    """Send prepared messages.

    Args:
        name: Which.
        per_second: How many in a second; 0 for as many as the sockets take.
        seconds: Stop after this time; 0 for not before the last message.

    Returns:
        What was sent: `messages`, and `blocks` when it was all.
    """
    messages, blocks = prepared[name]
    started, sent = time.perf_counter(), 0
    for worker, payload in messages:
        if per_second:
            elapsed = time.perf_counter() - started
            if seconds and elapsed >= seconds:
                break
            ahead = sent / per_second - elapsed
            if ahead > 0.001:
                time.sleep(ahead)
        sockets[worker].send_multipart([b"kv-events", struct.pack(">Q", sequence[worker]), payload])
        sequence[worker] += 1
        sent += 1
    return {"blocks": blocks, "messages": sent}


def storm(seconds: float) -> int:
    """Send what is stored and removed over and over, as fast as the sockets take it; how many messages.

    From now on this process yields to all others: what is asked is how late answers are in a router that is flooded,
    not how long the asking client waits for a CPU that the flood's maker keeps.
    """
    for thread in Path("/proc/self/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
    ends, sent = time.perf_counter() + seconds, 0
    while (left := ends - time.perf_counter()) > 0:
        for name in ("stored", "removed"):
            sent += int(publish(name, per_second=sys.maxsize, seconds=left)["messages"])
    return sent


if __name__ == "__main__":
    serve([open_workers, await_listeners, prepare_fleet, prepare_pools, publish, storm], uvloop.run)
