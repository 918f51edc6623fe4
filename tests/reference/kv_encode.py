"""Typed events to the bytes that vLLM would send, for tests that think in events."""

from msgspec.msgpack import encode

from kvrouter_grpc.types import Tier
from reference.kv_events import BlocksRemoved, BlocksStored

MEDIA = {Tier.DEVICE: "GPU", Tier.HOST: "CPU", Tier.DISK: "DISK", Tier.REMOTE: "REMOTE"}


def encode_batch(events, ts=1.0, dp_rank=0):
    return encode([ts, [_event(event) for event in events], dp_rank])


def _event(event):
    if isinstance(event, BlocksStored):
        return {
            "type": "BlockStored",
            "block_hashes": list(event.hashes),
            "parent_block_hash": event.parent,
            "token_ids": list(event.tokens),
            "block_size": event.block_size,
            "lora_id": None,
            "medium": MEDIA[event.tier],
            "lora_name": event.lora_name or None,
            "extra_keys": _extra_keys(event),
            "group_idx": event.group,
            "kv_cache_spec_kind": event.kind or None,
            "kv_cache_spec_sliding_window": event.window,
        }
    if isinstance(event, BlocksRemoved):
        return {
            "type": "BlockRemoved",
            "block_hashes": list(event.hashes),
            "medium": MEDIA[event.tier],
            "group_idx": event.group,
        }
    return {"type": "AllBlocksCleared"}


def _extra_keys(event):
    keys = []
    for block in range(len(event.hashes)):
        # A digest's first 16 digits are the object's hash.
        beside = [[f"{value:016x}" + "0" * 48, 0] for value in event.mm_hashes.get(block, ())]
        if event.lora_name:
            beside.insert(0, event.lora_name)
        if event.cache_salt and block == 0:
            beside.append(event.cache_salt)
        keys.append(beside or None)
    return keys
