"""Damaged messages of real engines: the compiled feed and its twin must do the same with each, and nothing may crash.

KVROUTER_FUZZ_FRAMES sets how many (100,000 by default); KVROUTER_FUZZ_SEED which ones.
"""

import os
import random
import sys
from collections.abc import Iterator

import pytest

from contract.captured import all_payloads
from contract.hybrid import payloads, recorded
from reference.feeds import FeedPair
from reference.kv_stream import Stream

FRAMES = int(os.environ.get("KVROUTER_FUZZ_FRAMES", "100000"))
SEED = int(os.environ.get("KVROUTER_FUZZ_SEED", "20260101"))
SHARDS = 10

# Bytes that mean something to msgpack: collection and text headers, nil, booleans, numbers at their limits.
TELLING = bytes.fromhex("80818f90919fa0a1bfc0c1c2c3c4c6c7c9cacbcccfd0d3d4d8d9dbdcdddedfe0ff007f")
WORDS = [b"BlockStored", b"BlockRemoved", b"AllBlocksCleared", b"type", b"block_hashes", b"token_ids", b"block_size"]
WORDS += [b"extra_keys", b"parent_block_hash", b"lora_name", b"lora_id", b"medium", b"group_idx", b"ts", b"events"]


def mutate(rng: random.Random, payload: bytes, others: list[bytes]) -> bytes:
    data = bytearray(payload)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 8))):
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
    seeds = [*all_payloads(), *payloads(recorded())]
    small = [payload for payload in seeds if len(payload) < 1500]
    stream = Stream(rng)
    for _ in range(count):
        dice = rng.random()
        source = stream.message() if dice < 0.5 else rng.choice(small if dice < 0.95 else seeds)
        # Sound messages in between: without them there would soon be nothing that damage could harm.
        yield source if rng.random() < 0.4 else mutate(rng, source, seeds)


@pytest.fixture
def deep():
    """The twin's parser recurses; the compiled one does not, so it must not be told apart by depth."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(40_000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_damaged_messages_do_what_the_twin_says(shard: int) -> None:
    rng = random.Random(shard)
    pair = FeedPair(targets=3, block_size=rng.choice([2, 16, 32]))
    read = refused = skipped = 0
    for number, payload in enumerate(frames(FRAMES // SHARDS, SEED + shard)):
        outcome = pair.apply(rng.randrange(3), payload)
        if outcome is None:
            refused += 1
            continue
        read += 1
        skipped += outcome
        if number % 100 == 0:
            pair.compare()
    pair.finish()
    # Mutations that only ever break the envelope, or never do, would test little.
    assert read > FRAMES / SHARDS / 20
    assert refused > FRAMES / SHARDS / 20
    assert skipped > FRAMES / SHARDS / 50
