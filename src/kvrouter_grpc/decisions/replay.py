"""Recorded decisions, taken once more under other settings by the code that decides.

Each decision is replayed by itself, with the loads and caches that it read: they are what the decisions of that time
made them. What a policy would have made of them in the long run, only a simulation tells.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pydantic

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import Policy
from kvrouter_grpc.decisions.line import DecisionLine, LostLine, SettingsLine, read_override
from kvrouter_grpc.decisions.reader import Faults, read
from kvrouter_grpc.routing.plan import Plan


@dataclass(frozen=True, slots=True)
class Difference:
    """A decision that would have been another one."""

    endpoint: str
    request_id: str
    at: float
    before: str  # worker
    after: str
    before_new_tokens: int
    after_new_tokens: int


@dataclass(slots=True)
class Outcome:
    """What came of all decisions, and what would have.

    Attributes:
        decisions: That were replayed.
        changed: Of those, with another pick.
        unlike: Of those, that the settings of that time do not lead to: another version of the router took them.
        lost: That the file says it lacks.
        skipped: Of endpoints whose settings are not in the files.
        before: Picks by (endpoint, worker).
        after: The same under the other settings.
        prompt_tokens: Of all prompts.
        before_new_tokens: Of those, that were not cached where they went.
        after_new_tokens: That would not have been.
        differences: The first of them.
    """

    decisions: int = 0
    changed: int = 0
    unlike: int = 0
    lost: int = 0
    skipped: int = 0
    before: "Counter[tuple[str, str]]" = field(default_factory=Counter)
    after: "Counter[tuple[str, str]]" = field(default_factory=Counter)
    prompt_tokens: int = 0
    before_new_tokens: int = 0
    after_new_tokens: int = 0
    differences: list[Difference] = field(default_factory=list)


class Replay:
    """Replays logs.

    Args:
        changes: Settings of the section `router` that are to be other than they were.
        most_differences: To keep.
    """

    def __init__(self, changes: Mapping[str, Any], most_differences: int = 10) -> None:
        self.outcome = Outcome()
        self.faults = Faults()
        self._changes = changes
        self._most_differences = most_differences
        self._plans: dict[str, tuple[Plan, Plan]] = {}  # by endpoint: as it was, and as it is to be
        self._policies: dict[tuple[str, bool], tuple[Policy, Policy]] = {}  # of requests that change nothing

    def files(self, paths: Iterable[Path]) -> Outcome:
        """Replay files, in this order.

        Raises:
            OSError: One cannot be read.
        """
        for path in paths:
            for place, line in read(path, self.faults):
                try:
                    self._take(line)
                except (ValueError, msgspec.ValidationError) as error:
                    self.faults.add(place, _why(error))
        return self.outcome

    def _take(self, line: SettingsLine | DecisionLine | LostLine) -> None:
        if isinstance(line, DecisionLine):
            if line.endpoint in self._plans:
                self._again(line)
            else:
                self.outcome.skipped += 1
        elif isinstance(line, LostLine):
            self.outcome.lost += line.count
        else:
            was = RouterConfig.model_validate(line.router, strict=False)
            self._plans[line.endpoint] = Plan.of(was), Plan.of(was.model_copy(update=dict(self._changes)))
            self._policies.clear()

    def _again(self, line: DecisionLine) -> None:
        was, now = self._policies_of(line)
        recording = line.restore(was)
        own, _, _ = recording.verdict()
        picked, _, _ = recording.verdict(now)
        outcome = self.outcome
        outcome.decisions += 1
        outcome.unlike += own != line.picked
        before, after = _name(line, line.picked), _name(line, picked)
        before_new, after_new = _new_tokens(line, line.picked), _new_tokens(line, picked)
        outcome.before[line.endpoint, before] += 1
        outcome.after[line.endpoint, after] += 1
        outcome.prompt_tokens += line.tokens
        outcome.before_new_tokens += before_new
        outcome.after_new_tokens += after_new
        if picked != line.picked:
            outcome.changed += 1
            if len(outcome.differences) < self._most_differences:
                outcome.differences.append(
                    Difference(line.endpoint, line.request_id, line.at, before, after, before_new, after_new)
                )

    def _policies_of(self, line: DecisionLine) -> tuple[Policy, Policy]:
        key = line.endpoint, line.prefilled
        if line.override is None and key in self._policies:
            return self._policies[key]
        plans = list(self._plans[line.endpoint])
        if line.override is not None:
            override = read_override(line.override)
            plans = [plan.changed(override) for plan in plans]
        if line.prefilled:
            plans = [plan.decoding() for plan in plans]
        policies = plans[0].policy, plans[1].policy
        if line.override is None:
            self._policies[key] = policies
        return policies


def _name(line: DecisionLine, i: int) -> str:
    seen = line.workers[i]
    return f"{seen.name} rank {seen.rank}" if seen.rank else seen.name


def _new_tokens(line: DecisionLine, i: int) -> int:
    """Tokens of the prompt that a worker had to compute, as far as the router knew: by block, and never none."""
    if not line.block_size or not line.tokens:
        return line.tokens
    seen = line.workers[i]
    held = max(sum(seen.tiers), seen.in_flight)
    return line.tokens - min(held, (line.tokens - 1) // line.block_size) * line.block_size


def _why(error: ValueError | msgspec.ValidationError) -> str:
    if isinstance(error, pydantic.ValidationError):
        names = ", ".join(".".join(map(str, each["loc"])) for each in error.errors(include_url=False))
        return f"settings that this version does not know: {names}"
    return str(error)
