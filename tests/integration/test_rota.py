"""Streams that always have more to do share a real event loop with somebody who needs it."""

import asyncio
import math
import os
import time
from collections.abc import Callable, Coroutine

import uvloop

from kvrouter_grpc.events.pacer import OTHERS_S, PAUSE_S
from kvrouter_grpc.events.rota import Rota


class Storm:
    """A stream that is never finished."""

    def __init__(self) -> None:
        self.slices = 0

    def work(self, _: float, ends_at: float) -> bool:
        while time.perf_counter() < ends_at:
            pass
        self.slices += 1
        return True

    def due(self) -> float:
        return math.inf


class Quiet:
    """A stream that notes when it was called, and has nothing more to do until its alarm."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = math.inf
        self.called = asyncio.Event()

    def work(self, now: float, _: float) -> bool:
        self.calls += 1
        self.called.set()
        if now >= self.at:
            self.at = math.inf
        return False

    def due(self) -> float:
        return self.at

    async def next_call(self) -> None:
        self.called.clear()
        async with asyncio.timeout(10):
            await self.called.wait()


def amid(rota: Rota, scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(rota.run())
            await scenario()
            task.cancel()

    uvloop.run(run())


async def call(turns: int) -> None:
    """Somebody who works a little in each of some turns of the loop, as a gRPC call does."""
    for _ in range(turns):
        ends = time.thread_time() + 2 * OTHERS_S
        while time.thread_time() < ends:
            pass
        await asyncio.sleep(0)


def test_a_call_amid_a_storm_waits_for_few_slices() -> None:
    rota, storms = Rota(), [Storm() for _ in range(8)]

    async def scenario() -> None:
        for storm in storms:
            rota.join(storm)
        for _ in range(50):
            async with asyncio.timeout(10):
                before = sum(storm.slices for storm in storms)
                while sum(storm.slices for storm in storms) < before + 20:  # noqa: ASYNC110 - slices are no event
                    await asyncio.sleep(0)
            before, began = sum(storm.slices for storm in storms), time.perf_counter()
            await call(turns=10)
            slices = sum(storm.slices for storm in storms) - before
            # One may be under way or just about to begin; then there is one per pause, however slow the machine is.
            assert slices <= 2 + (time.perf_counter() - began) / PAUSE_S

    amid(rota, scenario)


def test_a_storm_amid_calls_is_worked_off() -> None:
    rota, storms = Rota(), [Storm() for _ in range(8)]

    async def scenario() -> None:
        for storm in storms:
            rota.join(storm)
        async with asyncio.timeout(10):
            while min(storm.slices for storm in storms) < 5:
                await call(turns=10)

    amid(rota, scenario)


def test_descriptors_and_alarms_call() -> None:
    reading, writing = os.pipe()
    rota = Rota()

    async def scenario() -> None:
        stream = Quiet()
        place = rota.join(stream)
        await stream.next_call()
        place.watch(reading)
        os.write(writing, b"x")
        await stream.next_call()
        calls = stream.calls
        await asyncio.sleep(0.01)
        assert stream.calls == calls, "a descriptor that stays readable is told once"
        os.write(writing, b"x")
        await stream.next_call()
        stream.at = asyncio.get_running_loop().time() + 0.02
        place.call()
        while stream.at != math.inf:
            await stream.next_call()
        os.write(writing, b"x")
        place.call()
        place.leave()
        calls = stream.calls
        place.call()
        await asyncio.sleep(0.01)
        assert stream.calls == calls, "who has left is not called"

    amid(rota, scenario)
    os.close(reading)
    os.close(writing)
