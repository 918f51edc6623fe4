"""Reads decision logs. They may come from anywhere: what cannot be read is counted and left out."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvrouter_grpc.decisions.line import Line

MOST_LINE = 64 << 20  # bytes
MOST_TOLD = 5  # faults that are kept in words


@dataclass(slots=True)
class Faults:
    """Lines that could not be read."""

    count: int = 0
    told: list[str] = field(default_factory=list)  # the first of them: where, and why

    def add(self, place: str, why: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.told) < MOST_TOLD:
            self.told.append(f"{place}: {why}")


def read(path: Path, faults: Faults) -> Iterator[tuple[str, Line]]:
    """The lines of a file that can be read, each with its place, `file:number`.

    Raises:
        OSError: The file cannot be read.
    """
    decoder = msgspec.json.Decoder(Line)
    number = 0
    with path.open("rb") as file:
        while text := file.readline(MOST_LINE):
            number += 1
            place = f"{path}:{number}"
            if len(text) == MOST_LINE and not text.endswith(b"\n"):
                faults.add(place, f"it is longer than {MOST_LINE} bytes")
                while text and not text.endswith(b"\n"):
                    text = file.readline(MOST_LINE)
                continue
            try:
                yield place, decoder.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                faults.add(place, str(error))
