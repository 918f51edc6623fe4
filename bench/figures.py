"""The figures of a run: flat keys, a JSON file, tables for people.

A key is `suite.case.side.measure`, for example `hash.8192.ours.us`. The side is `ours`, `limit` (what cannot be beaten)
or a peer; a measure names its unit. `suite.case.goal.measure` is what we want to reach.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SIDES = ("ours", "limit", "dynamo", "goal")
TITLES = {
    "ours": "ours",
    "limit": "limit",
    "dynamo": "Dynamo 1.6.1",
    "select_service": "its Rust HTTP service",
    "goal": "goal",
}


Row = list[str]


class Figures:
    """Figures by key, and remarks about them."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.notes: list[str] = []

    def put(self, key: str, value: float) -> None:
        """Record a figure, rounded to four digits."""
        self.values[key] = float(f"{value:.4g}")

    def put_all(self, prefix: str, measures: Mapping[str, float]) -> None:
        """Record several: `prefix.name`."""
        for name, value in measures.items():
            self.put(f"{prefix}.{name}", value)

    def note(self, text: str) -> None:
        """Record a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def rows(self, title: str, suite: str, measure: str, cases: Iterable[str], extra: Sequence[str] = ()) -> list[Row]:
        """One measure as a table: a row per case, a column per side that has it, the head first.

        Args:
            title: What is measured, and in what unit.
            suite: First part of the keys.
            measure: Last part of them.
            cases: The rows.
            extra: Further sides.
        """
        wanted = list(cases)
        sides = [*SIDES[:-1], *extra, SIDES[-1]]
        sides = [side for side in sides if any(f"{suite}.{case}.{side}.{measure}" in self.values for case in wanted)]
        rows = [[title, *(TITLES.get(side, side.replace("_", " ")) for side in sides)]]
        for case in wanted:
            cells = [self.values.get(f"{suite}.{case}.{side}.{measure}") for side in sides]
            rows.append([case.replace("_", " "), *map(_cell, cells)])
        return rows

    def table(self, title: str, suite: str, measure: str, cases: Iterable[str], extra: Sequence[str] = ()) -> str:
        """The same as text."""
        rows = self.rows(title, suite, measure, cases, extra)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )

    def write(self, path: Path) -> None:
        """Write everything as JSON: an object with the figures under their keys, and `notes` and `machine`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "notes": self.notes, **dict(sorted(self.values.items()))}
        path.write_text(json.dumps(content, indent=1) + "\n")

    def read(self, path: Path) -> None:
        """Take over the figures of an earlier run that this one has not made."""
        content = json.loads(path.read_text())
        for key, value in content.items():
            if isinstance(value, (int, float)):
                self.values.setdefault(key, value)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> str:
    """One line about where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(models)} x {models[0]}" if models else "unknown CPU"
    return f"{processor}, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
