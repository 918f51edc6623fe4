"""The slow, clear twin of the compiled choice (`core/pick.pxd`), with the same random generator."""

import math
from collections.abc import Sequence

MASK = 2**64 - 1


def scramble(word: int) -> int:
    """The finalizer of SplitMix64."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


class Dice:
    """SplitMix64."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        return scramble(self.state)

    def below(self, end: int) -> int:
        return ((self.next() >> 32) * end) >> 32

    def unit(self) -> float:
        return (self.next() >> 11) / 2**53


def lowest(costs: Sequence[float], requests: Sequence[int] | None, dice: Dice) -> int:
    """Index of the lowest cost; ties go to the fewest `requests` (None: not asked), then uniformly at random."""
    best = min(costs)
    tied = [index for index, cost in enumerate(costs) if cost == best]
    if len(tied) > 1 and requests is not None:
        fewest = min(requests[index] for index in tied)
        tied = [index for index in tied if requests[index] == fewest]
    return tied[0] if len(tied) == 1 else tied[dice.below(len(tied))]


def shares(costs: Sequence[float], temperature: float) -> list[float]:
    """What each index is drawn with: `p ~ exp(-(cost - min) / ((max - min) * temperature))`; all equal: uniform.

    Infinity is never drawn while anything else can be.
    """
    finite = [cost for cost in costs if cost < math.inf]
    if not finite:
        return [1.0] * len(costs)
    low, high = min(finite), max(finite)
    return [
        1.0 if cost == low else 0.0 if cost == math.inf else math.exp(-(cost - low) / ((high - low) * temperature))
        for cost in costs
    ]


def softmax(costs: Sequence[float], temperature: float, dice: Dice) -> int:
    """Index drawn by `shares`."""
    weights = shares(costs, temperature)
    left = 0.0
    for weight in weights:
        left += weight
    left *= dice.unit()
    last = 0
    for index, weight in enumerate(weights):
        if weight > 0:
            last = index
            left -= weight
            if left < 0:
                break
    return last
