"""Which targets are too busy: above a threshold they get nothing new, or requests wait until one of them is below."""

import math
from array import array
from dataclasses import dataclass
from typing import Self

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import TargetTable


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Loads above which a target is overloaded; None for no limit."""

    active_decode_blocks: float | None = None  # fraction of the blocks of its cache
    active_prefill_tokens: int | None = None
    active_prefill_tokens_frac: float | None = None  # of the tokens that its engine computes in one step

    @classmethod
    def of(cls, config: RouterConfig) -> Self:
        """Those that are configured."""
        return cls(
            config.active_decode_blocks_threshold,
            config.active_prefill_tokens_threshold,
            config.active_prefill_tokens_threshold_frac,
        )


class Gate:
    """Compares the loads of an endpoint's targets with its thresholds.

    Args:
        table: The loads.
        thresholds: Above which a target is overloaded.
        busy_above: Fraction of the tokens of one engine step; above it a target is busy. None: none ever is.

    Attributes:
        limits: Whether any threshold is set.
    """

    def __init__(self, table: TargetTable, thresholds: Thresholds, busy_above: float | None) -> None:
        self._table = table
        self._busy_above = busy_above
        self.thresholds = thresholds

    @property
    def thresholds(self) -> Thresholds:
        """Those in force; may be set at any time."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._limits = (
            _limit(thresholds.active_decode_blocks),
            _limit(thresholds.active_prefill_tokens),
            _limit(thresholds.active_prefill_tokens_frac),
        )
        self.limits = self._limits != _NONE

    def below(self, rows: "array[int]") -> "array[int]":
        """Those that are not overloaded; `rows` itself when that is all of them."""
        return self._table.within(rows, *self._limits)

    def all_busy(self, rows: "array[int]") -> bool:
        """Whether a request for which these come into question has to wait."""
        return self._busy_above is not None and not self._table.within(rows, math.inf, math.inf, self._busy_above)


def _limit(threshold: float | None) -> float:
    return math.inf if threshold is None else threshold


_NONE = (math.inf, math.inf, math.inf)
