"""A bad network between an engine's event sockets and the router: loses, doubles, reorders, delays and damages messages.

The router connects to the proxy as it would to the engine. Damage that is well-formed again is left out: the protocol has
no checksum, so nothing tells such a batch from the engine's own word, and only the closed loop can find it.
"""

import heapq
import itertools
import math
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq

Frames = list[bytes]

REORDER_S = 0.05
"""Longest time by which a message falls behind its successors."""

STALL_S = 0.3
"""Longest time for which the line stands still; what came meanwhile then comes at once."""

ECHO_S = 0.2
"""Longest time after which a message comes a second time."""

NEVER_USED = b"\xc1"
"""The one byte that no MessagePack begins with."""

TURN = 256
"""Messages read from one socket before the others have their turn."""

POLL_MS = 100


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to a message: the chance of each fault, and how often it is sent. The default is a good network."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    truncate: float = 0.0
    corrupt: float = 0.0
    copies: int = 1  # of each, at once: a storm


CALM = Faults()


class Line:
    """One direction of a connection: messages in, what is left of them out, by a clock that the caller has."""

    def __init__(self, rng: random.Random) -> None:
        self.faults = CALM
        self.done: Counter[str] = Counter()  # faults by name
        self._rng = rng
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Frames]] = []  # a heap: when to send, in which order
        self._stands_until = 0.0

    def take(self, message: Frames, now: float) -> None:
        """A message enters."""
        if self._hits("drop"):
            return
        if self._hits("truncate"):
            message = self._truncated(message)
        if self._hits("corrupt"):
            message = self._corrupted(message)
        if self._hits("delay"):
            self._stands_until = max(self._stands_until, now + self._rng.uniform(0.0, STALL_S))
        at = max(now, self._stands_until)
        if self._hits("duplicate"):
            self._put(at + self._rng.uniform(0.0, ECHO_S), message)
        if self._hits("reorder"):
            at += self._rng.uniform(0.0, REORDER_S)
        for _ in range(self.faults.copies):
            self._put(at, message)

    def due(self, now: float) -> list[Frames]:
        """Messages that leave now."""
        leaving = []
        while self._queue and self._queue[0][0] <= now:
            leaving.append(heapq.heappop(self._queue)[2])
        return leaving

    def next_at(self) -> float | None:
        """When the next message leaves."""
        return self._queue[0][0] if self._queue else None

    def clear(self) -> None:
        """Lose everything on the way."""
        self._queue.clear()
        self._stands_until = 0.0

    def _put(self, at: float, message: Frames) -> None:
        heapq.heappush(self._queue, (at, next(self._order), message))

    def _hits(self, fault: str) -> bool:
        chance: float = getattr(self.faults, fault)
        if not chance:
            return False
        hit = self._rng.random() < chance
        self.done[fault] += hit
        return hit

    def _truncated(self, message: Frames) -> Frames:
        """The last frame cut somewhere, or gone."""
        if self._rng.random() < 0.2:
            return message[:-1]
        return [*message[:-1], message[-1][: self._rng.randrange(max(len(message[-1]), 1))]]

    def _corrupted(self, message: Frames) -> Frames:
        """A payload that cannot be read any more, from some byte on."""
        at = self._rng.randrange(max(len(message[-1]), 1))
        return [*message[:-1], message[-1][:at] + NEVER_USED * (len(message[-1]) - at)]


class FaultProxy:
    """Between one rank's PUB and replay sockets and whoever follows it. Works in a thread of its own.

    Args:
        events: The engine's PUB endpoint.
        replay: Its replay endpoint.
        seed: Of the faults; the same messages meet the same ones.

    Attributes:
        events: What the router subscribes to.
        replay: Where it asks for replays.
        asked_at: Monotonic seconds of every replay request.
        live: Faults on the way of live batches; those of replay answers are in `answers`.
    """

    def __init__(self, events: str, replay: str, seed: int = 0) -> None:
        self.asked_at: list[float] = []
        self.live = Line(random.Random(f"{seed} live"))
        self.answers = Line(random.Random(f"{seed} answers"))
        self._upstream = events, replay
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._pub, self._router = self._open(zmq.PUB), self._open(zmq.ROUTER)
        self.events, self.replay = (_bound(socket, "tcp://127.0.0.1:*") for socket in (self._pub, self._router))
        self._poller.register(self._router, zmq.POLLIN)
        self._sub = self._open(zmq.SUB)
        self._sub.subscribe(b"")
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}  # by the identity of who asks
        self._cut = self._wants_cut = self._ends = False
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)

    def __enter__(self) -> Self:
        self._sub.connect(self._upstream[0])
        self._poller.register(self._sub, zmq.POLLIN)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ends = True
        self._thread.join()
        self._context.destroy(linger=0)

    def disturb(self, live: Faults, answers: Faults | None = None) -> None:
        """From now on these faults happen; `answers` are as good or bad as `live` when not given."""
        self.live.faults = live
        self.answers.faults = live if answers is None else answers

    def calm(self) -> None:
        """No more faults."""
        self.disturb(CALM)

    def replays_beyond_pace(self) -> float:
        """By how many the replays asked for in any span of time exceed one a second; 1 when each waited its second.

        A request that waits for its connection comes close before the next one: up to 2.
        """
        most = ahead = 0.0
        previous = -math.inf
        for at in self.asked_at:
            ahead = max(0.0, ahead - (at - previous)) + 1.0
            most = max(most, ahead)
            previous = at
        return most

    def cut(self) -> None:
        """Close both ports, as if the host were unreachable; the engine goes on. Returns when it is done."""
        self._want(cut=True)

    def restore(self) -> None:
        """Listen again at the same ports; what the engine has said meanwhile is not told."""
        self._want(cut=False)

    # --- in its thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ends:
            if self._wants_cut != self._cut:
                self._switch()
            now = time.monotonic()
            due = [at for line in (self.live, self.answers) if (at := line.next_at()) is not None]
            wait_ms = min([POLL_MS, *(max(0.0, at - now) * 1000 for at in due)])
            readable = dict(self._poller.poll(wait_ms))
            now = time.monotonic()
            for socket in readable:
                self._read(socket, now)
            for message in self.live.due(now):
                self._send(self._pub, message)
            for message in self.answers.due(now):
                self._send(self._router, message)

    def _read(self, socket: zmq.Socket[bytes], now: float) -> None:
        for _ in range(TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if socket is self._sub:
                if not self._cut:
                    self.live.take(frames, now)
            elif socket is self._router:
                self._ask(frames, now)
            else:
                client = next(client for client, dealer in self._dealers.items() if dealer is socket)
                self._answer(client, frames, now)

    def _ask(self, frames: Frames, now: float) -> None:
        client, *request = frames
        if client not in self._dealers:
            self._dealers[client] = dealer = self._open(zmq.DEALER)
            dealer.connect(self._upstream[1])
            self._poller.register(dealer, zmq.POLLIN)
        self.asked_at.append(now)
        self._dealers[client].send_multipart(request)

    def _answer(self, client: bytes, frames: Frames, now: float) -> None:
        # The identity in front is the router's own; faults happen to what it receives.
        self.answers.take([client, *frames], now)

    def _send(self, socket: zmq.Socket[bytes], message: Frames) -> None:
        if self._cut or (socket is self._router and len(message) < 2):
            return
        try:
            socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            self.live.done["overflow"] += 1

    def _switch(self) -> None:
        if self._wants_cut:
            self._cut = True
            for socket in (self._pub, self._router, *self._dealers.values()):
                if socket in self._poller:
                    self._poller.unregister(socket)
                socket.close(linger=0)
            self._dealers.clear()
            self.live.clear()
            self.answers.clear()
        else:
            self._pub, self._router = self._open(zmq.PUB), self._open(zmq.ROUTER)
            _bound(self._pub, self.events)
            _bound(self._router, self.replay)
            self._poller.register(self._router, zmq.POLLIN)
            self._cut = False
        self._settled.set()

    def _want(self, *, cut: bool) -> None:
        if self._wants_cut != cut:
            self._settled.clear()
            self._wants_cut = cut
            assert self._settled.wait(5.0), "the fault proxy does not work any more"

    def _open(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0  # what is lost is lost on purpose
        return socket


def _bound(socket: zmq.Socket[bytes], endpoint: str) -> str:
    deadline = time.monotonic() + 5.0
    while True:
        try:
            socket.bind(endpoint)
            break
        except zmq.ZMQError:  # a port that was just closed
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    return socket.last_endpoint.rstrip(b"\0").decode()
