"""Replays what vLLM's own cache manager said of its events and of prompts; `e2e/hybrid_cache.py` writes it."""

import gzip
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.types import Prompt, Target
from reference.kv_codec import _mm_hash

RECORDED = Path(__file__).parent / "captures" / "hybrid" / "v0.32.0.jsonl.gz"
TARGET = Target(1, 0)


def recorded() -> list[str]:
    with gzip.open(RECORDED, "rt") as lines:
        return list(lines)


def payloads(lines: Iterable[str]) -> Iterator[bytes]:
    return (bytes.fromhex(line["payload"]) for line in map(json.loads, lines) if "payload" in line)


def hits_by_model(lines: Iterable[str]) -> dict[str, Counter]:
    """Per model how many prompts were cached in part, and how many of all were foretold otherwise than by the engine."""
    found: dict[str, Counter] = {}
    for line in map(json.loads, lines):
        if "model" in line:
            counts = found[line["model"]] = Counter()
            index = KvIndex(None, _no_other_block_size)
            index.add(TARGET)
        elif "payload" in line:
            index.apply_payload(TARGET, bytes.fromhex(line["payload"]))
        else:
            (overlap,) = index.overlaps(index.sequence(prompt_of(line, index.block_size)), [TARGET])
            counts["cached"] += line["cached_tokens"] > 0
            counts["wrong"] += overlap.device * index.block_size != line["cached_tokens"]
    return found


def prompt_of(line: dict, block_size: int) -> Prompt:
    """The prompt without its last token, which is computed whatever is cached, as a caller would describe it."""
    tokens = array("I", line["prompt"][:-1])
    mm_hashes: dict[int, list[int]] = {}
    for identifier, offset, length in line.get("images", ()):
        for block in range(offset // block_size, (offset + length - 1) // block_size + 1):
            mm_hashes.setdefault(block, []).append(_mm_hash(identifier))
    full = {block: hashes for block, hashes in mm_hashes.items() if block < len(tokens) // block_size}
    return Prompt(tokens, line.get("lora", ""), line.get("salt", ""), full)


def _no_other_block_size(_target: Target, block_size: int) -> None:
    raise AssertionError(f"blocks of {block_size} tokens were refused")
