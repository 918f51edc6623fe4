"""The work that every side of a comparison is given: equal seeds make equal bytes in every process.

Only the standard library and msgspec are needed, so that the peers' environments can import it as well.
"""

import functools
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

BLOCK = 16  # tokens
VOCAB = 1 << 17  # ids below 131,072: half of them take three bytes in msgpack, half five, as with today's models
MODEL = "bench"

SYSTEM_PROMPTS = 8
SYSTEM_PROMPT_BLOCKS = (64, 256)
TAIL_BLOCKS = (16, 512)


def tokens(rng: random.Random, count: int) -> "array[int]":
    """Random token ids, u32."""
    mask = int.from_bytes((VOCAB - 1).to_bytes(4, "little") * count, "little")
    drawn = int.from_bytes(rng.randbytes(4 * count), "little") & mask
    return array("I", drawn.to_bytes(4 * count, "little"))


def names(rng: random.Random, count: int) -> "array[int]":
    """Random engine hashes, u64."""
    return array("Q", rng.randbytes(8 * count))


def prompt(count: int, seed: int = 1) -> "array[int]":
    """One prompt."""
    return tokens(random.Random(f"prompt {count} {seed}"), count)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks that an engine stored: their names, their tokens, and the block before them."""

    parent: int | None
    names: "array[int]"
    tokens: "array[int]"

    def split(self, blocks: int) -> Iterator["Run"]:
        """The same as runs of at most `blocks` blocks, each below the one before."""
        parent = self.parent
        for start in range(0, len(self.names), blocks):
            part = self.names[start : start + blocks]
            yield Run(parent, part, self.tokens[start * BLOCK : (start + len(part)) * BLOCK])
            parent = part[-1]


@dataclass(frozen=True, slots=True)
class Shape:
    """How many blocks an event has, and how many events a message."""

    per_event: int
    per_message: int = 1


def fleet(workers: int, blocks_each: int, seed: int = 1) -> Iterator[list[Run]]:
    """What each worker of a fleet caches, in the order in which it was stored.

    There are 8 system prompts of 64 to 256 blocks, the same on all workers. A conversation is one of them and a tail
    of 16 to 512 blocks that only one worker holds. The first one with a system prompt stores it, the others store
    their tails below it, as an engine with prefix caching does.
    """
    rng = random.Random(f"fleet {seed}")
    shared = [_run(rng, rng.randint(*SYSTEM_PROMPT_BLOCKS), None) for _ in range(SYSTEM_PROMPTS)]
    for _ in range(workers):
        runs: list[Run] = []
        left, held = blocks_each, set[int]()
        while left > 0:
            which = rng.randrange(SYSTEM_PROMPTS)
            system = shared[which]
            if which not in held:
                if len(system.names) > left:
                    system = next(system.split(left))
                held.add(which)
                runs.append(system)
                left -= len(system.names)
            length = min(rng.randint(*TAIL_BLOCKS), left)
            if length:
                runs.append(_run(rng, length, system.names[-1]))
                left -= length
        yield runs


def _run(rng: random.Random, blocks: int, parent: int | None) -> Run:
    return Run(parent, names(rng, blocks), tokens(rng, blocks * BLOCK))


def removals(runs: Sequence[Run], per_event: int) -> Iterator["array[int]"]:
    """The names of all blocks as an engine evicts them: of the newest run first, from its end."""
    for run in reversed(runs):
        backwards = run.names[::-1]
        for start in range(0, len(backwards), per_event):
            yield backwards[start : start + per_event]


def rounds(queues: Sequence[Sequence[bytes]]) -> Iterator[tuple[int, bytes]]:
    """Takes from the workers' queues in turn, each in its own order: (worker, message)."""
    for position in range(max(map(len, queues), default=0)):
        for worker, queue in enumerate(queues):
            if position < len(queue):
                yield worker, queue[position]


# --- vLLM's wire -----------------------------------------------------------------------------------------------------


def stored_messages(runs: Sequence[Run], shape: Shape) -> list[bytes]:
    """The payloads by which vLLM (0.24 and later) tells of stored runs."""
    return _messages([_stored(part) for run in runs for part in run.split(shape.per_event)], shape)


def removed_messages(runs: Sequence[Run], shape: Shape) -> list[bytes]:
    """The payloads by which it tells that they were evicted, `per_event` blocks at once."""
    return _messages([_removed(part) for part in removals(runs, shape.per_event)], shape)


def _messages(events: Sequence[dict[str, object]], shape: Shape) -> list[bytes]:
    size = shape.per_message
    return [
        msgspec.msgpack.encode([1_800_000_000.25, events[start : start + size], 0])
        for start in range(0, len(events), size)
    ]


def _stored(run: Run) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": run.names.tolist(),
        "parent_block_hash": run.parent,
        "token_ids": run.tokens.tolist(),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(run.names),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def _removed(part: "array[int]") -> dict[str, object]:
    return {"type": "BlockRemoved", "block_hashes": part.tolist(), "medium": "GPU", "group_idx": 0}


# --- prompts ---------------------------------------------------------------------------------------------------------

POOL = 64
WARM = 16
COMMON = 4  # prefixes that prompts of a pool share


@dataclass(frozen=True, slots=True)
class Pool:
    """Prompts of one length. Every second one begins with one of four prefixes, three quarters of its length.

    Attributes:
        warm: Prompts that workers hold: prompt i is on worker i, modulo their number.
        queries: Prompts to ask with.
    """

    warm: tuple["array[int]", ...]
    queries: tuple["array[int]", ...]

    def held_by(self, worker: int, workers: int) -> list[Run]:
        """What one of `workers` workers holds of the warm prompts."""
        runs = []
        for position in range(worker, len(self.warm), workers):
            held = self.warm[position]
            blocks = len(held) // BLOCK
            rng = random.Random(f"names {len(held)} {position}")
            runs.append(Run(None, names(rng, blocks), held[: blocks * BLOCK]))
        return runs


@functools.lru_cache(maxsize=8)
def pool(length: int) -> Pool:
    """The prompts of `length` tokens."""
    rng = random.Random(f"pool {length}")
    common = length * 3 // 4 // BLOCK * BLOCK
    prefixes = [tokens(rng, common) for _ in range(COMMON)]

    def draw(position: int) -> "array[int]":
        head = prefixes[position // 2 % COMMON] if position % 2 == 0 else array("I")
        return head + tokens(rng, length - len(head))

    return Pool(tuple(draw(i) for i in range(WARM)), tuple(draw(i) for i in range(POOL)))


def match_depths(workers: int, blocks: int, shape: str, number: int) -> list[int]:
    """How much of prompt `number` each worker holds.

    `part`: all hold a quarter. `full`: all hold a quarter, every fourth worker a half, one worker everything.
    """
    if shape == "part":
        return [blocks // 4] * workers
    deepest = number % workers
    return [
        blocks if worker == deepest else blocks // 2 if worker % 4 == 0 else blocks // 4 for worker in range(workers)
    ]
