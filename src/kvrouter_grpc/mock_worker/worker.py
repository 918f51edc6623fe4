"""A mock worker as a value: start it, ask where it is, break it on purpose, stop it."""

import asyncio
import errno
import socket
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq.asyncio
from aiohttp import web

from kvrouter_grpc.mock_worker.blocks import BlockManager
from kvrouter_grpc.mock_worker.config import MockWorkerConfig
from kvrouter_grpc.mock_worker.engine import Engine
from kvrouter_grpc.mock_worker.publisher import EventPublisher, open_publishers
from kvrouter_grpc.mock_worker.surface import Surface
from kvrouter_grpc.mock_worker.transfer import TransferStore

_BACKLOG = 1024
_LINGER_MS = 100  # for the last events of a worker that stops in good order
_REBIND_TIMEOUT_S = 5.0  # ports of a killed worker are free at once, but not always at the same instant
_REBIND_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class _Ports:
    http: int
    events: int
    replay: int


class _Life:
    """All that the process of a worker holds: sockets, cache, requests. Nothing of it survives its end."""

    def __init__(self, config: MockWorkerConfig, ports: _Ports) -> None:
        self._context = zmq.asyncio.Context()
        self.publishers: list[EventPublisher] = []
        try:
            if config.kv_events:
                self.publishers = open_publishers(config, self._context, ports.events, ports.replay)
            self._listener = socket.create_server((config.host, ports.http), backlog=_BACKLOG)
        except OSError:
            self._close_publishers(linger_ms=0)
            raise
        self.port: int = self._listener.getsockname()[1]
        self.engines = [
            Engine(config, self.publishers[rank].publish if self.publishers else None) for rank in range(config.dp_size)
        ]
        advertised = config.advertise_host or (socket.gethostname() if _is_wildcard(config.host) else config.host)
        self._transfers = TransferStore(advertised, self.port, config.kv_transfer_timeout_s)
        self._surface = Surface(config, self.engines, self.publishers, self._transfers)
        self._runner = web.AppRunner(
            self._surface.application(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Work and answer."""
        self._tasks = [tasks.create_task(engine.run()) for engine in self.engines]
        self._tasks += [tasks.create_task(publisher.serve_replay()) for publisher in self.publishers]
        await self._runner.setup()
        await web.SockSite(self._runner, self._listener, backlog=_BACKLOG).start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new; requests that do not end within the time get the finish reason "abort"."""
        self._surface.draining = True
        for site in list(self._runner.sites):
            await site.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._surface.idle.wait()
        for engine in self.engines:
            engine.abort_all()

    async def end(self, *, abruptly: bool) -> None:
        """Close everything; abruptly means like a killed process: no more byte to anyone."""
        for task in self._tasks:
            task.cancel()
        if abruptly and self._runner.server is not None:
            for handler in self._runner.server.connections:
                if handler.transport is not None:
                    handler.transport.abort()
        await self._runner.cleanup()
        self._listener.close()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._transfers.close()
        self._close_publishers(linger_ms=0 if abruptly else _LINGER_MS)

    def _close_publishers(self, *, linger_ms: int) -> None:
        for publisher in self.publishers:
            publisher.close(linger_ms)
        self._context.term()  # waits for the linger, and until the ports are free


class MockWorker:
    """One vLLM worker without a model, in this process.

        async with MockWorker(MockWorkerConfig(block_size=16)) as worker:
            ...  # worker.url speaks HTTP, worker.events_endpoints publish KV events

    It needs a running event loop and lives in the loop that entered it. Ports that are picked at the first start stay
    the same through `kill` and `restart`.
    """

    def __init__(self, config: MockWorkerConfig | None = None) -> None:
        self.config = config or MockWorkerConfig()
        self._ports = _Ports(self.config.port, self.config.events_port, self.config.replay_port)
        self._tasks = asyncio.TaskGroup()
        self._life: _Life | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        try:
            await self._start(_Life(self.config, self._ports))
        except BaseException:
            await self._leave(abruptly=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave(abruptly=kind is not None)

    # --- where and what it is ------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """`http://host:port` of its HTTP surface."""
        return f"http://{self._local_host}:{self._ports.http}"

    @property
    def events_endpoints(self) -> list[str]:
        """PUB endpoint per rank; empty without KV events."""
        return self._endpoints(self._ports.events)

    @property
    def replay_endpoints(self) -> list[str]:
        """Replay endpoint per rank; empty without KV events."""
        return self._endpoints(self._ports.replay)

    @property
    def alive(self) -> bool:
        """Whether it was started and not killed."""
        return self._life is not None

    def block_manager(self, rank: int = 0) -> BlockManager:
        """The cache of one rank, to look into."""
        return self._running.engines[rank].blocks

    def next_seq(self, rank: int = 0) -> int:
        """Sequence number of a rank's next event batch."""
        return self._running.publishers[rank].next_seq

    # --- what can go wrong ---------------------------------------------------------------------------------------

    async def kill(self) -> None:
        """End like a process that got SIGKILL: every socket closes at once, all state is gone."""
        await self._end(abruptly=True)

    async def restart(self) -> None:
        """Come back on the same ports, with an empty cache and events from number 0; killed first if it still runs."""
        await self.kill()
        await self._start(await self._reborn())

    def drop_events(self, batches: int, rank: int = 0) -> None:
        """Lose the next `batches` event batches of a rank on the way; they can be replayed."""
        self._running.publishers[rank].drop(batches)

    def pause(self) -> None:
        """Stop computing: streams stall, `/health` stays 200."""
        for engine in self._running.engines:
            engine.pause()

    def resume(self) -> None:
        """Compute again after `pause`."""
        for engine in self._running.engines:
            engine.resume()

    def fail_engine(self) -> None:
        """Let the engine die under a living front end: open requests end with an error, `/health` turns 503."""
        for engine in self._running.engines:
            engine.fail()

    async def drain(self) -> None:
        """Take nothing new, wait for open requests at most `config.drain_s`, abort the rest; sockets stay open."""
        await self._running.drain(self.config.drain_s)

    # --- inside --------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> _Life:
        if self._life is None:
            raise RuntimeError("the mock worker is not running")
        return self._life

    @property
    def _local_host(self) -> str:
        return "127.0.0.1" if _is_wildcard(self.config.host) else self.config.host

    def _endpoints(self, port: int) -> list[str]:
        ranks = range(self.config.dp_size if self.config.kv_events else 0)
        return [f"tcp://{self._local_host}:{port + rank}" for rank in ranks]

    async def _start(self, life: _Life) -> None:
        self._life = life
        if life.publishers:
            first = life.publishers[0]
            events, replay = (_port(endpoint) for endpoint in (first.events_endpoint, first.replay_endpoint))
        else:
            events = replay = 0
        self._ports = _Ports(life.port, events, replay)
        await life.begin(self._tasks)

    async def _reborn(self) -> _Life:
        deadline = asyncio.get_running_loop().time() + _REBIND_TIMEOUT_S
        while True:
            try:
                return _Life(self.config, self._ports)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(_REBIND_PAUSE_S)

    async def _leave(self, *, abruptly: bool) -> None:
        try:
            await self._end(abruptly=abruptly)
        finally:
            # Told of no error, so that the group wraps none of the caller's: it only reports errors of its own tasks.
            await self._tasks.__aexit__(None, None, None)

    async def _end(self, *, abruptly: bool) -> None:
        life, self._life = self._life, None
        if life is not None:
            await life.end(abruptly=abruptly)


def _is_wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
