"""A million random calls to the compiled tree and its twin. KVROUTER_RANDOM_CALLS raises the number.

Shape of the load: a few slots whose prompts share prefixes a lot, as in chats; evictions mostly from the tail, as
engines do it, and now and then everything else that may come over the wire.
"""

import os
import random
from array import array

import pytest

from kvrouter_grpc.core import RadixTree
from reference.pair import Pair

CALLS = int(os.environ.get("KVROUTER_RANDOM_CALLS", "1000000"))
SHARDS = 8


class Driver:
    def __init__(self, seed, growth=6, longest=40):
        self.rng = random.Random(seed)
        self.pair = Pair(self.rng.randint(1, 4))
        self.names = {}  # slot -> engine hashes it was given, newest last; some are gone already
        self.prompts = [[]]  # prompts seen, as a source of shared prefixes
        self.next_name = 1
        self.most_names = self.rng.choice([8, 60, 400])
        self.growth, self.longest = growth, longest
        for _ in range(self.rng.randint(2, 6)):
            self.names[self.pair.add_slot()] = []

    def prompt(self):
        """Tokens: a known prefix and a few blocks more, from an alphabet of two."""
        size = self.pair.block_size
        known = self.rng.choice(self.prompts)
        keep = self.rng.randint(0, len(known) // size) * size
        tokens = known[:keep] + self.blocks(self.rng.randint(0, self.growth))
        if len(tokens) > self.longest * size:
            tokens = tokens[: self.longest * size]
        if len(self.prompts) < 200:
            self.prompts.append(tokens)
        else:
            self.prompts[self.rng.randrange(200)] = tokens
        return tokens

    def blocks(self, count):
        return [token for _ in range(count) for token in [self.rng.randint(0, 1)] * self.pair.block_size]

    def new_names(self, slot, count):
        if self.rng.random() < 0.03 and self.names[slot]:  # hashes that the slot has, or had
            return [self.rng.choice(self.names[slot]) for _ in range(count)]
        self.next_name += count
        names = [(name * 0x9E3779B97F4A7C15) % (1 << 64) for name in range(self.next_name - count, self.next_name)]
        self.names[slot] += names
        return names

    def store(self, slot):
        tokens = self.prompt()
        size = self.pair.block_size
        path = self.pair.seqs(tokens, 1337)
        held = self.pair.match(path)[slot]
        parent = None
        if held and self.rng.random() < 0.9:  # as an engine: only what is not cached yet, below the last cached block
            parents = self.by_seq.get((slot, path[held - 1]))
            if parents is not None and self.pair.tree.holds(slot, parents):
                parent, tokens, path = parents, tokens[held * size :], path[held:]
        names = self.new_names(slot, len(path))
        self.by_seq.update(zip(((slot, seq) for seq in path), names, strict=True))
        self.pair.store(slot, parent, names, tokens, 1337)

    def store_anywhere(self, slot):
        parent = self.rng.choice([1, *self.names[slot][-50:]])
        other = self.rng.choice(self.pair.slots())
        blocks = self.rng.randint(0, 5)
        self.pair.store(
            slot, parent, self.new_names(slot, blocks), self.blocks(blocks), 1, None, self.rng.choice([-1, other])
        )

    def evict(self, slot, order):
        held = self.pair.twin.slots[slot].names
        names = self.names[slot]
        while len(held) > self.most_names // 2 and names:
            gone = [names.pop(order(len(names))) for _ in range(min(len(names), self.rng.randint(1, 5)))]
            self.pair.remove(slot, gone)

    def step(self):
        rng = self.rng
        slot = rng.choice(self.pair.slots())
        dice = rng.random()
        if dice < 0.35:
            self.store(slot)
        elif dice < 0.42:
            self.store_anywhere(slot)
        elif dice < 0.72:
            path = self.pair.seqs(self.prompt(), 1337)
            self.pair.match(path)
            self.pair.extend(path, slot, rng.randint(0, len(path) + 1))
        elif dice < 0.92:
            names = self.names[slot]
            if names and rng.random() < 0.8:
                self.pair.remove(slot, [names.pop() for _ in range(min(len(names), rng.randint(1, 4)))])
            else:
                self.pair.remove(slot, [rng.choice(names) if names else 3 for _ in range(rng.randint(0, 4))])
        elif dice < 0.96:
            other = rng.choice(self.pair.slots())
            known = self.names[other][-20:]
            names = rng.sample(known, min(len(known), rng.randint(0, 6)))
            self.pair.store_known(slot, other, names)
            self.names[slot] += names
        elif dice < 0.97:
            path = self.pair.seqs(self.prompt(), 1337)
            self.pair.store_path(slot, path, 1337)
            if rng.random() < 0.5:
                self.pair.remove_path(slot, path)
        elif dice < 0.999:
            if self.pair.tree.blocks(slot) > self.most_names:
                self.evict(slot, rng.choice([lambda n: n - 1, lambda _: 0, rng.randrange]))
        elif dice < 0.9997:
            self.pair.clear(slot)
            self.names[slot] = []
        else:
            self.pair.remove_slot(slot)
            self.names[slot] = []
            self.names[self.pair.add_slot()] = []

    by_seq: dict

    def run(self, calls):
        self.by_seq = {}
        for call in range(calls):
            self.step()
            if len(self.by_seq) > 50_000:
                self.by_seq.clear()
            if call % 200 == 0:
                self.pair.tree._check()
                self.pair.compare()
        self.pair.finish()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_million_random_calls(shard):
    rounds = 10
    for part in range(rounds):
        Driver(1000 * shard + part).run(CALLS // SHARDS // rounds)


def test_long_prompts():
    """Edges of hundreds of blocks, so that the bit sets of gaps span several words."""
    for seed in range(5):
        Driver(seed, growth=90, longest=300).run(CALLS // 500)


def test_no_memory_at_any_point_leaves_the_tree_whole():
    """Each limit makes another allocation fail; the books must agree after every call, and nothing may leak."""
    failures = 0
    for seed in range(300):
        rng = random.Random(seed)
        tree = RadixTree(1, max_bytes=rng.randint(500, 12_000))
        slots = []
        for _ in range(150):
            try:
                dice = rng.random()
                if not slots or dice < 0.05:
                    slots.append(tree.add_slot())
                    continue
                slot = rng.choice(slots)
                count = rng.randint(1, 12)
                names = array("Q", (rng.randrange(60) for _ in range(count)))
                tokens = array("I", (rng.randrange(2) for _ in range(count)))
                parent = rng.choice([None, rng.randrange(60)])
                if dice < 0.6:
                    tree.store(slot, parent, names, tokens, 1337)
                elif dice < 0.7:
                    tree.store_known(slot, rng.choice(slots), names)
                elif dice < 0.97:
                    tree.remove(slot, names)
                else:
                    tree.clear(slot)
            except MemoryError:
                failures += 1
            tree._check()
        for slot in slots:
            tree.clear(slot)
        tree._check()
        assert tree.stats()["edges"] == 0
        for slot in slots:
            tree.remove_slot(slot)
        assert tree.stats()["bytes"] == 0
    assert failures > 1000  # otherwise the limits are too generous to prove anything
