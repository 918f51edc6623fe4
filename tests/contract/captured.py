"""Reads the recordings in `captures/`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CAPTURES = Path(__file__).parent / "captures"
FILES = sorted(path.name for path in CAPTURES.glob("*.jsonl"))


class Message(NamedTuple):
    """One recorded message and what it says."""

    topic: bytes
    seq: int
    payload: bytes
    decoded: Any  # JSON, byte strings as "hex:..."
    line: dict


def lines(name: str) -> list[dict]:
    with (CAPTURES / name).open() as file:
        return [json.loads(line) for line in file]


def messages(name: str) -> Iterator[Message]:
    for line in lines(name):
        if "decoded" in line:
            topic, seq, payload = map(bytes.fromhex, line["frames"])
            yield Message(topic, int.from_bytes(seq), payload, line["decoded"], line)


def all_payloads() -> list[bytes]:
    return [message.payload for name in FILES for message in messages(name)]
