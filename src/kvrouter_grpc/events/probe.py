"""One look at a rank's event sockets, without following them: who is there, what it says, what it replays."""

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from kvrouter_grpc.config import EventsConfig
from kvrouter_grpc.events.batch_log import HIGHEST_SEQ
from kvrouter_grpc.events.sockets import EventSource

GREETING_S = 2.0
"""How long a peer may take to accept the connection and greet; a listening publisher needs a round trip or two."""

END = b"\xff" * 8

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED


class Line(Enum):
    """What became of a connection."""

    UNUSABLE = "the address cannot be connected to"
    UNREACHED = "no answer"
    REFUSED = "refused"
    MUTE = "accepted, but nothing was said"
    FOREIGN = "something that does not speak ZeroMQ, or is no such socket"
    OPEN = "open"


class Heard(NamedTuple):
    """One batch, live or replayed."""

    topic: bytes | None  # None: a replay of vLLM up to 0.25 names none
    seq: int
    payload: bytes
    replayed: bool


class StreamProbe:
    """Looks at one rank's publisher and at its replay port.

    All topics are taken, so that a wrong one shows.

    Args:
        source: Where to connect.
        config: Limits.
        context: Of the sockets; its owner ends it.
        heard: Called with every batch.

    Attributes:
        live: The connection to the publisher.
        replay: The connection to the replay port; None when there is none, or nothing was asked.
        ended: Whether a replay came to its end marker.
        misshapen: Messages that have not the frames of a batch.
    """

    def __init__(
        self,
        source: EventSource,
        config: EventsConfig,
        context: zmq.asyncio.Context,
        heard: Callable[[Heard], None],
    ) -> None:
        self.live = Line.UNREACHED
        self.replay: Line | None = None
        self.ended = False
        self.misshapen = 0
        self._source = source
        self._config = config
        self._context = context
        self._heard = heard

    async def listen(self, ready: asyncio.Event) -> None:
        """Hand on what is published until cancelled; `ready` is set once it is known who is there."""
        with self._socket(zmq.SUB) as socket:
            socket.subscribe(b"")
            self.live = await self._connected(socket, self._source.events)
            ready.set()
            # A peer that is no ZeroMQ, an HTTP server for one, passes for version 1.0 of it: its bytes would be frames.
            while self.live is Line.OPEN:
                frames: list[bytes] = await socket.recv_multipart()
                if len(frames) == 3 and len(frames[1]) == 8 and int.from_bytes(frames[1]) <= HIGHEST_SEQ:
                    self._heard(Heard(frames[0], int.from_bytes(frames[1]), frames[2], replayed=False))
                else:
                    self.misshapen += 1

    async def ask(self) -> None:
        """Ask for all that the publisher still has, and hand it on; over at the end marker, or when it falls silent."""
        if self._source.replay is None:
            return
        with self._socket(zmq.DEALER) as socket:
            self.replay = await self._connected(socket, self._source.replay)
            if self.replay is not Line.OPEN:
                return
            await socket.send_multipart([b"", bytes(8)])
            try:
                while not self.ended:
                    async with asyncio.timeout(self._config.replay_timeout_s):
                        self._replayed(await socket.recv_multipart())
            except TimeoutError:
                return

    def _replayed(self, frames: list[bytes]) -> None:
        # [b"", topic, sequence number, payload]; vLLM up to 0.25 sends no topic.
        if len(frames) not in (3, 4) or len(frames[-2]) != 8:
            self.misshapen += 1
        elif frames[-2] == END:
            self.ended = True
        elif (seq := int.from_bytes(frames[-2])) <= HIGHEST_SEQ:
            self._heard(Heard(frames[1] if len(frames) == 4 else None, seq, frames[-1], replayed=True))
        else:
            self.misshapen += 1

    def _socket(self, kind: zmq.SocketType) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.rcvhwm = self._config.receive_hwm
        socket.maxmsgsize = self._config.max_message_bytes
        return socket

    async def _connected(self, socket: zmq.asyncio.Socket, address: str) -> Line:
        """Connect, and see what comes of it."""
        # Addresses may come from a worker: inproc, for one, would reach into this process.
        if not address.startswith(("tcp://", "ipc://")):
            return Line.UNUSABLE
        monitor: Any = socket.get_monitor_socket(_WATCHED)
        socket.ipv6 = "[" in address
        line = Line.UNREACHED
        try:
            socket.connect(address)
            async with asyncio.timeout(GREETING_S):
                while line in (Line.UNREACHED, Line.MUTE):
                    event = parse_monitor_message(await monitor.recv_multipart())["event"]
                    line = _after(line, event)
        except zmq.ZMQError:
            return Line.UNUSABLE
        except TimeoutError:
            return line
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
        return line


def _after(line: Line, event: int) -> Line:
    """The line after an event of its monitor."""
    if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        return Line.OPEN
    if event == zmq.EVENT_CONNECTED:
        return Line.MUTE
    if event & _FAILED or (event == zmq.EVENT_DISCONNECTED and line is Line.MUTE):
        return Line.FOREIGN
    return Line.REFUSED if event == zmq.EVENT_CLOSED and line is Line.UNREACHED else line
