"""Side: snapshots of our own index, in process."""

import asyncio
import itertools
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench import work
from bench.endpoint import ENDPOINT, Endpoint
from bench.side import serve
from kvrouter_grpc.routing.snapshot import Snapshot
from kvrouter_grpc.routing.stream import StreamPosition
from kvrouter_grpc.snapshots import source
from kvrouter_grpc.snapshots.disk import SnapshotDirectory

EVERY_S = 0.001
state: dict[str, Endpoint] = {}
requests: list[bytes] = []


def prepare(workers: int, blocks_each: int, length: int) -> dict[str, float]:
    """Build the index."""
    endpoint = state["endpoint"] = Endpoint(workers)
    held = endpoint.load(blocks_each, [length])
    for target in endpoint.targets:
        endpoint.router.index.stream(target).position = lambda: StreamPosition(1, 0)
    requests[:] = [endpoint.request(prompt) for prompt in work.pool(length).queries]
    return held


async def round_trip() -> dict[str, float]:
    """Write the snapshot and read it into another index."""
    endpoint = state["endpoint"]
    with tempfile.TemporaryDirectory() as path:
        directory = SnapshotDirectory(Path(path))
        started = time.perf_counter()
        size = await directory.write(ENDPOINT, source.pieces(endpoint.router))
        written = time.perf_counter()
        data = await directory.read(ENDPOINT)
    if data is None:
        raise AssertionError("nothing was written")
    stalls = [stall async for stall in _stalls(endpoint)]
    empty = Endpoint(len(endpoint.targets))
    reading = time.perf_counter()
    snapshot = Snapshot.read(data, ENDPOINT)
    for target in empty.targets:
        snapshot.restore(empty.router.index, target, None)
    read = time.perf_counter()
    if empty.blocks() != endpoint.blocks():
        raise AssertionError(f"{empty.blocks()} of {endpoint.blocks()} blocks came back")
    return {
        "bytes_per_block": size / endpoint.blocks(),
        "mib": size / (1 << 20),
        "write_ms": (written - started) * 1000,
        "read_ms": (read - reading) * 1000,
        "stall_ms": max(stalls) * 1000,
    }


async def _stalls(endpoint: Endpoint) -> AsyncIterator[float]:
    """Seconds of CPU for which each piece of a snapshot holds the event loop."""
    pieces = source.pieces(endpoint.router)
    while True:
        started = time.thread_time()
        try:
            await anext(pieces)
        except StopAsyncIteration:
            return
        yield time.thread_time() - started


async def decide_while(*, writing: bool, seconds: float) -> dict[str, float]:
    """Decide once a millisecond, and write snapshots or not."""
    endpoint = state["endpoint"]
    with tempfile.TemporaryDirectory() as path:
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(_write_on(SnapshotDirectory(Path(path)))) if writing else None
            delays = []
            due = time.perf_counter()
            for request in itertools.islice(itertools.cycle(requests), int(seconds / EVERY_S)):
                due += EVERY_S
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                endpoint.decide(request)
                delays.append(time.perf_counter() - due)
            if writer is not None:
                writer.cancel()
    delays.sort()
    return {f"p{part}_ms": delays[len(delays) * part // 100] * 1000 for part in (50, 99)}


async def _write_on(directory: SnapshotDirectory) -> None:
    while True:
        await directory.write(ENDPOINT, source.pieces(state["endpoint"].router))


if __name__ == "__main__":
    serve([prepare, round_trip, decide_while])
