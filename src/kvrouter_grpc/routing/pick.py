"""Choosing among costs."""

import math
import random
from collections.abc import Sequence


def lowest(costs: Sequence[float], requests: Sequence[int] | None, rng: random.Random) -> int:
    """Index of the lowest cost; ties go to the fewest `requests` (None: not asked), then uniformly at random."""
    best = min(costs)
    tied = [index for index, cost in enumerate(costs) if cost == best]
    if len(tied) > 1 and requests is not None:
        fewest = min(requests[index] for index in tied)
        tied = [index for index in tied if requests[index] == fewest]
    return tied[0] if len(tied) == 1 else rng.choice(tied)


def softmax(costs: Sequence[float], temperature: float, rng: random.Random) -> int:
    """Index drawn with `p ~ exp(-(cost - min) / ((max - min) * temperature))`; uniform when all are equal.

    The contract's min-max normalised softmax: the temperature means the same whatever the costs' unit.
    """
    low, high = min(costs), max(costs)
    if high == low:
        return rng.randrange(len(costs))
    scale = (high - low) * temperature
    weights = [math.exp(-(cost - low) / scale) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]
