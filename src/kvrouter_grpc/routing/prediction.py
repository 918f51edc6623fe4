"""What was foretold of one target's cache, against what its engine found: the loop that shows a wrong picture.

The decision foretells how much of a prompt its target holds; the engine says with the answer how much it found
(`cached_tokens`). Single misses are normal: what is held can be evicted before the engine gets to it, and events may
still be on their way. A picture that is wrong itself shows as misses in a row, so only these raise the alarm.

Requests are judged by the blocks that the index counted as held. Blocks of requests in flight are only likely to be
there in time: to find less than those is no fault, nor is it to find them. One block more or less is none either: an
engine that finds a prompt as a whole computes its last block again, and some drop the last one found.

An engine that does not report `cached_tokens` is judged by its metrics, over a number of requests at a time: its hits
must not be far below what was foretold of ours. Requests from elsewhere only add to them.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from kvrouter_grpc import advice
from kvrouter_grpc.types import Decision, EngineReport

WINDOW = 16
"""Requests that the accuracy and the alarm look back on."""

ALARM = 8
"""Wrong ones among them that raise the alarm."""

SMOOTHING = 1 / 16
"""Weight of the latest request in the running mean of the error."""

RESYNC_S = 60.0
RESYNC_MAX_S = 3600.0
"""Least time between two resyncs of a target, and what it doubles to while they do not help: an engine that evicts all
the time foretells badly, and no resync makes that better."""

UNTOLD = 8
"""Answers without `cached_tokens`, all of which should have had some, after which an engine counts as not telling."""

METRICS_REQUESTS = 16
"""Requests over which the metrics of an engine that does not tell are judged."""

METRICS_WEIGHT = 4
"""As how many requests that counts: less than the alarm, so that it takes two times in a row."""


class Expectation(NamedTuple):
    """What a decision foretold of its target. All in tokens but `new_blocks`."""

    booked_at: float  # monotonic seconds
    epoch: int  # of the picture it was read from; one of another picture is not judged
    block_size: int
    prompt: int
    held: int  # what the index counted as held, and an engine can use
    likely: int  # and what requests in flight will have computed by then
    new_blocks: int  # full blocks that the engine will have to compute


@dataclass(slots=True)
class _Metrics:
    """Requests computed since `totals`, and what was foretold of them."""

    totals: tuple[int, int] | None = None  # prefix queries and hits of the engine when the count was begun
    requests: int = 0
    prompt: int = 0
    held: int = 0

    def computed(self, expected: Expectation) -> None:
        if self.totals is not None:
            self.requests += 1
            self.prompt += expected.prompt
            self.held += expected.held

    def reported(self, report: EngineReport) -> float | None:
        """The share of what was foretold that is missing from the engine's hits, once enough requests were computed."""
        if report.prefix_queries is None or report.prefix_hits is None:
            return None
        now = report.prefix_queries, report.prefix_hits
        if self.totals is None or now < self.totals:
            self._begin(now)
            return None
        if self.requests < METRICS_REQUESTS or not self.held:
            return None
        queries, hits = now[0] - self.totals[0], now[1] - self.totals[1]
        # Without all of our prompts among its queries, some were not looked up: caching may be off for them.
        miss = 1 - hits / self.held if queries >= self.prompt and 2 * hits < self.held else 0.0
        self._begin(now)
        return miss

    def _begin(self, totals: tuple[int, int]) -> None:
        self.totals = totals
        self.requests = self.prompt = self.held = 0


@dataclass(slots=True)
class HitPrediction:
    """How well one target's hits were foretold. A state machine without a clock: the present is passed in.

    Attributes:
        exact: Requests of which the engine found what was foretold.
        over: ... less: the picture claims blocks that are gone.
        under: ... more: the picture misses blocks.
        foretold_tokens: Cached tokens foretold of these requests.
        found_tokens: Cached tokens that the engine reported for them.
        error_tokens: Running mean of the error, in tokens.
        tells: Whether the engine reports `cached_tokens`; None while that is open.
        alarms: Times the picture was found to be wrong.
        epoch: Counts the pictures: it changes when another one is begun.
        accuracy: Share of the overlap foretold that was found, over the last requests; those not made yet count as 1.
    """

    exact: int = 0
    over: int = 0
    under: int = 0
    foretold_tokens: int = 0
    found_tokens: int = 0
    error_tokens: float = 0.0
    tells: bool | None = None
    alarms: int = 0
    epoch: int = 0
    accuracy: float = 1.0
    _misses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  # share of what was held and not found
    _untold: int = 0
    _resync_at: float = -math.inf  # not before
    _resync_gap: float = RESYNC_S
    _metrics: _Metrics = field(default_factory=_Metrics)

    @property
    def drifting(self) -> bool:
        """Whether the picture is wrong."""
        return sum(miss > 0 for miss in self._misses) >= ALARM

    @property
    def told(self) -> str:
        """One sentence for the operator, "" when there is nothing to say."""
        if self.drifting:
            return (
                f"its engine found less cached than foretold in {sum(miss > 0 for miss in self._misses)} of the last "
                f"{WINDOW} requests: is it short of memory, or are these the KV events of another engine?"
            )
        if self.tells is False:
            return str(advice.cached_tokens_untold())
        return ""

    def expect(self, decision: Decision, now: float) -> Expectation:
        """Note what `decision` expects of this target, to judge it by what comes."""
        size = decision.block_size
        usable = (decision.prompt_tokens - 1) // size * size if size and decision.prompt_tokens else 0
        held = min(decision.overlap.total * size, usable)
        likely = max(held, decision.expected_cached_tokens)
        new = decision.prompt_blocks - likely // size if size else 0
        return Expectation(now, self.epoch, size, decision.prompt_tokens, held, likely, new)

    def computed(self, expected: Expectation) -> None:
        """A request has its first token."""
        if self.tells is not True and expected.epoch == self.epoch:
            self._metrics.computed(expected)

    def finished(self, expected: Expectation, cached_tokens: int | None) -> None:
        """A request was answered completely.

        Args:
            expected: What was foretold of it.
            cached_tokens: What its engine reported. Engines that report it may leave out a 0.
        """
        size = expected.block_size
        if not size:
            return
        if cached_tokens is None and self.tells is not True:
            self._untold += expected.held > size
            if self._untold >= UNTOLD:
                self.tells = False
            return
        self.tells, self._untold = True, 0
        found = min(cached_tokens or 0, expected.prompt)
        if expected.epoch != self.epoch:
            return
        error = max(expected.held - found, found - expected.likely, 0)
        error = error if error > size else 0
        self.exact += not error
        self.over += error > 0 and found < expected.held
        self.under += error > 0 and found > expected.likely
        self.foretold_tokens += expected.held
        self.found_tokens += found
        self.error_tokens += (error - self.error_tokens) * SMOOTHING
        if expected.held > size:
            self._judge(max(0.0, 1 - found / expected.held) if error else 0.0)

    def reported(self, report: EngineReport) -> None:
        """The engine's metrics were read."""
        miss = self._metrics.reported(report)
        if miss is not None and self.tells is not True:
            for _ in range(METRICS_WEIGHT):
                self._judge(miss)

    def begun(self) -> None:
        """Another picture is begun: what was foretold from the one before says nothing about it."""
        self.epoch += 1
        self._misses.clear()
        self.accuracy = 1.0
        self._metrics = _Metrics()

    def resync_due(self, now: float) -> bool:
        """Whether the picture should be fetched again. When it says yes, it takes that to be done."""
        if not self.drifting or now < self._resync_at:
            return False
        self._resync_at = now + self._resync_gap
        self._resync_gap = min(2 * self._resync_gap, RESYNC_MAX_S)
        return True

    def _judge(self, miss: float) -> None:
        drifted = self.drifting
        self._misses.append(miss)
        self.accuracy = 1.0 - sum(self._misses) / WINDOW
        self.alarms += self.drifting and not drifted
        if len(self._misses) == WINDOW and not any(self._misses):
            self._resync_gap = RESYNC_S  # it came right
