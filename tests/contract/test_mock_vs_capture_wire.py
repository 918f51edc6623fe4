"""The mock's bytes against real vLLM's: an event that was captured is encoded to the very bytes that were captured."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvrouter_grpc.mock_worker.config import EventFormat
from kvrouter_grpc.mock_worker.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, encode_batch

CAPTURES = Path(__file__).parent / "captures"
MAPS = [
    "v0.32.0-int-bs32-lora.jsonl",
    "v0.28.0-int-bs16.jsonl",
    "v0.32.0-bytes-cbor-bs32.jsonl",
    "v0.32.0-dp2-bs32.jsonl",
]


def digest(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.to_bytes(32, "big")


def event_of(wire: dict[str, Any]) -> KvEvent:
    match wire["type"]:
        case "BlockStored":
            parent = wire["parent_block_hash"]
            return BlockStored(
                hashes=tuple(map(digest, wire["block_hashes"])),
                parent=None if parent is None else digest(parent),
                tokens=wire["token_ids"],
                block_size=wire["block_size"],
                lora_id=wire["lora_id"],
                lora_name=wire["lora_name"],
                extra_keys=wire["extra_keys"],
                session_id=wire.get("session_id"),
            )
        case "BlockRemoved":
            (removed,) = wire["block_hashes"]
            return BlockRemoved(digest(removed))
        case "AllBlocksCleared":
            return AllBlocksCleared()
    raise AssertionError(wire["type"])


@pytest.mark.parametrize("capture", MAPS)
def test_maps_are_encoded_byte_for_byte(capture: str) -> None:
    frames = [
        entry["frames"]
        for line in (CAPTURES / capture).read_text().splitlines()
        if "frames" in (entry := json.loads(line))
    ]
    assert frames
    for _, _, payload_hex in frames:
        payload = bytes.fromhex(payload_hex)
        ts, events, dp_rank = msgspec.msgpack.decode(payload)
        hash_format = "bytes" if "bytes" in capture else "int"
        assert encode_batch(ts, [event_of(wire) for wire in events], dp_rank, "map", hash_format) == payload


@pytest.mark.parametrize(("event_format", "release"), [("map", "0.24.0"), ("array", "0.22.0")])
def test_both_generations_are_spelled_like_their_release(event_format: EventFormat, release: str) -> None:
    """The re-encoded file has the same events in every layout; the map one says what they mean."""
    batches: dict[str, list[Any]] = {}
    for line in (CAPTURES / "reencoded-old-formats.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "vllm" in entry:
            batches.setdefault(entry["vllm"], []).append(entry["decoded"])
    assert len(batches["0.24.0"]) == len(batches[release]) > 0
    for (ts, events, dp_rank), expected in zip(batches["0.24.0"], batches[release], strict=True):
        encoded = encode_batch(ts, [event_of(wire) for wire in events], dp_rank, event_format, "int")
        assert msgspec.msgpack.decode(encoded) == expected


def test_a_batch_can_be_a_map() -> None:
    encoded = encode_batch(1.5, [AllBlocksCleared()], 3, "batch-map", "int")
    assert msgspec.msgpack.decode(encoded) == {
        "ts": 1.5,
        "events": [{"type": "AllBlocksCleared"}],
        "data_parallel_rank": 3,
    }
