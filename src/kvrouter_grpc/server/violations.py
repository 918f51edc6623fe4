"""What is wrong with one request, collected, so that the caller learns all of it at once."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from kvrouter_grpc.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Bounds:
    """The range of a number. NaN and the infinities are outside of every range."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False  # whether `low` itself is outside

    def hold(self, value: float) -> bool:
        """Whether the value is inside."""
        above = value > self.low if self.low_open else value >= self.low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "be finite" if self.high == math.inf else f"be at most {_number(self.high)}"
        if self.high == math.inf:
            return f"be {'above' if self.low_open else 'at least'} {_number(self.low)}"
        return f"be in {'(' if self.low_open else '['}{_number(self.low)}, {_number(self.high)}]"


class Violations:
    """Collects (field path, what is wrong and the fix); `raise_if_any` makes an error of them."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, text: str) -> None:
        """Record one."""
        self._found.append((field, text))

    def check_number(self, field: str, value: float, bounds: Bounds) -> bool:
        """Record a number that is out of bounds; say whether it is inside."""
        if bounds.hold(value):
            return True
        self.add(field, f"must {bounds}, got {_number(value)}")
        return False

    def check_count(self, field: str, items: Collection[object], limit: int) -> bool:
        """Record a list that is too long; say whether it is not."""
        if len(items) <= limit:
            return True
        self.add(field, f"has {len(items)} entries, at most {limit} are allowed")
        return False

    def check_text(self, field: str, text: str, limit: int) -> bool:
        """Record a text that is too long; say whether it is not."""
        if len(text) <= limit:
            return True
        self.add(field, f"has {len(text)} characters, at most {limit} are allowed")
        return False

    def raise_if_any(self) -> None:
        """Raise InvalidRequestError when something was recorded."""
        if self._found:
            raise InvalidRequestError(self._found)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
