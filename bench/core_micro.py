"""Micro-benchmark of the compiled core: nanoseconds per operation and bytes per block. Run: python bench/core_micro.py.

Fixed seeds; each figure is the best of a few rounds, so that a busy machine disturbs it least.
"""

import json
import random
import time
from array import array
from collections.abc import Callable

from kvrouter_grpc.core import RadixTree, hash_blocks, hash_sequence

BLOCK = 16
SEED = 1337
ROUNDS = 5


def best(call: Callable[[], object], per: int, rounds: int = ROUNDS) -> float:
    """Nanoseconds per item of a call that handles `per` items."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return min(times) / per


def tokens_of(rng: random.Random, blocks: int) -> "array[int]":
    """Random token ids of a vocabulary of 128k."""
    return array("I", rng.choices(range(128_000), k=blocks * BLOCK))


def names_of(rng: random.Random, blocks: int) -> "array[int]":
    """Random engine hashes."""
    return array("Q", (rng.getrandbits(64) for _ in range(blocks)))


def hashing(rng: random.Random) -> dict[str, float]:
    """Block and sequence hashing of one long prompt."""
    tokens = tokens_of(rng, 8192)
    return {
        "hash_blocks, ns/block": best(lambda: hash_blocks(tokens, BLOCK), 8192),
        "hash_sequence, ns/block": best(lambda: hash_sequence(tokens, BLOCK), 8192),
    }


def matching(rng: random.Random) -> dict[str, float]:
    """A prompt of 8,192 blocks that 256 workers hold to different lengths."""
    tree = RadixTree(BLOCK)
    tokens = tokens_of(rng, 8192)
    for _ in range(256):
        held = rng.randrange(1, 8193)
        tree.store(tree.add_slot(), None, names_of(rng, held), tokens[: held * BLOCK], SEED)
    seqs = hash_sequence(tokens, BLOCK)
    out = array("I", bytes(4 * 256))

    def many() -> None:
        for _ in range(1000):
            tree.match(seqs, out)

    plain = best(many, 1000)
    for _ in range(64):  # branches cut the path into 65 edges
        at = rng.randrange(1, 8192)
        tree.store(0, None, names_of(rng, at + 1), tokens[: at * BLOCK] + tokens_of(rng, 1), SEED)
    return {"match 8192 x 256, ns": plain, "match 8192 x 256, 64 branches, ns": best(many, 1000)}


def events(rng: random.Random) -> dict[str, float]:
    """64 workers x 20,000 mostly distinct blocks: stored prompt by prompt, evicted tail first."""
    workers, prompts, length, shared = 64, 625, 32, 4
    system = tokens_of(rng, shared)
    work = [
        (worker, names_of(rng, length), system + tokens_of(rng, length - shared))
        for worker in range(workers)
        for _ in range(prompts)
    ]
    rng.shuffle(work)
    tree = RadixTree(BLOCK)
    for _ in range(workers):
        tree.add_slot()
    blocks = len(work) * length

    def store() -> None:
        for worker, names, tokens in work:
            tree.store(worker, None, names, tokens, SEED)

    evictions = [(worker, array("Q", reversed(names))) for worker, names, _ in work]

    def remove() -> None:
        for worker, names in evictions:
            tree.remove(worker, names)

    one_by_one = [(worker, names[i : i + 1]) for worker, names in evictions[:10_000] for i in range(length)]

    def remove_one_by_one() -> None:
        for worker, names in one_by_one:
            tree.remove(worker, names)

    result = {"store, ns/block": best(store, blocks, 1)}
    result["bytes/block"] = tree.stats()["bytes"] / blocks
    result["remove, 32 per call, ns/block"] = best(remove, blocks, 1)
    result["bytes left"] = tree.stats()["bytes"]
    store()
    result["remove, 1 per call, ns/block"] = best(remove_one_by_one, len(one_by_one), 1)
    result["clear, ns/block"] = best(lambda: [tree.clear(w) for w in range(workers)], blocks - len(one_by_one), 1)
    return result


def decoding(rng: random.Random) -> dict[str, float]:
    """Generation: one block at a time below the last one."""
    tree = RadixTree(BLOCK)
    slot = tree.add_slot()
    steps = [(names_of(rng, 1), tokens_of(rng, 1)) for _ in range(20_000)]

    def grow() -> None:
        parent = None
        for names, tokens in steps:
            tree.store(slot, parent, names, tokens, SEED)
            parent = names[0]

    return {"store, 1 per call, ns/block": best(grow, len(steps), 1)}


def main() -> None:
    """Prints a table, and as the last line the same as JSON."""
    rng = random.Random(1)
    result = {}
    for part in (hashing, matching, events, decoding):
        result.update(part(rng))
    for name, value in result.items():
        print(f"{name:<40}{value:>12.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
