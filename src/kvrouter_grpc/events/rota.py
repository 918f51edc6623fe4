"""Lets the event streams of a process take turns on the event loop, a slice at a time."""

import asyncio
import math
import select
import time
from collections import deque
from typing import Protocol

from kvrouter_grpc.events.pacer import Pacer

TURNS = 2
"""Turns of the event loop between two slices: in the first what arrived meanwhile is read, in the second it works."""


class Stream(Protocol):
    """What takes turns."""

    def work(self, now: float, ends_at: float) -> bool:
        """Do what there is to do until `ends_at`, a time of `time.perf_counter`; whether there is more.

        Args:
            now: Time of the event loop.
            ends_at: When to stop, once something was done.
        """

    def due(self) -> float:
        """Time of the event loop at which there will be something to do even without news; `math.inf` for never."""


class Place:
    """The place of one stream in the rota, as `Rota.join` gave it."""

    def __init__(self, rota: "Rota", stream: Stream) -> None:
        self.stream = stream
        self.waiting = False  # in the queue
        self._rota = rota
        self._alarm: asyncio.TimerHandle | None = None
        self._descriptors: set[int] = set()

    def call(self) -> None:
        """There is something to do."""
        self._rota.call(self)

    def watch(self, descriptor: int) -> None:
        """Call when this descriptor turns readable. Of one that stays readable nothing more is heard."""
        self._descriptors.add(descriptor)
        self._rota.watch(descriptor, self)

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor, before it is closed."""
        self._descriptors.discard(descriptor)
        self._rota.unwatch(descriptor)

    def work(self, now: float, ends_at: float) -> bool:
        """Let the stream work; whether there is more to do."""
        if self.stream.work(now, ends_at):
            return True
        self._set_alarm(self.stream.due())
        return False

    def leave(self) -> None:
        """Take part no longer."""
        for descriptor in list(self._descriptors):
            self.unwatch(descriptor)
        if self._alarm is not None:
            self._alarm.cancel()
        self._rota.leave(self)

    def _set_alarm(self, due: float) -> None:
        # An alarm that comes too early does no harm, and most are put off again and again: the one set stays.
        if self._alarm is not None and self._alarm.when() <= due:
            return
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if not math.isinf(due):
            self._alarm = asyncio.get_running_loop().call_at(due, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self.call()


class Rota:
    """Streams that share an event loop. `run()` lasts until it is cancelled.

    Everybody who has something to do gets one turn per round; who is called meanwhile, or has more than fits into a
    slice, is in the next. So a stream gathers what comes for a round, instead of being looked at for each message.

    All descriptors are in one edge-triggered epoll, which alone the event loop watches: it is told once of a socket
    with news, and not again in every turn until somebody has read it.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Place] = {}  # by descriptor
        self._round: deque[Place] = deque()  # who is still to come
        self._next: deque[Place] = deque()  # who is in the next round
        self._more = False  # one of those has more to do than it had time for
        self._called = asyncio.Event()
        self._pacer = Pacer()
        self._own_cpu = 0.0  # spent outside slices

    def join(self, stream: Stream) -> Place:
        """Let a stream take part; it is called at once."""
        place = Place(self, stream)
        self.call(place)
        return place

    async def run(self) -> None:
        """Let the streams work until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._epoll.fileno(), self._hear)
        try:
            while True:
                if not self._round and not self._next:
                    self._called.clear()
                    await self._called.wait()
                length = self._pacer.slice(time.perf_counter(), self._others_cpu())
                if not length:
                    await asyncio.sleep(self._pacer.pause(time.perf_counter()))
                    continue
                self._work(loop.time(), time.perf_counter() + length)
                self._pacer.worked(time.perf_counter(), self._others_cpu(), more=bool(self._round) or self._more)
                for _ in range(TURNS):
                    await asyncio.sleep(0)
        finally:
            loop.remove_reader(self._epoll.fileno())

    def _work(self, now: float, ends_at: float) -> None:
        if not self._round:
            self._round, self._next = self._next, self._round
            self._more = False
        while self._round and time.perf_counter() < ends_at:
            place = self._round.popleft()
            place.waiting = False
            if place.work(now, ends_at):
                self.call(place)
                self._more = True

    def _hear(self) -> None:
        """Call the streams whose descriptors have news."""
        started = time.thread_time()
        for descriptor, _ in self._epoll.poll(0):
            if descriptor in self._watched:
                self.call(self._watched[descriptor])
        self._own_cpu += time.thread_time() - started

    def _others_cpu(self) -> float:
        return time.thread_time() - self._own_cpu

    # --- what a `Place` asks for -----------------------------------------------------------------------------------

    def call(self, place: Place) -> None:
        """Let a stream take part in the next round, unless it waits for its turn already."""
        if not place.waiting:
            place.waiting = True
            self._next.append(place)
            self._called.set()

    def watch(self, descriptor: int, place: Place) -> None:
        """Call a stream when a descriptor turns readable."""
        self._watched[descriptor] = place
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor."""
        del self._watched[descriptor]
        self._epoll.unregister(descriptor)

    def leave(self, place: Place) -> None:
        """Forget a stream."""
        if place.waiting:
            queue = self._round if place in self._round else self._next
            queue.remove(place)
        place.waiting = True  # whoever calls it now is not heard
