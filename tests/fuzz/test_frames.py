"""Damaged messages of real engines: nothing but a batch or a CodecError comes out, and the index survives every batch.

KVROUTER_FUZZ_FRAMES sets how many (100,000 by default); KVROUTER_FUZZ_SEED which ones.
"""

import os
import random
from array import array
from collections.abc import Iterator

import pytest

from contract.captured import all_payloads
from kvrouter_grpc.events.codec import CodecError, CodecLimits, decode_batch
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.types import BlocksRemoved, BlocksStored, CacheCleared, KvBatch, Target, Tier

FRAMES = int(os.environ.get("KVROUTER_FUZZ_FRAMES", "100000"))
SEED = int(os.environ.get("KVROUTER_FUZZ_SEED", "20260101"))

# Bytes that mean something to msgpack: collection and text headers, nil, booleans, numbers at their limits.
TELLING = bytes.fromhex("80818f90919fa0a1bfc0c1c2c3c4c6c7c9cacbcccfd0d3d4d8d9dbdcdddedfe0ff007f")
WORDS = [b"BlockStored", b"BlockRemoved", b"AllBlocksCleared", b"type", b"block_hashes", b"token_ids", b"block_size"]
WORDS += [b"extra_keys", b"parent_block_hash", b"lora_name", b"lora_id", b"medium", b"group_idx", b"ts", b"events"]


def mutate(rng: random.Random, payload: bytes, others: list[bytes]) -> bytes:
    data = bytearray(payload)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randrange(1, 24))
        kind = rng.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice(TELLING)
        elif kind == 2:
            data[at:end] = b""
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 12))
        elif kind == 4:
            data[at:at] = bytes([rng.choice(TELLING)]) * rng.choice((1, 2, 9, 2000))
        elif kind == 5:
            data[at:at] = data[at:end] * rng.randrange(1, 5)
        elif kind == 6:
            other = rng.choice(others)
            cut = rng.randrange(len(other))
            data[at:] = other[cut:]
        elif kind == 7:
            old, new = rng.sample(WORDS, 2)
            data = data.replace(old, new, 1)
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def frames(count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    seeds = all_payloads()
    small = [payload for payload in seeds if len(payload) < 1500]
    for _ in range(count):
        yield mutate(rng, rng.choice(small if rng.random() < 0.9 else seeds), seeds)


def check(batch: KvBatch) -> None:
    """What the rest of the router takes for granted of a batch."""
    assert isinstance(batch, KvBatch)
    assert batch.skipped >= 0
    for event in batch.events:
        if isinstance(event, CacheCleared):
            continue
        assert isinstance(event, BlocksStored | BlocksRemoved)
        assert isinstance(event.hashes, array)
        assert event.hashes.typecode == "Q"
        assert isinstance(event.tier, Tier)
        assert isinstance(event.group, int)
        if isinstance(event, BlocksStored):
            assert event.tokens.typecode == "I"
            assert not event.tokens or len(event.tokens) == len(event.hashes) * event.block_size > 0
            assert event.parent is None or 0 <= event.parent < 2**64
            assert isinstance(event.lora_name, str)
            assert isinstance(event.cache_salt, str)
            assert isinstance(event.kind, str)
            for block, hashes in event.mm_hashes.items():
                assert block >= 0
                assert all(0 <= value < 2**64 for value in hashes)


@pytest.mark.timeout(3600)
def test_damaged_messages() -> None:
    limits = CodecLimits(max_payload_bytes=1 << 20)
    read = refused = skipped = 0
    for payload in frames(FRAMES, SEED):
        try:
            batch = decode_batch(payload, limits)
        except CodecError:
            refused += 1
            continue
        check(batch)
        read += 1
        skipped += batch.skipped
    # Mutations that only ever break the envelope, or never do, would test little.
    assert read > FRAMES / 20
    assert refused > FRAMES / 20
    assert skipped > FRAMES / 50


@pytest.mark.timeout(3600)
def test_the_index_survives_what_the_codec_lets_through() -> None:
    target = Target(1, 0)
    index = KvIndex(None, lambda *_: None)
    index.add(target)
    for payload in frames(FRAMES // 4, SEED + 1):
        try:
            batch = decode_batch(payload)
        except CodecError:
            continue
        index.apply(target, batch)
    assert index.blocks(target) > 0
    index.clear(target)
    assert index.blocks(target) == 0
