"""Follows one rank's KV event stream: bytes from two sockets in, batches in order out to the index."""

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
import zmq
from zmq.utils.monitor import parse_monitor_message

from kvrouter_grpc.config import EventsConfig
from kvrouter_grpc.events.codec import CodecError, CodecLimits, decode_batch
from kvrouter_grpc.events.sequence import StreamTracker, Verdict
from kvrouter_grpc.routing.stream import StreamStatus
from kvrouter_grpc.types import CacheCleared, KvBatch, StreamState, Target

SLICE_S = 0.001
"""Longest stretch of work before other tasks get the event loop: a storm of events must not delay a decision."""

CHUNK = 16
"""Messages taken from a socket at once, so that live and replayed ones advance together."""

REOPEN_S = 1.0
"""Least time without a connection after which the socket is replaced: ZeroMQ itself never reconnects after a peer broke
the protocol or sent a message over the limit."""

REPLAY_INTERVAL_S = 1.0
"""Shortest time between two replay requests: an answer costs the engine's publisher thread up to its whole ring."""

REPLAY_TOTAL_TIMEOUTS = 12
"""Replay timeouts after which even an answer that still drips counts as failed."""

AUDIT_S = 2.0
AUDIT_MAX_S = 60.0
"""Quiet time before the first look for a lost last batch, and the longest between two looks. The wait doubles."""

HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000
"""Silence after which a connection counts as dead: a host that vanished sends no FIN."""

END = b"\xff" * 8
"""Sequence number -1: the end of a replay."""

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED

log = structlog.get_logger(__name__)


class KvSink(Protocol):
    """Where batches go: the index of an endpoint."""

    def apply(self, target: Target, batch: KvBatch) -> None:
        """Apply one batch of the target's stream; they come in order."""

    def clear(self, target: Target) -> None:
        """Forget what the target holds."""

    def stream(self, target: Target) -> StreamStatus:
        """The target's status, which the subscriber keeps true."""


@dataclass(frozen=True, slots=True)
class EventSource:
    """Where one rank publishes.

    Attributes:
        events: `tcp://host:port` (or `ipc://path`) of its PUB socket.
        replay: The same of its replay ROUTER, None when it has none.
        topic: Prefix of the topics to receive, "" for all. Identity is the connection, never the topic.
    """

    events: str
    replay: str | None
    topic: str = ""


class Subscriber:
    """Follows the stream of one (worker, rank). `run()` lasts until it is cancelled.

    Args:
        target: Whose stream it is.
        source: Where to connect.
        index: Gets the batches.
        config: Limits and timeouts.
        context: ZMQ context, shared by all subscribers.
        on_disconnect: Called when the live connection is lost: the worker may be dead.
        rng: Jitter of the back-off.
        turn: Shared by subscribers of one event loop; only one of them works in one turn of the loop.
    """

    def __init__(
        self,
        target: Target,
        source: EventSource,
        index: KvSink,
        config: EventsConfig,
        context: zmq.Context[Any],
        *,
        on_disconnect: Callable[[], None] | None = None,
        rng: random.Random,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self._target = target
        self._source = source
        self._index = index
        self._config = config
        # A plain context on the same sockets and threads: draining a socket costs no future per message then.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
        self._on_disconnect = on_disconnect
        self._rng = rng
        self._turn = turn or asyncio.Lock()
        self._limits = CodecLimits(max_payload_bytes=config.max_message_bytes)
        self._tracker = StreamTracker(
            can_replay=source.replay is not None,
            max_held=config.max_pending_batches,
            max_held_bytes=config.max_message_bytes,
            max_attempts=config.stale_after_replays,
        )
        self._status = StreamStatus()
        self._wake = asyncio.Event()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._restart_reported = False
        self._fault = ""  # why nothing can be heard, "" when something can
        self._unreadable = ""  # what was wrong with the last unreadable message
        self._ask_after = 0.0
        self._asked_at = 0.0
        self._answered_at = 0.0
        self._unfinished = False  # an answer may still be on its way
        self._failures = 0  # replays in a row that timed out
        self._audit_gap = AUDIT_S
        self._audit_at = math.inf
        self._reopen_s = max(REOPEN_S, 2 * config.reconnect_max_ms / 1000)
        self._reopen_at = math.inf

    def notify_restarted(self) -> None:
        """The worker's process is known to be a new one, e.g. by its start time."""
        self._restart_reported = True
        self._wake.set()

    async def run(self) -> None:
        """Follow the stream until cancelled."""
        self._status = self._index.stream(self._target)
        loop = asyncio.get_running_loop()
        try:
            if not self._open_live():
                self._fault = f"{self._source.events} is no address of KV events: write events=tcp://host:port"
                self._report()
                await asyncio.Event().wait()  # nothing will ever be heard there
            if self._source.replay is not None:
                self._audit_at = loop.time() + AUDIT_S
            while True:
                async with self._turn:
                    self._wake.clear()
                    busy = self._step(loop.time())
                    if busy:
                        await asyncio.sleep(0)  # with the turn in hand: one slice of one subscriber per loop turn
                if not busy:
                    await self._idle()
        finally:
            for name in tuple(self._sockets):
                self._close(name)

    async def _idle(self) -> None:
        """Wait for bytes or for the next thing to do."""
        due = self._due()
        try:
            async with asyncio.timeout_at(None if math.isinf(due) else due):
                await self._wake.wait()
        except TimeoutError:
            pass

    # --- one slice of work ----------------------------------------------------------------------------------------

    def _step(self, now: float) -> bool:
        """Work off what has arrived and do what is due.

        Returns:
            Whether there may be more to do at once. False promises that every socket was empty when last looked at:
            their descriptors signal new arrivals only.
        """
        ends_at = time.perf_counter() + SLICE_S
        drained = False
        while not drained and time.perf_counter() < ends_at:
            live = self._receive("live")
            replayed = self._receive("replay")
            # The monitor speaks of a handshake before its first message can arrive, so what it says comes first.
            self._watch()
            for message in live:
                self._on_live(message, now)
            for message in replayed:
                if self._tracker.replaying:
                    self._on_replayed(message, now)
            drained = len(live) < CHUNK and len(replayed) < CHUNK
        if drained and self._restart_reported:
            self._restart_reported = False
            self._follow(self._tracker.restarted())
        if drained and now >= self._reopen_at:
            self._close("monitor")
            self._close("live")
            self._open_live()
        asked = self._pace(now)
        self._report()
        return asked or not drained

    def _receive(self, name: str) -> list[list[bytes]]:
        socket = self._sockets.get(name)
        messages: list[list[bytes]] = []
        if socket is not None:
            try:
                while len(messages) < CHUNK:
                    messages.append(socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                pass
        return messages

    def _watch(self) -> None:
        """Hear what the monitor of the live connection says."""
        monitor = self._sockets["monitor"]
        while True:
            try:
                event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._fault = ""
                self._reopen_at = math.inf
                self._tracker.connected()
                self._audit_gap = AUDIT_S
            elif event == zmq.EVENT_DISCONNECTED:
                self._reopen_at = asyncio.get_running_loop().time() + self._reopen_s
                self._tracker.disconnected()
                if self._on_disconnect is not None:
                    self._on_disconnect()
            elif event & _HANDSHAKE_FAILED:
                self._fault = f"{self._source.events} does not speak ZeroMQ: is it the port of the KV events?"

    def _on_live(self, message: list[bytes], now: float) -> None:
        if len(message) != 3 or len(message[1]) != 8 or len(message[2]) > self._config.max_message_bytes:
            self._status.decode_failures += 1
            self._unreadable = "not the three frames [topic, sequence number, payload]"
            return
        self._status.last_event_at = time.monotonic()
        self._follow(self._tracker.live(int.from_bytes(message[1]), message[2]))
        if self._source.replay is not None and not self._tracker.repairable:
            self._audit_gap = AUDIT_S
            self._audit_at = now + AUDIT_S

    def _on_replayed(self, message: list[bytes], now: float) -> None:
        # [b"", topic, sequence number, payload]; vLLM up to 0.25 sends no topic.
        if len(message) not in (3, 4) or len(message[-2]) != 8:
            self._status.decode_failures += 1
            self._unreadable = "not the frames of a replay"
            return
        self._answered_at = now
        if message[-2] != END:
            self._follow(self._tracker.replayed(int.from_bytes(message[-2]), message[-1]))
            return
        self._failures = 0
        self._unfinished = False
        self._follow(self._tracker.replay_ended())

    def _follow(self, verdict: Verdict) -> None:
        """Do what an input of the tracker led to."""
        if verdict is Verdict.RESTART:
            log.info("stream starts over", worker_id=self._target.worker_id, dp_rank=self._target.dp_rank)
            self._index.clear(self._target)
        while (taken := self._tracker.take()) is not None:
            try:
                batch = decode_batch(taken[1], self._limits)
            except CodecError as error:
                self._status.decode_failures += 1
                self._unreadable = str(error)
                self._tracker.unreadable()
                continue
            self._index.apply(self._target, batch)
            self._status.batches += 1
            self._status.skipped += batch.skipped
            if any(isinstance(event, CacheCleared) for event in batch.events):
                self._tracker.cleared()

    # --- replays and audits ---------------------------------------------------------------------------------------

    def _pace(self, now: float) -> bool:
        """Give up an answer that is overdue, ask when it is time to; whether a request was sent."""
        tracker = self._tracker
        if tracker.replaying and now >= self._reply_due():
            tracker.replay_failed()
            self._follow(Verdict.APPLY)
            self._failures += 1
            backoff = min(
                self._config.replay_backoff_s * 2 ** min(self._failures, 16), self._config.replay_backoff_max_s
            )
            self._ask_after = max(self._ask_after, now + backoff * self._rng.uniform(0.5, 1.0))
        if self._unfinished and not tracker.replaying:
            # Late messages of an answer that was given up would pass for the next one's.
            self._close("replay")
            self._unfinished = False
        if now >= self._audit_at:
            tracker.audit()
            self._audit_gap = min(2 * self._audit_gap, AUDIT_MAX_S)
            self._audit_at = now + self._audit_gap
        if not tracker.wants_replay or now < self._ask_after:
            return False
        return self._ask(now)

    def _ask(self, now: float) -> bool:
        start = self._tracker.replay_asked()
        self._status.replays += 1
        self._asked_at = self._answered_at = now
        self._ask_after = now + REPLAY_INTERVAL_S
        self._unfinished = True
        try:
            self._open_replay().send_multipart([b"", start.to_bytes(8)], zmq.NOBLOCK)
        except zmq.ZMQError:
            # An address that cannot be connected to, or no room to send: the timeout counts it as a failure.
            return False
        return True

    def _reply_due(self) -> float:
        timeout = self._config.replay_timeout_s
        return min(self._answered_at + timeout, self._asked_at + REPLAY_TOTAL_TIMEOUTS * timeout)

    def _due(self) -> float:
        """When there is something to do without any message."""
        if self._tracker.replaying:
            return min(self._reopen_at, self._audit_at, self._reply_due())
        asks_at = self._ask_after if self._tracker.wants_replay else math.inf
        return min(self._reopen_at, self._audit_at, asks_at)

    # --- what is told of it ---------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Bring the status up to date."""
        tracker, status = self._tracker, self._status
        before = status.state
        status.state = tracker.state
        status.last_seq = tracker.next_seq - 1
        status.gaps = tracker.gaps
        status.missed = tracker.missed
        status.restarts = tracker.restarts
        status.partial = tracker.partial
        status.detail = self._fault or tracker.detail
        if status.state is StreamState.STALE and self._unreadable:
            status.detail += f"; the last unreadable message: {self._unreadable}"
        if status.state is not before and StreamState.STALE in (status.state, before):
            level = log.warning if status.state is StreamState.STALE else log.info
            level(
                "stream " + status.state.value,
                worker_id=self._target.worker_id,
                dp_rank=self._target.dp_rank,
                detail=status.detail,
            )

    # --- sockets --------------------------------------------------------------------------------------------------

    def _open_live(self) -> bool:
        """Connect to the publisher; False when its address is of no use."""
        self._reopen_at = asyncio.get_running_loop().time() + self._reopen_s
        socket = self._open("live", zmq.SUB)
        socket.subscribe(self._source.topic)
        monitor = socket.get_monitor_socket(_WATCHED)
        self._sockets["monitor"] = monitor
        self._listen(monitor)
        try:
            self._connect(socket, self._source.events)
        except zmq.ZMQError:
            return False
        return True

    def _open_replay(self) -> "zmq.Socket[bytes]":
        """The socket to ask for replays; it stays open between answers that ended."""
        socket = self._sockets.get("replay")
        if socket is None:
            socket = self._open("replay", zmq.DEALER)
            self._connect(socket, self._source.replay or "")
        return socket

    def _open(self, name: str, kind: zmq.SocketType) -> "zmq.Socket[bytes]":
        config = self._config
        socket = self._context.socket(kind)
        self._sockets[name] = socket
        socket.linger = 0
        socket.rcvhwm = config.receive_hwm
        socket.maxmsgsize = config.max_message_bytes
        socket.reconnect_ivl = config.reconnect_ms
        socket.reconnect_ivl_max = config.reconnect_max_ms
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        self._listen(socket)
        return socket

    @staticmethod
    def _connect(socket: "zmq.Socket[bytes]", endpoint: str) -> None:
        # Addresses may come from a worker: inproc, for one, would reach into this process.
        if not endpoint.startswith(("tcp://", "ipc://")):
            raise zmq.ZMQError(zmq.EPROTONOSUPPORT)
        socket.ipv6 = "[" in endpoint
        socket.connect(endpoint)

    def _listen(self, socket: "zmq.Socket[bytes]") -> None:
        asyncio.get_running_loop().add_reader(socket.fileno(), self._wake.set)

    def _close(self, name: str) -> None:
        socket = self._sockets.pop(name, None)
        if socket is None:
            return
        asyncio.get_running_loop().remove_reader(socket.fileno())
        if name == "live":
            socket.disable_monitor()
        socket.close()
