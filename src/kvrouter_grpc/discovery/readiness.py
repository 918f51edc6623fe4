"""Whether the router takes requests, and what keeps it from that or deserves attention.

A fault says itself what it does to readiness (`advice.Effect`); docs/check.md has the rules in words.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from kvrouter_grpc.advice import Effect
from kvrouter_grpc.discovery.view import WorkerView
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.workers import Worker
from kvrouter_grpc.types import WorkerState

SETTLE_S = 5.0
"""Longest time for which a router that could serve waits for what the event streams tell at first: what engines hold
already, and whether these are their streams at all. Later nobody waits: what is not known yet is only not counted."""

_STOPPING = (Effect.EXCLUDES, Effect.HOLDS)


class Readiness:
    """Judges the workers of all endpoints.

    Until the router has been ready once, a wrong setting of any worker keeps it from becoming so: that stops a rollout.
    Later it only costs that worker's share: one bad pod must not take the service down.

    Args:
        routers: Endpoint to router.
        clock: Monotonic seconds.
        min_workers: Workers that must be ready before the router is.
        expendable: Endpoints whose workers others can do without: once the router was ready, it stays so without them.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        clock: Callable[[], float],
        *,
        min_workers: int = 0,
        expendable: Collection[str] = (),
    ) -> None:
        self._routers = routers
        self._clock = clock
        self._min_workers = min_workers
        self._expendable = expendable
        self._was_ready = False
        self._served_at: float | None = None  # since when it could serve, as long as it was never ready

    @property
    def ready(self) -> bool:
        """Whether every endpoint can serve."""
        if self._was_ready:
            return self._endpoints_served()
        if not self._endpoints_served() or any(_stops(worker) for worker in self._workers()):
            self._served_at = None
            return False
        now = self._clock()
        if self._served_at is None:
            self._served_at = now
        self._was_ready = now - self._served_at >= SETTLE_S or not self._unsettled()
        return self._was_ready

    @property
    def settling(self) -> bool:
        """Whether time alone, or a stream, may make it ready; all else is a change of a worker."""
        return self._served_at is not None and not self._was_ready

    def findings(self, views: Sequence[WorkerView]) -> list[str]:
        """What keeps the router from being ready or deserves attention, one sentence each; `views` are all workers."""
        found = []
        for endpoint, router in self._routers.items():
            workers = router.workers.workers()
            if not workers:
                found.append(f"endpoint {endpoint} has no workers: add one with --worker or RegisterWorker")
            found += [
                f"{worker.spec.name} is {worker.state.value}: {worker.reason}"
                for worker in workers
                if worker.state not in (WorkerState.READY, WorkerState.DRAINING)
            ]
        found += [f"{view.spec.name}: {doubt}" for view in views for doubt in view.doubts]
        ready = sum(worker.state is WorkerState.READY for worker in self._workers())
        if ready < self._min_workers:
            found.append(f"{ready} of at least {self._min_workers} workers are ready")
        if self.settling and (names := self._unsettled()):
            found.append(f"waiting until the event streams of {', '.join(names)} have told what is cached already")
        return found

    def _workers(self) -> Iterator[Worker]:
        for router in self._routers.values():
            yield from router.workers.workers()

    def _endpoints_served(self) -> bool:
        enough = self._was_ready or (
            sum(worker.state is WorkerState.READY for worker in self._workers()) >= self._min_workers
        )
        return enough and all(
            any(worker.state is WorkerState.READY for worker in router.workers.workers())
            for endpoint, router in self._routers.items()
            if not (self._was_ready and endpoint in self._expendable)
        )

    def _unsettled(self) -> list[str]:
        """Names of the workers that may be picked and whose event streams have not told all that is to be told now."""
        return [
            worker.spec.name
            for router in self._routers.values()
            for worker in router.workers.workers()
            if worker.state is WorkerState.READY
            and not all(
                (stream := router.index.stream_if_known(target)) is not None and stream.settled
                for target in worker.targets
            )
        ]


def _stops(worker: Worker) -> bool:
    return any(fault.effect in _STOPPING for fault in worker.faults.values())
