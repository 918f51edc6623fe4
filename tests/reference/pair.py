"""The compiled tree and its twin, driven in step: every call goes to both and every answer is compared."""

from array import array

from kvrouter_grpc.core import RadixTree, hash_sequence
from reference.radix import ReferenceTree, chain, local_hash


class Pair:
    def __init__(self, block_size):
        self.block_size = block_size
        self.tree = RadixTree(block_size)
        self.twin = ReferenceTree(block_size)

    def _both(self, method, *args):
        got = getattr(self.tree, method)(*args)
        expected = getattr(self.twin, method)(*args)
        assert got == expected, (method, args, got, expected)
        return got

    def add_slot(self):
        return self._both("add_slot")

    def remove_slot(self, slot):
        return self._both("remove_slot", slot)

    def clear(self, slot):
        return self._both("clear", slot)

    def store(self, slot, parent, names, tokens, seed, mm_hashes=None, parent_slot=-1):
        return self._both("store", slot, parent, array("Q", names), array("I", tokens), seed, mm_hashes, parent_slot)

    def store_path(self, slot, seqs, seed):
        return self._both("store_path", slot, array("Q", seqs), seed)

    def remove_path(self, slot, seqs):
        return self._both("remove_path", slot, array("Q", seqs))

    def store_known(self, slot, from_slot, names):
        return self._both("store_known", slot, from_slot, array("Q", names))

    def remove(self, slot, names):
        return self._both("remove", slot, array("Q", names))

    def doubt(self, slot):
        return self._both("doubt", slot)

    def drop_doubted(self, slot, *, prefixes):
        most = 1 << 20
        got = self.tree.drop_doubted(slot, most, prefixes=prefixes)
        assert got == self.twin.drop_doubted(slot, most, prefixes=prefixes)
        return got

    def match(self, seqs):
        return self._both("match", array("Q", seqs))

    def extend(self, seqs, slot, start):
        return self._both("extend", array("Q", seqs), slot, start)

    def seqs(self, tokens, seed):
        """Sequence hashes of a prompt, by both hash implementations."""
        size = self.block_size
        tokens = array("I", tokens)
        got = hash_sequence(tokens, size, seed)
        assert list(got) == chain(
            local_hash(tokens[i * size : (i + 1) * size], seed) for i in range(len(tokens) // size)
        )
        return got

    def slots(self):
        return sorted(self.twin.slots)

    def compare(self, name_of_slot=None):
        """Counters and, for every engine hash, where it is; with `name_of_slot` for that slot only."""
        stats = self.tree.stats()
        assert {key: stats[key] for key in self.twin.stats()} == self.twin.stats()
        for slot in self.slots() if name_of_slot is None else [name_of_slot]:
            assert self.tree.blocks(slot) == self.twin.blocks(slot)
            for name in self.twin.slots[slot].names:
                assert self.tree.holds(slot, name)
                assert self.tree.position(slot, name) == self.twin.position(slot, name)

    def finish(self):
        """Clears everything: not a node, not a byte may be left."""
        for slot in self.slots():
            self.clear(slot)
        self.tree._check()
        stats = self.tree.stats()
        assert (stats["blocks"], stats["edges"], stats["runs"]) == (0, 0, 0)
        for slot in self.slots():
            self.remove_slot(slot)
        assert self.tree.stats()["bytes"] == 0
