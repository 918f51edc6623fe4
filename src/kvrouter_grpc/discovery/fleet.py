"""All workers of all endpoints: who is there, who attends to whom, and whether the router is ready."""

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import aiohttp
import structlog
import zmq.asyncio

from kvrouter_grpc.config import EventsConfig, UpstreamConfig
from kvrouter_grpc.discovery.attendant import Attendant
from kvrouter_grpc.discovery.readiness import Readiness
from kvrouter_grpc.discovery.view import WorkerView, view_of
from kvrouter_grpc.errors import (
    ConfiguredWorkerError,
    InvalidRequestError,
    UnknownEndpointError,
    UnknownWorkerError,
    UpstreamError,
)
from kvrouter_grpc.events.rota import Rota
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.types import Target, WorkerSpec
from kvrouter_grpc.upstream.vllm_http import VllmHttpClient

SWEEP_S = 0.25
"""How often expired registrations and reservations are looked for, in seconds."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Member:
    attendant: Attendant
    task: asyncio.Task[None] | None = None  # None until the fleet runs
    ttl_s: float | None = None
    expires_at: float | None = None
    configured: bool = False


class Fleet:
    """Adds, watches and removes workers. `run()` lasts until it is cancelled.

    Args:
        routers: Endpoint to router.
        session: For the engines' HTTP surfaces.
        context: For the engines' event sockets.
        events: Settings of the subscribers.
        upstream: Settings of the engine clients.
        min_workers: Workers that must be ready before the router is.
        follow_events: Whether KV events are subscribed to at all.
        clock: Monotonic seconds.
        rng: For jitter.
        expendable: Endpoints whose workers others can do without: once the router was ready, it stays so without them.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        session: aiohttp.ClientSession,
        context: zmq.asyncio.Context,
        *,
        events: EventsConfig,
        upstream: UpstreamConfig,
        min_workers: int = 0,
        follow_events: bool = True,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        expendable: Collection[str] = (),
    ) -> None:
        self._routers = routers
        self._session = session
        self._context = context
        self._events = events
        self._upstream = upstream
        self._follow_events = follow_events
        self._clock = clock
        self._rng = rng or random.Random()
        self._members: dict[str, _Member] = {}
        self._clients: dict[int, VllmHttpClient] = {}
        self._group: asyncio.TaskGroup | None = None
        self._readiness = Readiness(routers, clock, min_workers=min_workers, expendable=expendable)
        self._rota = Rota()

    # --- membership -----------------------------------------------------------------------------------------------

    def configure(self, spec: WorkerSpec) -> int:
        """Add a worker of the router's own configuration; returns its id.

        Raises:
            UnknownEndpointError: The router does not serve the worker's endpoint.
            ValueError: The name is taken.
        """
        return self._add(self._effective(spec), None, configured=True)

    def register(self, spec: WorkerSpec, ttl_s: float | None) -> int:
        """Add a worker, or replace the registration of the same name; returns its id.

        Args:
            spec: The worker.
            ttl_s: Seconds after which it goes unless it is renewed; None for never.

        Raises:
            UnknownEndpointError: The router does not serve the worker's endpoint.
            ConfiguredWorkerError: The name belongs to a configured worker.
        """
        spec = self._effective(spec)
        member = self._members.get(spec.name)
        if member is None:
            return self._add(spec, ttl_s)
        if member.configured:
            raise ConfiguredWorkerError(
                f"spec.name: {spec.name!r} is a worker of the router's own configuration; register under another name",
                metadata={"worker": spec.name},
            )
        if member.attendant.given == spec:
            # The same worker says so again, as a heartbeat would: its cache and streams stay.
            member.ttl_s = ttl_s
            self._extend(member)
            return member.attendant.worker.worker_id
        self._router(spec.endpoint)  # refuse before anything is taken away
        self._remove(spec.name)
        return self._add(spec, ttl_s)

    def renew(self, name: str) -> float:
        """Extend a registration by its ttl; returns the seconds until it expires.

        Raises:
            UnknownWorkerError: There is no such worker, any more or at all: register it again.
            InvalidRequestError: It has no ttl.
        """
        member = self._member(name)
        if member.ttl_s is None:
            raise InvalidRequestError([("name", f"{name!r} has no ttl: it stays until it is deregistered")])
        self._extend(member)
        return member.ttl_s

    def deregister(self, name: str) -> None:
        """Remove a worker at once. Its streams go on; its cache is forgotten. Raises UnknownWorkerError."""
        self._member(name)
        self._remove(name)

    def drain(self, name: str, undo: bool = False) -> int:
        """Give a worker nothing new (`undo`: again); returns its requests in flight. Raises UnknownWorkerError."""
        attendant = self._member(name).attendant
        attendant.router.workers.set_draining(attendant.worker, not undo)
        return sum(attendant.router.load(target).active_requests for target in attendant.worker.targets)

    def client(self, worker_id: int) -> VllmHttpClient:
        """The HTTP client of a worker. Raises KeyError when the worker has gone."""
        return self._clients[worker_id]

    def suspect(self, target: Target, error: UpstreamError) -> None:
        """A request failed on `target`: look at its health now."""
        for member in self._members.values():
            if member.attendant.worker.worker_id == target.worker_id:
                log.warning("request failed on worker", worker=member.attendant.worker.spec.name, reason=error.reason)
                member.attendant.look()

    # --- views ----------------------------------------------------------------------------------------------------

    def workers(self, endpoint: str | None = None) -> list[WorkerView]:
        """The workers, sorted by endpoint and name. Raises UnknownEndpointError."""
        if endpoint is not None:
            self._router(endpoint)
        return [self._view(each) for each in self._sorted() if endpoint in (None, each.attendant.router.endpoint)]

    @property
    def ready(self) -> bool:
        """Whether every endpoint can serve; see `Readiness`."""
        return self._readiness.ready

    @property
    def settling(self) -> bool:
        """Whether it may become ready without a change of a worker; see `Readiness`."""
        return self._readiness.settling

    def findings(self) -> list[str]:
        """What keeps the router from being ready or deserves attention, one sentence each."""
        return self._readiness.findings(self.workers())

    def _sorted(self) -> list[_Member]:
        return sorted(
            self._members.values(),
            key=lambda member: (member.attendant.router.endpoint, member.attendant.worker.spec.name),
        )

    def _view(self, member: _Member) -> WorkerView:
        ttl_s = None if member.expires_at is None else max(0.0, member.expires_at - self._clock())
        return view_of(member.attendant.worker, member.attendant.router.index, ttl_s)

    # --- running --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Attend all workers and let registrations expire, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._rota.run(), name="events")
            for member in self._members.values():
                self._start(member)
            try:
                while True:
                    await asyncio.sleep(SWEEP_S)
                    self._sweep()
                    for router in self._routers.values():
                        router.expire()
                        router.index.refresh_all()
            finally:
                self._group = None

    def _sweep(self) -> None:
        now = self._clock()
        for name, member in list(self._members.items()):
            if member.expires_at is not None and member.expires_at <= now:
                log.warning("registration expired", worker=name)
                self._remove(name)

    def _add(self, spec: WorkerSpec, ttl_s: float | None, *, configured: bool = False) -> int:
        router = self._router(spec.endpoint)
        if spec.name in self._members:
            raise ValueError(f"worker {spec.name!r} is there already")
        worker = router.workers.add(spec)
        client = VllmHttpClient(spec.url, self._session, self._upstream)
        attendant = Attendant(
            worker,
            router,
            client,
            events=self._events,
            upstream=self._upstream,
            context=self._context,
            rota=self._rota,
            rng=random.Random(self._rng.random()),
        )
        member = _Member(attendant, ttl_s=ttl_s, configured=configured)
        self._extend(member)
        self._members[spec.name] = member
        self._clients[worker.worker_id] = client
        self._start(member)
        return worker.worker_id

    def _effective(self, spec: WorkerSpec) -> WorkerSpec:
        return spec if self._follow_events else replace(spec, kv_events=False)

    def _remove(self, name: str) -> None:
        member = self._members.pop(name)
        worker = member.attendant.worker
        router = member.attendant.router
        router.workers.remove(name)
        router.remove_targets(worker.targets)
        del self._clients[worker.worker_id]
        if member.task is not None:
            member.task.cancel()
        log.info("worker removed", worker=name)

    def _start(self, member: _Member) -> None:
        if self._group is not None and member.task is None:
            name = f"worker {member.attendant.worker.spec.name}"
            member.task = self._group.create_task(member.attendant.run(), name=name)

    def _extend(self, member: _Member) -> None:
        member.expires_at = None if member.ttl_s is None else self._clock() + member.ttl_s

    def _member(self, name: str) -> _Member:
        member = self._members.get(name)
        if member is None:
            raise UnknownWorkerError(
                f"name: no worker {name!r}; it never was, was removed or its registration expired: register it again",
                metadata={"worker": name},
            )
        return member

    def _router(self, endpoint: str) -> Router:
        router = self._routers.get(endpoint)
        if router is None:
            raise UnknownEndpointError(
                f"endpoint: {endpoint!r} is not served here; served are {', '.join(self._routers)}",
                metadata={"endpoint": endpoint},
            )
        return router
