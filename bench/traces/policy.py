"""Who decides where a request goes: the project's router under some settings, or the oracle."""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, get_args

from bench.endpoint import Endpoint
from bench.traces.cache import Span
from bench.traces.engine import Engine, Job
from bench.traces.trace import Path, Segment
from bench.traces.wire import Wire
from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.types import Prompt, RoutingHints, RoutingRequest


@dataclass(frozen=True, slots=True)
class Policy:
    """A name and the router settings it stands for; None is the oracle."""

    name: str
    settings: Mapping[str, Any] | None = field(default_factory=dict)


ORACLE = Policy("oracle", None)
NEED_MORE = {"direct"}  # modes in which the caller decides


def policies() -> list[Policy]:
    """Every cost and every mode that the configuration knows, the oracle last."""
    costs = [Policy(cost, {"cost": cost}) for cost in choices("cost")]
    modes = [Policy(mode, {"mode": mode}) for mode in choices("mode") if mode != "kv" and mode not in NEED_MORE]
    heavier = Policy("dynamo w=8", {"cost": "dynamo", "prefill_load_scale": 8.0})
    return [*costs, heavier, *modes, ORACLE]


def parse(text: str) -> Policy:
    """A policy as the command line names it: `NAME[,SETTING=VALUE...]`.

    Raises:
        ValueError: No such policy or setting.
    """
    name, *changes = text.split(",")
    known = {policy.name: policy for policy in policies()}
    if name not in known or (changes and known[name].settings is None):
        raise ValueError(f"no such policy: {name}")
    pairs = dict(change.split("=", 1) for change in changes)
    unknown = set(pairs) - set(RouterConfig.model_fields)
    if unknown:
        raise ValueError(f"no such setting: {', '.join(sorted(unknown))}")
    settings = known[name].settings
    return Policy(text, None if settings is None else {**settings, **pairs})


def choices(setting: str) -> tuple[str, ...]:
    """The values that a setting of the router may have."""
    annotation = RouterConfig.model_fields[setting].annotation
    return tuple(value for value in get_args(annotation) if isinstance(value, str))


class Chooser(Protocol):
    """Sends requests to engines and is told what becomes of them."""

    def send(self, job: Job, now: float) -> int:
        """The engine for a job."""

    def published(self, engine: int, stored: list[Span], removed: list[Span], now: float) -> None:
        """An engine has published an event."""

    def first_token(self, job: Job) -> None:
        """A job has its first token."""

    def ended(self, job: Job) -> None:
        """A job has all of them."""


class Routers:
    """Replicas of the project's router; each sees all KV events, `delay_s` late, and the load that it booked itself.

    Args:
        config: Of each replica.
        wire: Makes bytes of prompts and events.
        engines: Of the fleet.
        delay_s: Seconds between the end of a step and the moment at which its events have been applied.
        count: Replicas; requests go to them in turn.

    Attributes:
        replicas: The routers.
    """

    def __init__(
        self, config: RouterConfig, wire: Wire, engines: Sequence[Engine], delay_s: float, count: int = 1
    ) -> None:
        self._wire = wire
        self._delay_s = delay_s
        self._now = 0.0
        rooms = [engine.cache.capacity for engine in engines]
        self.replicas = [Endpoint(len(engines), config, lambda: self._now, rooms) for _ in range(count)]
        self._engine_of = {target: number for number, target in enumerate(self.replicas[0].targets)}
        self._late: deque[tuple[float, int, bytes]] = deque()
        self._hints = _hints()

    def send(self, job: Job, now: float) -> int:
        """Decide and book, with what has arrived until now."""
        self._now = now
        self.deliver(now)
        replica = self.replicas[job.number % len(self.replicas)]
        prompt, hints = Prompt(self._wire.prompt(job.request)), self._hints(job.request.session)
        job.lease = replica.router.lease(RoutingRequest(prompt, hints, request_id=str(job.number)))
        return self._engine_of[job.lease.decision.target]

    def deliver(self, now: float) -> None:
        """Apply the events that have arrived."""
        late = self._late
        while late and late[0][0] <= now:
            _, engine, payload = late.popleft()
            for replica in self.replicas:
                replica.apply((engine, payload))

    def published(self, engine: int, stored: list[Span], removed: list[Span], now: float) -> None:
        """Put the event on its way."""
        self._late.append((now + self._delay_s, engine, self._wire.message(stored, removed)))

    def first_token(self, job: Job) -> None:
        """Release the prefill load."""
        job.lease.first_token()

    def ended(self, job: Job) -> None:
        """Release the rest."""
        job.lease.release()
        job.lease = None


def _hints() -> Callable[[int | None], RoutingHints]:
    plain = RoutingHints()
    if "session_id" not in {each.name for each in fields(RoutingHints)}:
        return lambda _session: plain
    make: Any = RoutingHints
    return lambda session: plain if session is None else make(session_id=str(session))


class Oracle:
    """Sends each request to where its first token would come first, knowing the engines' own state.

    It is greedy: it does not see what its choice costs those who come later, so it can be beaten.
    """

    def __init__(self, engines: Sequence[Engine], block_size: int) -> None:
        self._engines = engines
        self._size = block_size
        self._estimates: list[dict[Job, tuple[int, float]]] = [{} for _ in engines]  # uncached tokens and seconds
        self._promised: list[Counter[Segment]] = [Counter() for _ in engines]

    def send(self, job: Job, now: float) -> int:
        """The engine with the shortest time to the first token."""
        forecasts = [self._forecast(number, job, now) for number in range(len(self._engines))]
        best = min(range(len(forecasts)), key=lambda number: forecasts[number][0])
        self._estimates[best][job] = forecasts[best][1:]
        self._promised[best].update(job.request.path)
        return best

    def _forecast(self, number: int, job: Job, now: float) -> tuple[float, int, float]:
        engine = self._engines[number]
        request, model = job.request, engine.model
        held = max(engine.cache.match(request.path), _promised(request.path, self._promised[number]))
        cached = min(held, (request.prompt_tokens - 1) // self._size) * self._size
        own = request.prompt_tokens - cached
        own_s = model.prefill_s(cached, own)
        tokens, seconds = own, own_s
        for each, (more, more_s) in self._estimates[number].items():
            if not each.admitted:
                tokens += more
                seconds += more_s
        for running in engine.prefilling:
            left = engine.left_over(running)
            tokens += left
            seconds += model.prefill_s(running.request.prompt_tokens - left, left)
        share = math.ceil(tokens / model.batch_tokens) * engine.decode_share()
        wait = engine.step_ends_in(now) + seconds + share
        return wait, own, own_s

    def published(self, engine: int, stored: list[Span], removed: list[Span], now: float) -> None:
        """It needs no events."""

    def first_token(self, job: Job) -> None:
        """It waits no longer."""
        del self._estimates[job.engine][job]
        promised = self._promised[job.engine]
        for segment in job.request.path:
            promised[segment] -= 1
            if not promised[segment]:
                del promised[segment]

    def ended(self, job: Job) -> None:
        """Nothing depends on it."""


def _promised(path: Path, promised: Counter[Segment]) -> int:
    blocks = 0
    for segment in path:
        if segment not in promised:
            break
        blocks += len(segment.ids)
    return blocks
