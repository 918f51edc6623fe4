"""The ZeroMQ sockets of one event stream: SUB with its monitor, and a DEALER for replays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvrouter_grpc.config import EventsConfig
from kvrouter_grpc.core import KvFeed
from kvrouter_grpc.events.batch_log import BatchLog
from kvrouter_grpc.events.receiver import Delivery, Receiver
from kvrouter_grpc.events.rota import Place

HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000
"""Silence after which a connection counts as dead: a host that vanished sends no FIN."""

Socket = zmq.Socket[bytes]
Message = list[bytes]

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Change(Enum):
    """What became of the live connection."""

    UP = "up"
    DOWN = "down"
    FOREIGN = "foreign"  # something else than ZeroMQ listens there


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


class EventSockets:
    """Opens, reads and closes the sockets of `source`. Nothing here waits.

    Args:
        source: Where to connect.
        config: Limits and reconnection times.
        context: Shared by all streams.
        place: Called when something arrives at a socket that was read empty.
    """

    def __init__(self, source: EventSource, config: EventsConfig, context: zmq.Context[Any], place: Place) -> None:
        self._source = source
        self._config = config
        # Plain sockets on the same context: reading one empty costs no future per message.
        self._context: zmq.Context[Socket] = zmq.Context.shadow(context.underlying)
        self._place = place
        self._live: Receiver | None = None
        self._monitor: Receiver | None = None
        self._replay: Receiver | None = None

    def open_live(self) -> bool:
        """Connect to the publisher, anew if need be; False when its address is of no use."""
        self._close_live()
        socket = self._open(zmq.SUB)
        socket.subscribe(self._source.topic)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED)
        self._live, self._monitor = self._listen(socket), self._listen(monitor)
        return _connect(socket, self._source.events)

    def ask(self, start: int) -> bool:
        """Ask for the batches from number `start` on; False when that cannot even be sent."""
        if self._replay is None:
            self._replay = self._listen(self._open(zmq.DEALER))
            if not _connect(self._replay.socket, self._source.replay or ""):
                return False
        try:
            self._replay.socket.send_multipart([b"", start.to_bytes(8)], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close_replay(self) -> None:
        """Drop the replay connection and what still comes over it; the next request opens another."""
        if self._replay is not None:
            self._close(self._replay)
            self._replay = None

    def close(self) -> None:
        """Close everything."""
        self.close_replay()
        self._close_live()

    def deliver(self, log: BatchLog, feed: KvFeed, *, in_order: bool) -> Delivery | None:
        """Take messages of the publisher, and apply those that are in order; None while there is no socket.

        Args:
            log: Where the stream stands.
            feed: What its batches are applied to.
            in_order: False: apply nothing.
        """
        if self._live is None or self._monitor is None:
            return None
        return self._live.deliver(self._monitor, log, feed, in_order)

    def replayed(self, limit: int) -> list[Message]:
        """Up to `limit` messages of the replay port."""
        return self._replay.receive(limit) if self._replay is not None else []

    @property
    def drained(self) -> bool:
        """Whether the last reads left nothing behind."""
        # Asked once per look at the stream, so it is written out.
        return (
            (self._live is None or self._live.drained)
            and (self._monitor is None or self._monitor.drained)
            and (self._replay is None or self._replay.drained)
        )

    def _open(self, kind: zmq.SocketType) -> Socket:
        config = self._config
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.rcvhwm = config.receive_hwm
        socket.maxmsgsize = config.max_message_bytes
        socket.reconnect_ivl = config.reconnect_ms
        socket.reconnect_ivl_max = config.reconnect_max_ms
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        return socket

    def _listen(self, socket: Socket) -> Receiver:
        # The descriptor signals arrivals only after the socket was read empty.
        self._place.watch(socket.fileno())
        return Receiver(socket)

    def _close_live(self) -> None:
        if self._live is not None and self._monitor is not None:
            self._live.socket.disable_monitor()
            self._close(self._monitor)
            self._close(self._live)
        self._live = self._monitor = None

    def _close(self, receiver: Receiver) -> None:
        self._place.unwatch(receiver.socket.fileno())
        receiver.socket.close()


def read_changes(reports: Sequence[Message]) -> Iterator[Change]:
    """What reports of the monitor, `Delivery.changes`, say of the live connection."""
    for frames in reports:
        event = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            yield Change.UP
        elif event == zmq.EVENT_DISCONNECTED:
            yield Change.DOWN
        elif event & _FAILED:
            yield Change.FOREIGN


def _connect(socket: Socket, endpoint: str) -> bool:
    # Addresses may come from a worker: inproc, for one, would reach into this process.
    if not endpoint.startswith(("tcp://", "ipc://")):
        return False
    socket.ipv6 = "[" in endpoint
    try:
        socket.connect(endpoint)
    except zmq.ZMQError:
        return False
    return True
