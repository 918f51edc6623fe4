"""Replays a trace over simulated engines: one heap of moments, no wall clock, equal seeds give equal runs."""

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from bench.traces.cache import Span
from bench.traces.engine import Engine, EngineModel, Job
from bench.traces.policy import Chooser, Oracle, Policy, Routers
from bench.traces.trace import Request, Trace
from bench.traces.wire import Wire
from kvrouter_grpc.config import RouterConfig


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the requests run on.

    Attributes:
        models: One per engine.
        replicas: Routers in front of it.
        event_delay_s: How late KV events are.
    """

    models: tuple[EngineModel, ...]
    replicas: int = 1
    event_delay_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it: every request, and the engines and routers as they were left."""

    jobs: Sequence[Job]
    engines: Sequence[Engine]
    chooser: Chooser
    elapsed_s: float


def replay(trace: Trace, fleet: Fleet, policy: Policy, seed: int = 1, wire: Wire | None = None) -> Run:
    """Send every request of the trace; a turn of a conversation follows the end of the one before.

    Args:
        trace: The load.
        fleet: The engines.
        policy: Who decides.
        seed: Of the router's random choices.
        wire: Of the same trace, to encode each segment once for several runs.
    """
    return _Replay(trace, fleet, policy, seed, wire or Wire(trace.block_size)).run()


class _Replay:
    def __init__(self, trace: Trace, fleet: Fleet, policy: Policy, seed: int, wire: Wire) -> None:
        self._now = 0.0
        self._moments: list[tuple[float, int, Job | int]] = []  # what happens when; an engine, or a job that arrives
        self._count = 0
        self._wakes = [math.inf] * len(fleet.models)
        self._jobs: list[Job] = []
        self._turns: defaultdict[int, deque[Request]] = defaultdict(deque)
        self._engines = [
            Engine(model, trace.block_size, self._first_token, self._ended, partial(self._published, number))
            for number, model in enumerate(fleet.models)
        ]
        self._chooser: Chooser
        if policy.settings is None:
            self._chooser = Oracle(self._engines, trace.block_size)
        else:
            known = {"seed": seed, "block_size": trace.block_size, "request_expiry_s": 86_400.0}
            config = RouterConfig(**(known | dict(policy.settings)))
            self._chooser = Routers(config, wire, self._engines, fleet.event_delay_s, fleet.replicas)
        for request in trace.requests:
            if request.delay is not None and request.session is not None:
                self._turns[request.session].append(request)
            else:
                self._at(request.arrival, self._job(request, request.arrival))

    def run(self) -> Run:
        moments = self._moments
        while moments:
            now, _, what = heapq.heappop(moments)
            if isinstance(what, Job):
                self._now = now
                self._arrive(what)
            elif self._wakes[what] == now:  # else it was moved
                self._now = now
                self._wakes[what] = math.inf
                self._wake_at(what, self._engines[what].wake(now))
        return Run(self._jobs, self._engines, self._chooser, self._now)

    def _job(self, request: Request, arrival: float) -> Job:
        job = Job(request, len(self._jobs), arrival)
        self._jobs.append(job)
        return job

    def _at(self, moment: float, what: Job | int) -> None:
        self._count += 1
        heapq.heappush(self._moments, (moment, self._count, what))

    def _wake_at(self, engine: int, moment: float) -> None:
        if moment != self._wakes[engine]:
            self._wakes[engine] = moment
            if moment < math.inf:
                self._at(moment, engine)

    def _arrive(self, job: Job) -> None:
        job.engine = self._chooser.send(job, self._now)
        self._wake_at(job.engine, self._engines[job.engine].submit(job, self._now))

    def _published(self, engine: int, stored: list[Span], removed: list[Span]) -> None:
        self._chooser.published(engine, stored, removed, self._now)

    def _first_token(self, job: Job, now: float) -> None:
        job.first_token = now
        self._chooser.first_token(job)

    def _ended(self, job: Job, now: float) -> None:
        job.end = now
        self._chooser.ended(job)
        session = job.request.session
        if session is not None and self._turns[session]:
            request = self._turns[session].popleft()
            self._at(now + (request.delay or 0.0), self._job(request, now + (request.delay or 0.0)))
