"""The situations in which policies are compared: a load, a fleet, and how busy the one keeps the other."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.traces import rows
from bench.traces.engine import MODELS, EngineModel
from bench.traces.fleet import Fleet
from bench.traces.rows import Row
from bench.traces.trace import Trace, build

DATA = Path(__file__).parent / "data"
BLOCK_SIZES = {"conversation": 512, "synthetic": 512, "agents": 64, "single": 64}
CACHES = {"S": 320_000, "L": 1_280_000}  # tokens per engine


@dataclass(frozen=True, slots=True)
class Scenario:
    """One situation.

    Attributes:
        load: What is asked, a key of `LOADS`.
        workers: Engines.
        level: How much is asked; at 1, engines that take turns would spend about three quarters of their time with
            prefill (`agents`: twelve users' sessions per 16 engines).
        cache: Tokens that an engine caches, a key of `CACHES`.
        model: Of the engines, a key of `MODELS`.
        mix: `equal` engines, or every second one has half the `speed` and the others one and a half times as much,
            or the same with the `cache`.
        replicas: Routers.
        event_delay_s: How late KV events are.
        requests: At most so many; 0 is all.
    """

    load: str
    workers: int = 8
    level: float = 1.0
    cache: str = "L"
    model: str = "lin"
    mix: str = "equal"
    replicas: int = 1
    event_delay_s: float = 0.05
    requests: int = 0

    @property
    def name(self) -> str:
        """The case in the results: what differs from the usual, without dots."""
        parts = [self.load, self.cache, f"n{self.workers}"]
        parts += [f"x{self.level:g}".replace(".", "_")] if self.level != 1 else []
        parts += [part for part, usual in ((self.model, "lin"), (self.mix, "equal")) if part != usual]
        parts += [f"r{self.replicas}"] if self.replicas != 1 else []
        parts += [f"d{self.event_delay_s * 1000:g}"] if self.event_delay_s != 0.05 else []
        parts += [f"first{self.requests}"] if self.requests else []
        return "-".join(parts)

    def trace(self) -> Trace:
        """The requests."""
        trace = LOADS[self.load](self.workers * self.level)
        return trace.first(self.requests) if self.requests else trace

    def fleet(self) -> Fleet:
        """The engines."""
        model = replace(MODELS[self.model], cache_tokens=CACHES[self.cache])
        return Fleet(_mixed(model, self.workers, self.mix), self.replicas, self.event_delay_s)


def _mixed(model: EngineModel, workers: int, mix: str) -> tuple[EngineModel, ...]:
    factors = [0.5 if number % 2 else 1.5 for number in range(workers)]
    if mix == "speed":
        return tuple(model.scaled(factor) for factor in factors)
    if mix == "cache":
        return tuple(model.scaled(1, factor) for factor in factors)
    return (model,) * workers


# --- loads: `scale` is the number of engines that they keep as busy as level 1 says ----------------------------------


@functools.lru_cache(maxsize=4)
def _recorded(name: str) -> Trace:
    return build(name, BLOCK_SIZES[name], rows.read(DATA / f"{name}.csv.gz"))


def _faster(name: str, per_worker: float) -> Callable[[float], Trace]:
    return lambda scale: _recorded(name).faster(per_worker * scale)


def _agents(scale: float) -> Trace:
    return _recorded("agents").copies(max(1, round(0.75 * scale)))


def hot_prompts(scale: float, count: int = 6000, seed: int = 1) -> Trace:
    """API calls: twelve system prompts of 1k to 6k tokens, the first most often, a short question, 16 tokens back."""
    rng = random.Random(f"hot {seed}")
    writer = _Prompts()
    systems = [writer.prefix(rng.randint(16, 96)) for _ in range(12)]
    shares = [1 / (1 + place) for place in range(len(systems))]
    at_ms = 0.0
    for _ in range(count):
        at_ms += rng.expovariate(scale * 14 / 1000)
        system = rng.choices(systems, shares)[0]
        writer.ask(at_ms, system, rng.randint(40, 1500), max(1, round(rng.expovariate(1 / 16))))
    return build("hot", 64, writer.rows)


def bursts(scale: float, count: int = 400, seed: int = 1) -> Trace:
    """Agents that send sub-agents: 4 to 24 requests within 50 ms that begin with one context of 8k to 40k tokens.

    The context itself was answered a while before, so one engine has it.
    """
    rng = random.Random(f"bursts {seed}")
    writer = _Prompts()
    at_ms = 0.0
    for _ in range(count):
        at_ms += rng.expovariate(scale * 0.12 / 1000)
        context = writer.prefix(rng.randint(125, 625))
        writer.ask(at_ms, context, 64, 200)
        sent = at_ms + 10_000 + rng.uniform(0, 20_000)
        for _ in range(rng.randint(4, 24)):
            writer.ask(sent + rng.uniform(0, 50), context, rng.randint(200, 2000), rng.randint(50, 400))
    return build("bursts", 64, writer.rows)


class _Prompts:
    """Writes rows; a prefix is written with the first request that begins with it. Blocks are 64 tokens long."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._blocks = 0
        self._ends: list[int] = []  # by prefix: its last block; -1: nobody asked yet
        self._sizes: list[int] = []  # by prefix: its blocks

    def prefix(self, blocks: int) -> int:
        """A new prefix, by its number."""
        self._ends.append(-1)
        self._sizes.append(blocks)
        return len(self._ends) - 1

    def ask(self, at_ms: float, prefix: int, more: int, output: int) -> None:
        """A request that begins with a prefix and goes on with `more` tokens that nobody else sends."""
        own, end = more // 64, self._ends[prefix]
        missing = self._sizes[prefix] if end < 0 else 0
        if missing:
            end = self._ends[prefix] = self._blocks + missing - 1
        after = -1 if missing else end
        self.rows.append(Row(at_ms, self._sizes[prefix] * 64 + more, output, None, None, after, missing + own))
        self._blocks += missing + own


LOADS: dict[str, Callable[[float], Trace]] = {
    "conversation": _faster("conversation", 3.3 / 8),
    "synthetic": _faster("synthetic", 2.5 / 8),
    "agents": _agents,
    "single": _faster("single", 1.0),
    "hot": hot_prompts,
    "bursts": bursts,
}


def add_recorded(folder: Path, block_size: int) -> list[str]:
    """Make loads of the traces in Mooncake's format that lie in a folder; their names."""
    names = []
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        name = path.name.split(".")[0]
        trace = build(name, block_size, rows.read_mooncake(path, block_size))
        LOADS[name] = trace.faster
        names.append(name)
    return names
