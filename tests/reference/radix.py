"""The naive twin of the radix tree: dictionaries and sets, slow and obviously right.

It hashes with the PyPI package `xxhash`, so that it shares nothing with the compiled core, not even the hash.
"""

import struct
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import xxhash

MOST_REFERENCES = 131_071


@lru_cache(maxsize=1 << 16)
def _xxh3(data, seed):
    return xxhash.xxh3_64_intdigest(data, seed)


def local_hash(tokens, seed, mm_hashes=()):
    data = struct.pack(f"<{len(tokens)}I", *tokens)
    data += struct.pack(f"<{len(mm_hashes)}Q", *sorted(mm_hashes))
    return _xxh3(data, seed)


def next_hash(parent, local):
    return local if parent is None else _xxh3(struct.pack("<QQ", parent, local), 1337)


def chain(local_hashes, parent=None):
    hashes = []
    for local in local_hashes:
        parent = next_hash(parent, local)
        hashes.append(parent)
    return hashes


class Block(NamedTuple):
    """A position of the tree: equal prefixes have equal chained hashes."""

    seq: int
    depth: int
    seed: int


@dataclass
class Slot:
    """Engine hash to the block it names and how often it was stored."""

    names: dict[int, tuple[Block, int]] = field(default_factory=dict)
    held: Counter = field(default_factory=Counter)  # (seq, depth) -> engine hashes that name it
    doubted: set[int] = field(default_factory=set)  # engine hashes
    stored: int = 0

    def gain(self, block):
        self.held[block.seq, block.depth] += 1

    def lose(self, block):
        self.held[block.seq, block.depth] -= 1
        if not self.held[block.seq, block.depth]:
            del self.held[block.seq, block.depth]


class ReferenceTree:
    def __init__(self, block_size):
        self.block_size = block_size
        self.slots = {}
        self.above = {}  # block -> the block before it
        self.duplicates = 0
        self.conflicts = 0
        self.unknown_removes = 0

    def add_slot(self):
        slot = next(slot for slot in range(len(self.slots) + 1) if slot not in self.slots)
        self.slots[slot] = Slot()
        return slot

    def remove_slot(self, slot):
        del self.slots[slot]

    def clear(self, slot):
        dropped = len(self.slots[slot].names)
        self.slots[slot] = Slot(stored=self.slots[slot].stored)
        return dropped

    def store(self, slot, parent, engine_hashes, tokens, seed, mm_hashes=None, parent_slot=-1):
        block = None
        if parent is not None:
            known = self.slots[slot if parent_slot == -1 else parent_slot].names.get(parent)
            if known is None:
                return False
            block = known[0]
            seed = block.seed
        size = self.block_size
        for i, name in enumerate(engine_hashes):
            local = local_hash(tokens[i * size : (i + 1) * size], seed, (mm_hashes or {}).get(i, ()))
            block = self._below(block, next_hash(block.seq, local)) if block else Block(local, 0, seed)
            self._name(self.slots[slot], name, block)
        return True

    def _below(self, block, seq):
        below = Block(seq, block.depth + 1, block.seed)
        self.above[below] = block
        return below

    def store_path(self, slot, seqs, seed):
        block = None
        for seq in seqs:
            block = self._below(block, seq) if block else Block(seq, 0, seed)
            self._name(self.slots[slot], seq, block)

    def remove_path(self, slot, seqs):
        for seq in reversed(seqs):
            self._take(self.slots[slot], seq)

    def store_known(self, slot, from_slot, engine_hashes):
        known = 0
        for name in engine_hashes:
            if name in self.slots[from_slot].names:
                self._name(self.slots[slot], name, self.slots[from_slot].names[name][0])
                known += 1
        return known

    def path_to(self, slot, name, width):
        """The `width` blocks that end with the one a slot knows by this name; None when there are fewer."""
        path = [self.slots[slot].names[name][0]]
        while len(path) < width and path[0] in self.above:
            path.insert(0, self.above[path[0]])
        return path if len(path) == width else None

    def store_at(self, slot, name, block):
        self._name(self.slots[slot], name, block)

    def _name(self, slot, name, block):
        old, references = slot.names.get(name, (None, 0))
        slot.stored += 1
        if name in slot.doubted:
            slot.doubted.remove(name)
            references = 0
        if old == block:
            slot.names[name] = block, min(references + 1, MOST_REFERENCES)
            self.duplicates += 1
            return
        slot.gain(block)
        if old is not None:
            slot.lose(old)
            self.conflicts += 1
        slot.names[name] = block, 1

    def remove(self, slot, engine_hashes):
        unknown = sum(not self._take(self.slots[slot], name) for name in engine_hashes)
        self.unknown_removes += unknown
        return unknown

    def _take(self, slot, name):
        """Takes one reference; whether there was one."""
        block, references = slot.names.get(name, (None, 0))
        if references > 1:
            slot.names[name] = block, references - 1
        elif references == 1:
            del slot.names[name]
            slot.lose(block)
            slot.doubted.discard(name)
        return references > 0

    def doubt(self, slot):
        self.slots[slot].doubted = set(self.slots[slot].names)
        return len(self.slots[slot].names)

    def drop_doubted(self, slot, most, *, prefixes=False):
        """All of them at once: which ones go first is the core's own affair, so `most` must not be what limits it."""
        slot = self.slots[slot]
        vouched = set()
        for name in slot.names.keys() - slot.doubted:
            block = slot.names[name][0]
            while prefixes and block is not None and block not in vouched:
                vouched.add(block)
                block = self.above.get(block)
        dropped = 0
        for name in slot.doubted:
            block = slot.names[name][0]
            if block in vouched:
                slot.names[name] = block, 1
            else:
                del slot.names[name]
                slot.lose(block)
                dropped += 1
        slot.doubted = set()
        assert dropped <= most
        return dropped

    def stored(self, slot):
        return self.slots[slot].stored

    def holds(self, slot, engine_hash):
        return engine_hash in self.slots[slot].names

    def position(self, slot, engine_hash):
        if engine_hash not in self.slots[slot].names:
            return None
        block = self.slots[slot].names[engine_hash][0]
        return block.seq, block.depth

    def _span(self, slot, seqs, start):
        held = self.slots[slot].held
        end = start
        while end < len(seqs) and (seqs[end], end) in held:
            end += 1
        return end - start

    def match(self, seqs):
        out = array("I", [0] * (max(self.slots, default=-1) + 1))
        for slot in self.slots:
            out[slot] = self._span(slot, seqs, 0)
        return out

    def extend(self, seqs, slot, start):
        return self._span(slot, seqs, start) if start < len(seqs) else 0

    def blocks(self, slot):
        return len(self.slots[slot].names)

    def stats(self):
        return {
            "slots": len(self.slots),
            "blocks": sum(len(slot.names) for slot in self.slots.values()),
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
            "unknown_removes": self.unknown_removes,
        }
