"""Traces as files: one request a row, its prompt told by what it adds to the prompts before it.

Blocks are numbered in the order in which they first appear, so a prompt is where it leaves what is known (`after`, a
block; -1: at once) and how many new blocks follow. That is a tenth of the size of a list of ids.
"""

import csv
import gzip
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = ("at_ms", "prompt", "output", "session", "delay_ms", "after", "new")


class Row(NamedTuple):
    """One request.

    Attributes:
        at_ms: Arrival.
        prompt: Tokens of the prompt.
        output: Tokens of the answer.
        session: Conversation, None for a single request.
        delay_ms: Of a turn that follows another one: how long after the end of that. None: it is sent at `at_ms`.
        after: The block that its new ones follow, and the last of those that it has in common with earlier prompts.
        new: Full blocks that no prompt had before.
    """

    at_ms: float
    prompt: int
    output: int
    session: int | None
    delay_ms: float | None
    after: int
    new: int


def read(path: Path) -> list[Row]:
    """Read rows as `write` left them, `.csv.gz`."""
    with gzip.open(path, "rt", newline="") as file:
        return [
            Row(
                float(row["at_ms"]),
                int(row["prompt"]),
                int(row["output"]),
                int(row["session"]) if row["session"] else None,
                float(row["delay_ms"]) if row["delay_ms"] else None,
                int(row["after"]),
                int(row["new"]),
            )
            for row in csv.DictReader(file)
        ]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows; equal rows give equal bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        lines = [",".join(COLUMNS)]
        lines += [
            ",".join(
                ""
                if value is None
                else f"{value:g}"
                if isinstance(value, float) and value != int(value)
                else str(int(value))
                for value in row
            )
            for row in rows
        ]
        packed.write(("\n".join(lines) + "\n").encode())


def read_mooncake(path: Path, block_size: int) -> list[Row]:
    """Read a trace in Mooncake's format: JSON lines with `timestamp` (ms), the two lengths and `hash_ids`.

    `session_id`, `turn` and `delay` (ms) are understood as well. Requests with equal timestamps are spread over the
    time to the next one: Mooncake's conversations are binned to about three seconds.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return list(from_ids(records, block_size))


def from_ids(records: Iterable[Mapping[str, Any]], block_size: int) -> Iterator[Row]:
    """Rows from records that list chained ids of their blocks; the last id may stand for part of a block."""
    known: dict[int, int] = {-1: -1}
    kept = list(records)
    for record, at_ms in zip(kept, _spread([record["timestamp"] for record in kept]), strict=True):
        prompt, output = max(1, record["input_length"]), max(1, record["output_length"])
        ids = record["hash_ids"][: prompt // block_size]
        # Ids are chained: behind an unknown one, all are.
        common = bisect_left(ids, 1, key=lambda block: 0 if block in known else 1)
        delay = float(record["delay"]) if record.get("turn", 0) > 0 and "delay" in record else None
        after = known[ids[common - 1]] if common else -1
        for block in ids[common:]:
            known[block] = len(known) - 1
        yield Row(at_ms, prompt, output, record.get("session_id"), delay, after, len(ids) - common)


def _spread(stamps: Iterable[float]) -> Iterator[float]:
    groups = [(stamp, sum(1 for _ in same)) for stamp, same in groupby(stamps)]
    for (stamp, count), (following, _) in pairwise([*groups, *groups[-1:]]):
        for place in range(count):
            yield stamp + (following - stamp) * place / count
