"""The load that did not come through this router, from what engines say of all their work.

What an engine reports beyond what is booked on it came from elsewhere: from another router, from callers who ask where
to go and book nothing. A single difference says little: a request is booked before the engine counts it, and freed
after. Both errors come and go, in either direction, so it is the average of the differences that counts, and never
below zero. Nothing is counted twice.
"""

from dataclasses import dataclass
from typing import NamedTuple

from kvrouter_grpc.core import TargetTable
from kvrouter_grpc.types import EngineReport, Target

GAIN = 0.5
"""Weight of the newest difference in the average: two reports see three quarters of a change."""
PATIENCE = 3.0
"""Intervals between reports after which a silent engine's figures begin to fade; by half with every further one."""
FIRST_INTERVAL_S = 10.0
"""Taken for the interval while there was only one report."""


class Booked(NamedTuple):
    """What this router has booked on a target."""

    requests: int
    waiting: int  # of those, without a first token
    blocks: int


class Foreign(NamedTuple):
    """Load from elsewhere."""

    requests: int = 0
    waiting: int = 0
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Surplus:
    """What engine reports say beyond what was booked, on average; may be below zero."""

    requests: float
    waiting: float
    blocks: float
    reported: int  # requests in the last report, whoever sent them
    at: float  # of the last report
    interval_s: float

    @classmethod
    def after(
        cls, before: "Surplus | None", report: EngineReport, booked: Booked, total_blocks: int, now: float
    ) -> "Surplus":
        """The average when one more report has come.

        Args:
            before: The average until now; None at the first report.
            report: The report.
            booked: At the time of the report.
            total_blocks: Of the target's cache; 0 when not known.
            now: Monotonic seconds.
        """
        reported = report.running + report.waiting
        used = report.kv_usage * total_blocks if report.kv_usage is not None else 0.0
        latest = (reported - booked.requests, report.waiting - booked.waiting, used - booked.blocks)
        if before is None:
            return cls(*latest, reported, now, FIRST_INTERVAL_S)
        averages = (before.requests, before.waiting, before.blocks)
        requests, waiting, blocks = (old + GAIN * (new - old) for old, new in zip(averages, latest, strict=True))
        return cls(requests, waiting, blocks, reported, now, max(now - before.at, 1e-3))

    def fades_at(self) -> float:
        """When it starts to count less, unless another report comes."""
        return self.at + PATIENCE * self.interval_s

    def foreign(self, now: float) -> Foreign:
        """The load from elsewhere, as far as it can be told now.

        Blocks are counted only as far as the foreign share of the requests could hold them: the engine also counts the
        output of the requests that were booked, which is not foreign.
        """
        overdue = (now - self.fades_at()) / self.interval_s
        trust = 0.5**overdue if overdue > 0 else 1.0
        requests = max(0, round(self.requests * trust))
        waiting = min(requests, max(0, round(self.waiting * trust)))
        blocks = 0.0
        if requests and self.reported:
            blocks = min(1.0, requests / self.reported) * max(0.0, self.blocks) * trust
        return Foreign(requests, waiting, round(blocks))


class ForeignLoad:
    """Keeps the foreign part of every target's load true. Pure: the time is passed in and never goes back.

    Args:
        targets: The rows that it is written to.
    """

    def __init__(self, targets: TargetTable) -> None:
        self._targets = targets
        self._surplus: dict[Target, Surplus] = {}

    def reported(self, target: Target, report: EngineReport, usual_prefill_tokens: float, now: float) -> None:
        """Take in what an engine says.

        Args:
            target: Who says it; nothing happens when it is not known.
            report: What it says.
            usual_prefill_tokens: That a request must compute: engines tell how many wait, not how long they are.
            now: Monotonic seconds.
        """
        row = self._targets.row(target)
        if row is None:
            return
        requests, _, blocks = self._targets.load(row)
        foreign_requests, foreign_waiting, _, foreign_blocks = self._targets.foreign(row)
        waiting = self._targets.waiting(row)
        booked = Booked(requests - foreign_requests, waiting - foreign_waiting, blocks - foreign_blocks)
        total = self._targets.total_blocks(row)
        surplus = Surplus.after(self._surplus.get(target), report, booked, total, now)
        self._surplus[target] = surplus
        self._write(row, surplus.foreign(now), usual_prefill_tokens)

    def forget(self, target: Target) -> None:
        """Its engine is gone, or another one."""
        self._surplus.pop(target, None)
        row = self._targets.row(target)
        if row is not None:
            self._write(row, Foreign(), 0)

    def fade(self, usual_prefill_tokens: float, now: float) -> None:
        """Let the figures of silent engines fade; those that are down to nothing are forgotten. Called now and then."""
        for target, surplus in list(self._surplus.items()):
            row = self._targets.row(target)
            if row is None:
                del self._surplus[target]
            elif surplus.fades_at() < now:
                foreign = surplus.foreign(now)
                self._write(row, foreign, usual_prefill_tokens)
                if not foreign.requests:
                    del self._surplus[target]

    def _write(self, row: int, foreign: Foreign, usual_prefill_tokens: float) -> None:
        tokens = round(foreign.waiting * usual_prefill_tokens)
        self._targets.set_foreign(
            row, min(foreign.requests, _MOST), min(foreign.waiting, _MOST), min(tokens, 2**32 - 1), foreign.blocks
        )


_MOST = 1 << 24  # what a row takes; no engine has as many requests
