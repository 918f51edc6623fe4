"""The KV-event sockets of one rank: PUB for what happens, ROUTER for what was missed."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import zmq
import zmq.asyncio

from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.kv_events import KvEvent, encode_batch

_PUB_HWM = 100_000  # vLLM's default: a subscriber that lags further loses messages
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
_REPLAY_SLICE = 256  # messages between two chances for others to run
_LOST_IN_REPLAY = 16  # one of so many, where loss is asked for
_BIND_ATTEMPTS = 100

S = TypeVar("S", zmq.Socket[bytes], zmq.asyncio.Socket)


class EventPublisher:
    """Numbers the event batches of one rank from 0, publishes them and keeps the last ones for replay."""

    def __init__(
        self, config: MockWorkerConfig, dp_rank: int, pub: zmq.Socket[bytes], router: zmq.asyncio.Socket
    ) -> None:
        """Take over two bound sockets."""
        self._config = config
        self._dp_rank = dp_rank
        self._pub = pub
        self._router = router
        self._topic = config.topic.encode()
        self._ring: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._next_seq = 0
        self._to_drop = 0

    @property
    def events_endpoint(self) -> str:
        """Where it publishes, as ZMQ bound it."""
        return _endpoint(self._pub)

    @property
    def replay_endpoint(self) -> str:
        """Where it replays, as ZMQ bound it."""
        return _endpoint(self._router)

    @property
    def next_seq(self) -> int:
        """Sequence number of the next batch."""
        return self._next_seq

    def drop(self, batches: int) -> None:
        """Do not publish the next `batches` batches; they can still be replayed."""
        self._to_drop += batches

    def close(self, linger_ms: int) -> None:
        """Close both sockets; what is not sent after `linger_ms` milliseconds is lost."""
        self._pub.close(linger_ms)
        self._router.close(linger_ms)

    def publish(self, events: Sequence[KvEvent]) -> None:
        """Send one step's events as one batch."""
        config = self._config
        payload = encode_batch(
            time.time() + config.clock_skew_s, events, self._dp_rank, config.event_format, config.hash_format
        )
        seq = self._next_seq.to_bytes(8, "big")
        self._next_seq += 1
        self._ring.append((seq, payload))
        if self._to_drop:
            self._to_drop -= 1
            return
        self._pub.send_multipart((self._topic, seq, payload))

    async def serve_replay(self) -> None:
        """Answer `[b"", first wanted seq]` (8 bytes, big-endian) with every kept batch from there and an end marker."""
        while True:
            frames = await self._router.recv_multipart()
            if len(frames) == 3 and len(frames[2]) == 8:
                await self._replay(frames[0], frames[2])

    async def _replay(self, client: bytes, start: bytes) -> None:
        topic = [self._topic] if self._config.replay_frames == 4 else []
        # Equally long big-endian numbers compare like their bytes. A copy, because batches arrive meanwhile.
        wanted = [batch for batch in self._ring if batch[0] >= start]
        lossy_after = self._config.replay_lossy_after
        for sent, (seq, payload) in enumerate(wanted):
            if lossy_after is not None and sent >= lossy_after and (sent - lossy_after) % _LOST_IN_REPLAY == 0:
                continue
            await self._router.send_multipart([client, b"", *topic, seq, payload])
            if sent % _REPLAY_SLICE == 0:
                await asyncio.sleep(0)
        await self._router.send_multipart([client, b"", *([b""] if topic else []), _END_OF_REPLAY, b""])


def open_publishers(
    config: MockWorkerConfig, context: zmq.asyncio.Context, events_port: int, replay_port: int
) -> list[EventPublisher]:
    """Bind the sockets of every rank, rank r at port + r.

    Args:
        config: Host, ranks and what the publishers need.
        context: Owns the sockets.
        events_port: PUB port of rank 0; 0 picks a free range.
        replay_port: ROUTER port of rank 0; 0 picks a free range.

    Raises:
        OSError: A port is taken, or the host is not one of this machine.
    """
    host = "*" if config.host in ("", "0.0.0.0", "::") else config.host

    def new_pub() -> zmq.Socket[bytes]:
        pub: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.PUB)
        pub.setsockopt(zmq.SNDHWM, _PUB_HWM)
        return pub

    def new_router() -> zmq.asyncio.Socket:
        router = context.socket(zmq.ROUTER)
        router.setsockopt(zmq.SNDHWM, 0)  # what is lost is lost on purpose
        return router

    pubs = _bind_range(new_pub, host, events_port, config.dp_size)
    try:
        routers = _bind_range(new_router, host, replay_port, config.dp_size)
    except OSError:
        for pub in pubs:
            pub.close(linger=0)
        raise
    return [
        EventPublisher(config, rank, pub, router) for rank, (pub, router) in enumerate(zip(pubs, routers, strict=True))
    ]


def _bind_range(new_socket: Callable[[], S], host: str, port: int, count: int) -> list[S]:
    attempts = 1 if port else _BIND_ATTEMPTS  # the ports after a free one may be taken
    while True:
        attempts -= 1
        sockets: list[S] = []
        try:
            base = port
            for rank in range(count):
                sockets.append(new_socket())
                sockets[rank].bind(f"tcp://{host}:{base + rank if base else '*'}")
                base = base or int(_endpoint(sockets[0]).rpartition(":")[2])
        except zmq.ZMQError as error:
            for socket in sockets:
                socket.close(linger=0)
            if error.errno != zmq.EADDRINUSE or not attempts:
                raise OSError(error.errno, error.strerror) from None
        else:
            return sockets


def _endpoint(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> str:
    bound: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
    return bound.rstrip(b"\0").decode().replace("0.0.0.0", "*")
