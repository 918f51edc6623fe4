"""A small publisher that can lose, stall, restart and speak old dialects, and a subscriber that follows it."""

import asyncio
import random
from collections.abc import Callable

import msgspec
import pytest
import zmq
import zmq.asyncio

from kvrouter_grpc.config import EventsConfig
from kvrouter_grpc.core import KvFeed
from kvrouter_grpc.events.rota import Rota
from kvrouter_grpc.events.subscriber import EventSource, Subscriber
from kvrouter_grpc.routing.stream import StreamStatus
from kvrouter_grpc.types import StreamState, Target

TARGET = Target(7, 0)
END = b"\xff" * 8


def stored(number: int) -> dict:
    """One block whose size is its batch's number and one, so that what was applied can be read off."""
    return {
        "type": "BlockStored",
        "block_hashes": [number + 1],
        "parent_block_hash": number or None,
        "token_ids": [number] * (number + 1),
        "block_size": number + 1,
        "medium": "GPU",
    }


class Publisher:
    """PUB and replay ROUTER of one engine process, as vLLM's publisher thread drives them.

    Attributes:
        deaf: The replay socket is read but never answered.
        topic_in_replay: False speaks the three-frame replies of vLLM up to 0.25.
        hole: Numbers left out of the next answer.
    """

    def __init__(self, context: zmq.asyncio.Context, *, ring: int = 10_000, events: str = "", replay: str = "") -> None:
        self.ring = ring
        self.deaf = False
        self.topic_in_replay = True
        self.hole: set[int] = set()
        self.asked: list[int] = []
        self.sent: list[bytes] = []
        self.pub = context.socket(zmq.PUB)
        self.router = context.socket(zmq.ROUTER)
        for socket, address in ((self.pub, events), (self.router, replay)):
            socket.linger = 0
            socket.sndhwm = 100_000
            try:
                socket.bind(address or "tcp://127.0.0.1:*")
            except zmq.ZMQError:
                self.close()
                raise
        self.events = self.pub.last_endpoint.decode()
        self.replay = self.router.last_endpoint.decode()

    async def publish(
        self,
        *,
        lost: bool = False,
        payload: bytes | None = None,
        events: list | None = None,
        topic: bytes = b"kv-events",
    ) -> None:
        seq = len(self.sent)
        good = msgspec.msgpack.encode([1.0 + seq, events if events is not None else [stored(seq)], 0])
        self.sent.append(good)
        if not lost:
            await self.pub.send_multipart([topic, seq.to_bytes(8), payload if payload is not None else good])

    async def serve_replays(self) -> None:
        while True:
            peer, _, start = await self.router.recv_multipart()
            self.asked.append(int.from_bytes(start))
            if self.deaf:
                continue
            topic = [b"kv-events"] if self.topic_in_replay else []
            hole, self.hole = self.hole, set()
            first = max(self.asked[-1], len(self.sent) - self.ring)
            for seq in range(first, len(self.sent)):
                if seq not in hole:
                    await self.router.send_multipart([peer, b"", *topic, seq.to_bytes(8), self.sent[seq]])
            await self.router.send_multipart([peer, b"", *([b""] if topic else []), END, b""])

    def close(self) -> None:
        self.pub.close()
        self.router.close()


class Sink:
    """Remembers the number of every batch applied since the last clear."""

    def __init__(self) -> None:
        self.status = StreamStatus()
        self.numbers: list[int] = []
        self.clears = 0
        self.emptied = 0
        self.applied = KvFeed(self.note, lambda *_: 0, lambda _: None)  # asks of every block size, for nobody wants any

    def note(self, block_size: int, _several_groups: bool) -> None:
        self.numbers.append(block_size - 1)

    def feed(self, target: Target) -> KvFeed:
        assert target == TARGET
        return self.applied

    def cleared(self, target: Target) -> None:
        assert target == TARGET
        self.emptied += 1

    def clear(self, target: Target) -> None:
        assert target == TARGET
        self.numbers.clear()
        self.clears += 1

    def stream(self, target: Target) -> StreamStatus:
        return self.status

    def doubt(self, target: Target) -> None:
        pass

    def renewed(self, target: Target) -> bool:
        return False

    def refresh(self, target: Target) -> None:
        assert target == TARGET


class Bench:
    """A subscriber under test and its publisher, which may be replaced by a new process on the same ports."""

    def __init__(self, context: zmq.asyncio.Context, group: asyncio.TaskGroup) -> None:
        self.context = context
        self.group = group
        self.sink = Sink()
        self.disconnects = 0
        self.rota = Rota()
        self.publisher: Publisher
        self.tasks: list[asyncio.Task] = [group.create_task(self.rota.run())]
        self.replaying: asyncio.Task

    def start_publisher(self, **kwargs) -> Publisher:
        self.publisher = Publisher(self.context, **kwargs)
        self.replaying = self.group.create_task(self.publisher.serve_replays())
        return self.publisher

    async def kill_publisher(self) -> None:
        self.replaying.cancel()
        await asyncio.wait([self.replaying])
        self.publisher.close()

    async def restart_publisher(self) -> Publisher:
        old = self.publisher
        await self.kill_publisher()
        for _ in range(100):  # the ports are free a moment after the close
            try:
                return self.start_publisher(ring=old.ring, events=old.events, replay=old.replay)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE:
                    raise
                await asyncio.sleep(0.02)
        raise AssertionError("the port did not become free")

    def subscribe(self, *, replay: bool = True, topic: str = "", **config) -> Subscriber:
        source = EventSource(self.publisher.events, self.publisher.replay if replay else None, topic)
        self.subscriber = Subscriber(
            TARGET,
            source,
            self.sink,
            EventsConfig(**{"replay_timeout_s": 0.3, "reconnect_ms": 20, "reconnect_max_ms": 50, **config}),
            self.context,
            rota=self.rota,
            on_disconnect=self.count_disconnect,
            rng=random.Random(1),
        )
        self.tasks.append(self.group.create_task(self.subscriber.run()))
        return self.subscriber

    def count_disconnect(self) -> None:
        self.disconnects += 1

    async def until(self, condition: Callable[[], bool], seconds: float = 15.0) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not condition():  # noqa: ASYNC110 - conditions are about the state of others
                    await asyncio.sleep(0.005)
        except TimeoutError:
            pytest.fail(
                f"not reached: {self.sink.status} numbers={self.sink.numbers[-20:]} asked={self.publisher.asked}"
            )

    async def until_exact(self) -> None:
        """Everything the current process published is applied, in order and once, and the stream says so."""
        everything = lambda: list(range(len(self.publisher.sent)))  # noqa: E731
        await self.until(lambda: self.sink.numbers == everything() and self.sink.status.state is StreamState.LIVE)
        assert not self.sink.status.partial
