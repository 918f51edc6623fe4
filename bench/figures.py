"""The figures of a run: flat keys, a JSON file, tables for people.

A key is `suite.case.side.measure`, for example `hash.8192.ours.us`. The side is `ours`, `limit` (what cannot be beaten)
or a peer; a measure names its unit. `suite.case.goal.measure` is what we want to reach.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SIDES = ("ours", "limit", "dynamo", "goal")
TITLES = {"ours": "ours", "limit": "limit", "dynamo": "Dynamo 1.6.1", "goal": "goal"}


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

    def table(self, title: str, suite: str, measure: str, cases: Iterable[str], extra: Sequence[str] = ()) -> str:
        """A table of one measure: a row per case, a column per side that has it.

        Args:
            title: What is measured, and in what unit.
            suite: First part of the keys.
            measure: Last part of them.
            cases: The rows.
            extra: Further sides.
        """
        rows = list(cases)
        sides = [*SIDES[:-1], *extra, SIDES[-1]]
        sides = [side for side in sides if any(f"{suite}.{case}.{side}.{measure}" in self.values for case in rows)]
        lines = [[title, *(TITLES.get(side, side.replace("_", " ")) for side in sides)]]
        for case in rows:
            cells = [self.values.get(f"{suite}.{case}.{side}.{measure}") for side in sides]
            lines.append([case.replace("_", " "), *("-" if cell is None else f"{cell:,.4g}" for cell in cells)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in pairs)
            for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
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


def machine() -> str:
    """One line about where the figures come from."""
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(models)} x {models[0] if models else 'unknown CPU'}, Linux {platform.release()}, Python {platform.python_version()}"
