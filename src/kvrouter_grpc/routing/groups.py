"""What the KV cache groups of a model ask of a prefix that its engine is to use again.

Most models have one group. Hybrid ones have several, and each has its rule: full attention needs all blocks of the
prefix, a sliding window of `w` tokens the last ceil((w - 1) / block size) of them (vLLM's rule: the token that is
computed next is in its own window), a state (Mamba) the one block at its end.
"""

from collections.abc import Callable, Mapping, Sequence
from math import lcm
from typing import NamedTuple

from kvrouter_grpc import advice
from kvrouter_grpc.types import Tier

Slots = tuple[int | None, int | None, int | None, int | None]

KINDS = ("", "prefix", "window", "state", "nothing", "other")
"""What a group may be, see `KvFeed.cache_groups`."""

ALL = 0
"""As a window: every block of the prefix."""


class CacheGroup(NamedTuple):
    """One group, as its events tell of it; see `KvFeed`."""

    kind: str  # prefix, window, state, nothing, other; "" before anything is known
    window: int  # tokens
    block_size: int  # tokens; 0: none of its blocks are indexed
    width: int  # blocks of the index that one of its blocks spans
    slots: Slots  # of the index, by tier


class GroupFacts(NamedTuple):
    """What does not change of a group while its engine runs."""

    kind: str
    window: int
    block_size: int


class HeldSlot(NamedTuple):
    """What a group holds in a tier, as bytes."""

    group: int
    tier: Tier
    data: bytes


class Rule(NamedTuple):
    """What a prefix must have to be usable."""

    groups: tuple[tuple[int, Slots], ...]  # blocks before the cut, `ALL` for the whole prefix, and where they are
    step: int  # cuts are multiples of this many blocks of the index

    @property
    def plain(self) -> bool:
        """Whether the longest prefix that one group holds is the answer."""
        return self.step == 1 and len(self.groups) <= 1 and all(window == ALL for window, _ in self.groups)


def rule_of(groups: Sequence[CacheGroup]) -> Rule:
    """The rule of a model. Groups of which nothing is indexed yet have no say, and cannot have one."""
    judged = [group for group in groups if group.kind in _WINDOWS and group.block_size]
    return Rule(
        tuple((_WINDOWS[group.kind](group), group.slots) for group in judged),
        lcm(*(group.width for group in judged)),
    )


def unjudged(groups: Sequence[CacheGroup]) -> str:
    """One sentence for the operator about groups whose rule is not known; "" when there are none."""
    numbers = [number for number, group in enumerate(groups) if group.kind == "other"]
    return str(advice.group_unjudged(numbers)) if numbers else ""


def _sliding(group: CacheGroup) -> int:
    return max(1, -(-(group.window - 1) // group.block_size)) * group.width


_WINDOWS: Mapping[str, Callable[[CacheGroup], int]] = {
    "prefix": lambda _: ALL,
    "window": _sliding,
    "state": lambda group: group.width,
}
