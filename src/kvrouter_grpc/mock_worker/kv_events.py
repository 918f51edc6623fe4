"""What a block manager tells the world, and the spellings that vLLM has had for it on the wire."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from kvrouter_grpc.mock_worker.config import EventFormat, HashFormat

GROUP = 0  # one attention kind, so one group of KV blocks
SPEC_KIND = "full_attention"
MEDIUM = "GPU"


class BlockStored(NamedTuple):
    """Blocks became reusable, in prompt order; the first follows `parent` (None: it starts the prompt)."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    tokens: list[int]  # block_size per hash
    block_size: int
    lora_id: int | None
    lora_name: str | None
    extra_keys: list[list[str] | None]  # per block: what besides its tokens went into its hash
    session_id: str | None


class BlockRemoved(NamedTuple):
    """One physical block lost its content."""

    hash: bytes


class AllBlocksCleared(NamedTuple):
    """The whole prefix cache was reset."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


def event_hash(digest: bytes, hash_format: HashFormat) -> int | bytes:
    """A block hash as events carry it: all 32 bytes, or their low 64 bits as an unsigned integer."""
    return digest if hash_format == "bytes" else int.from_bytes(digest[-8:], "big")


def encode_batch(
    ts: float, events: Sequence[KvEvent], dp_rank: int, event_format: EventFormat, hash_format: HashFormat
) -> bytes:
    """The msgpack payload of one scheduler step.

    `[ts, [event...], dp_rank]` with each event a map tagged `type` (vLLM since 0.24) or an array tagged by its first
    element (before); `batch-map` spells the batch itself as a map, too.
    """
    as_map = event_format != "array"
    wire = [_as_map(event, hash_format) if as_map else _as_array(event, hash_format) for event in events]
    if event_format == "batch-map":
        return msgspec.msgpack.encode({"ts": ts, "events": wire, "data_parallel_rank": dp_rank})
    return msgspec.msgpack.encode([ts, wire, dp_rank])


def _as_map(event: KvEvent, hash_format: HashFormat) -> dict[str, Any]:
    match event:
        case BlockStored():
            body = {
                "type": "BlockStored",
                "block_hashes": [event_hash(digest, hash_format) for digest in event.hashes],
                "parent_block_hash": None if event.parent is None else event_hash(event.parent, hash_format),
                "token_ids": event.tokens,
                "block_size": event.block_size,
                "lora_id": event.lora_id,
                "medium": MEDIUM,
                "lora_name": event.lora_name,
                "extra_keys": event.extra_keys,
                "group_idx": GROUP,
                "kv_cache_spec_kind": SPEC_KIND,
            }
            if event.session_id is not None:
                body["session_id"] = event.session_id
            return body
        case BlockRemoved():
            hashes = [event_hash(event.hash, hash_format)]
            return {"type": "BlockRemoved", "block_hashes": hashes, "medium": MEDIUM, "group_idx": GROUP}
        case AllBlocksCleared():
            return {"type": "AllBlocksCleared"}


def _as_array(event: KvEvent, hash_format: HashFormat) -> list[Any]:
    match event:
        case BlockStored():
            return [
                "BlockStored",
                [event_hash(digest, hash_format) for digest in event.hashes],
                None if event.parent is None else event_hash(event.parent, hash_format),
                event.tokens,
                event.block_size,
                event.lora_id,
                MEDIUM,
                event.lora_name,
                event.extra_keys,
                GROUP,
                SPEC_KIND,
                None,  # sliding window
            ]
        case BlockRemoved():
            return ["BlockRemoved", [event_hash(event.hash, hash_format)], MEDIUM, GROUP]
        case AllBlocksCleared():
            return ["AllBlocksCleared"]
