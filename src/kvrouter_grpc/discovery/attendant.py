"""One worker's life: ask what it is, follow its events, watch its health, until it is taken away."""

import asyncio
import random
from functools import partial
from urllib.parse import urlsplit, urlunsplit

import structlog
import zmq.asyncio

from kvrouter_grpc import advice
from kvrouter_grpc.advice import Advice
from kvrouter_grpc.config import EventsConfig, UpstreamConfig
from kvrouter_grpc.errors import RouterError
from kvrouter_grpc.events.rota import Rota
from kvrouter_grpc.events.subscriber import EventSource, Subscriber
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.snapshot import SnapshotError
from kvrouter_grpc.routing.workers import Worker, complete
from kvrouter_grpc.types import Target, WorkerState
from kvrouter_grpc.upstream.vllm_http import Health, VllmHttpClient

SLOW_CHECKS = 3
"""Unanswered health checks in a row before a worker counts as down. A busy engine answers late; a refused or reset
connection, by contrast, is certain and counts at once."""

log = structlog.get_logger(__name__)


class _Changed(Exception):  # noqa: N818 - no error: it ends one generation of subscribers
    """The worker came back as something else."""


class Attendant:
    """Attends one worker of one endpoint. `run()` lasts until it is cancelled.

    Args:
        worker: Whom to attend.
        router: Of its endpoint.
        client: For its HTTP surface.
        events: Settings of its subscribers.
        upstream: How often to look at its health, and what counts as slow.
        context: For its event sockets.
        rota: Shared by all subscribers of the process, which take turns on the event loop.
        rng: For jitter.
    """

    def __init__(
        self,
        worker: Worker,
        router: Router,
        client: VllmHttpClient,
        *,
        events: EventsConfig,
        upstream: UpstreamConfig,
        context: zmq.asyncio.Context,
        rota: Rota,
        rng: random.Random,
    ) -> None:
        self.worker = worker
        self.router = router
        self.client = client
        self.given = worker.spec  # before the worker completed it
        self._events = events
        self._upstream = upstream
        self._context = context
        self._rota = rota
        self._rng = rng
        self._subscribers: dict[Target, Subscriber] = {}
        self._look = asyncio.Event()
        self._doubted = False  # it may have restarted since it was asked what it is
        self._started_at: float | None = None  # of its process, as it says; None: it never said
        self._log = log.bind(worker=worker.spec.name, endpoint=router.endpoint)

    def look(self) -> None:
        """Check the worker's health now rather than at the next interval."""
        self._look.set()

    def doubt(self) -> None:
        """Its event socket dropped: it may be another process by now, however healthy it looks."""
        self._doubted = True
        self.look()

    async def run(self) -> None:
        """Attend the worker, through its restarts, until cancelled."""
        while True:
            await self._introduce()
            targets = self.worker.targets
            self.router.add_targets(targets)
            try:
                async with asyncio.TaskGroup() as group:
                    for target in targets:
                        self._follow(group, target)
                    group.create_task(self._watch(), name=f"health {self.worker.spec.name}")
                    if self._upstream.metrics_interval_s:
                        group.create_task(self._poll(), name=f"metrics {self.worker.spec.name}")
            except* _Changed:
                self._log.warning("worker changed", detail="it came back with another configuration; starting over")
            finally:
                self._subscribers.clear()
                # Whoever takes a worker away forgets its targets at once; a successor may have the same ids by now.
                if self.router.workers.get(self.worker.worker_id) is self.worker:
                    self.router.remove_targets(targets)

    # --- what it is -----------------------------------------------------------------------------------------------

    async def _introduce(self) -> None:
        """Ask the worker what it is until it answers."""
        registry, worker = self.router.workers, self.worker
        while True:
            try:
                facts = await self.client.facts()
                break
            except RouterError as error:
                registry.set_health(worker, WorkerState.UNHEALTHY, error.message)
            await self._pause()
        self._started_at = facts.process_start_time
        registry.introduced(worker, complete(self.given, facts), facts)
        registry.forgive(worker)
        if worker.spec.block_size:
            self.router.check_block_size(worker, worker.spec.block_size, "as it reports or as configured")
        if self.given.block_size and facts.block_size and self.given.block_size != facts.block_size:
            wrong = advice.block_size_misconfigured(worker.spec.name, self.given.block_size, facts.block_size)
            registry.set_fault(worker, "configured block size", wrong)
        if facts.prefix_caching is False:
            registry.set_fault(worker, "prefix caching", advice.no_prefix_caching())
        registry.set_health(worker, WorkerState.READY)
        self._log.info(
            "worker ready",
            url=worker.spec.url,
            version=facts.version,
            models=worker.spec.models,
            ranks=worker.dp_size,
            block_size=worker.spec.block_size,
            events=worker.spec.events,
        )

    # --- what it holds --------------------------------------------------------------------------------------------

    def _follow(self, group: asyncio.TaskGroup, target: Target) -> None:
        """Subscribe to one rank's events, or say why not."""
        spec, facts, index = self.worker.spec, self.worker.facts, self.router.index
        capacity = spec.total_kv_blocks or 0
        if facts is not None and facts.prefix_caching is False:
            index.without_events(target, str(advice.no_prefix_caching()), predicted=False)
            return
        if not spec.kv_events:
            index.without_events(target, capacity=capacity)
            return
        if spec.events is None:
            told = facts is not None and facts.kv_events is False
            fault = advice.events_off() if told else advice.events_nowhere()
            index.without_events(target, str(fault), capacity)
            self._set_fault(f"events {target.dp_rank}", fault)
            return
        source = EventSource(
            at_rank(spec.events, target.dp_rank),
            at_rank(spec.replay, target.dp_rank) if spec.replay else None,
            spec.topic,
        )
        if source.replay is not None:
            self._restore(target)
        subscriber = Subscriber(
            target,
            source,
            index,
            self._events,
            self._context,
            on_disconnect=self.doubt,
            on_fault=partial(self._set_fault, f"events {target.dp_rank}"),
            rng=self._rng,
            rota=self._rota,
        )
        self._subscribers[target] = subscriber
        group.create_task(subscriber.run(), name=f"events {spec.name}/{target.dp_rank}")

    def _set_fault(self, subject: str, fault: Advice | None) -> None:
        if fault is not None:
            self._log.warning("worker misconfigured", subject=subject, detail=str(fault))
        self.router.workers.set_fault(self.worker, subject, fault)

    def _judge_report_mode(self, target: Target) -> None:
        """See whether more seems to be cached than there is room for; what is only predicted does not count."""
        subject, room = f"report mode {target.dp_rank}", self.worker.spec.total_kv_blocks
        if room is None or self.router.config.prediction_ahead_s is not None:
            return
        held = self.router.index.device_blocks(target)
        if (held > room) != (subject in self.worker.faults):
            told = f"{held} blocks in a cache of {room}"
            self._set_fault(subject, advice.reports_reused(told) if held > room else None)

    def _restore(self, target: Target) -> None:
        """Start with what a router before this one knew of a rank, if that may still hold: its stream will tell."""
        try:
            warm = self.router.restore(target, self._started_at)
        except SnapshotError as error:
            self._log.warning("cold start", dp_rank=target.dp_rank, detail=f"the snapshot is of no use: {error}")
            return
        if warm:
            self._log.info("warm start", dp_rank=target.dp_rank, blocks=self.router.index.blocks(target))

    # --- how it is ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep the worker's health true."""
        slow = 0
        while True:
            await self._pause()
            health = await self.client.health()
            slow = slow + 1 if health is Health.SLOW else 0
            self.client.set_down(health is Health.GONE or slow >= SLOW_CHECKS)
            for target, subscriber in self._subscribers.items():
                self._judge_report_mode(target)
                if self.router.feedback.resync_due(target):
                    self._log.warning(
                        "picture is wrong", dp_rank=target.dp_rank, detail="doubting it, and asking for its history"
                    )
                    subscriber.resync()
            if health is Health.GOOD:
                if self._doubted or self.worker.health is WorkerState.UNHEALTHY:
                    await self._returned()
            elif health is not Health.SLOW or slow >= SLOW_CHECKS:
                if self.worker.health is WorkerState.READY:
                    self._log.warning("worker down", health=health.value)
                self.router.workers.set_health(self.worker, WorkerState.UNHEALTHY, f"health check: {health.value}")

    async def _returned(self) -> None:
        """The worker answers again: find out whether it is the same process."""
        self._doubted = False
        try:
            facts = await self.client.facts()
        except RouterError:
            self._doubted = True  # not yet: the next check tries again
            return
        spec = complete(self.given, facts)
        before = self.worker.facts
        if spec != self.worker.spec or (before is not None and facts.prefix_caching != before.prefix_caching):
            raise _Changed
        self._same_process(facts.process_start_time)
        self._log.info("worker back")
        self.router.workers.introduced(self.worker, spec, facts)
        self.router.workers.set_health(self.worker, WorkerState.READY)

    async def _poll(self) -> None:
        """Look at its metrics now and then, and hand on what each rank says."""
        interval = self._upstream.metrics_interval_s
        pause = self._rng.uniform(0, interval)  # workers that were added together are not asked together
        while True:
            await asyncio.sleep(pause)
            pause = interval * self._rng.uniform(0.9, 1.1)
            if self.worker.health is not WorkerState.READY:
                continue
            try:
                reports = await self.client.reports()
            except RouterError:
                continue  # its health is watched elsewhere
            if reports and not self._same_process(reports[0].process_start_time):
                self.doubt()  # it may serve something else now
            for target, report in zip(self.worker.targets, reports, strict=False):
                self.router.feedback.engine_reported(target, report)

    def _same_process(self, started_at: float | None) -> bool:
        """Compare the start of its process with what it said before; what a process before held is forgotten at once.

        The sockets of the events need longer to notice: there may be no event, and no gap, for a long time.
        """
        if started_at is None or started_at == self._started_at:
            return True
        known, self._started_at = self._started_at is not None, started_at
        if known:
            self._log.warning("worker restarted", started_at=started_at)
            for target in self.worker.targets:
                self.router.feedback.engine_restarted(target)
            for subscriber in self._subscribers.values():
                subscriber.notify_restarted()
        return not known

    async def _pause(self) -> None:
        """Wait for the next look: the interval with a little jitter, or less when somebody asks for it."""
        interval = self._upstream.health_interval_s * self._rng.uniform(0.8, 1.0)
        try:
            async with asyncio.timeout(interval):
                await self._look.wait()
        except TimeoutError:
            pass
        finally:
            self._look.clear()


def at_rank(endpoint: str, rank: int) -> str:
    """The socket of a data-parallel rank: vLLM binds rank r at the port of rank 0 plus r."""
    if rank == 0:
        return endpoint
    parts = urlsplit(endpoint)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return urlunsplit(parts._replace(netloc=f"{host}:{(parts.port or 0) + rank}"))
