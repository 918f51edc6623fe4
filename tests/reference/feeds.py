"""Compiled feeds and their twins, driven in step: every message goes to both and what it did is compared."""

from functools import partial

from kvrouter_grpc.core import BatchError, KvFeed, RadixTree
from reference.kv_codec import CodecError
from reference.kv_feed import ReferenceFeed, ReferenceIndex


class FeedPair:
    """Some targets on one tree. `block_size` None: learned from the first event."""

    def __init__(self, targets, block_size=None):
        self.tree = None
        self.differing = []
        self.index = ReferenceIndex()
        self.feeds = [KvFeed(self._learn, self._place, lambda _: None) for _ in range(targets)]
        self.twins = [ReferenceFeed(self.index) for _ in range(targets)]
        if block_size:
            self._learn(block_size, False)
            self.index.learn(block_size, False)

    def _learn(self, block_size, several):
        if self.tree is None:
            self.tree = RadixTree(block_size)
        if self.tree.block_size == block_size or (several and block_size % self.tree.block_size == 0):
            return self.tree
        self.differing.append(block_size)
        return None

    def _place(self, _group, _tier):
        return self.tree.add_slot()

    def apply(self, target, payload):
        """Skipped events, None when the message was refused."""
        got = _outcome(partial(self.feeds[target].apply, payload), BatchError)
        expected = _outcome(partial(self.twins[target].apply, payload), CodecError)
        assert (None if got is None else got.skipped) == expected
        assert self.differing == self.index.differing
        assert self.feeds[target].orphans == self.twins[target].orphans.blocks
        assert self.feeds[target].adopted == self.twins[target].orphans.adopted
        assert self.feeds[target].dropped == self.twins[target].orphans.dropped
        if self.tree is not None:
            stats, twin = self.tree.stats(), self.index.tree.stats()
            assert {key: stats[key] for key in twin} == twin
        return expected

    def compare(self):
        """Where every engine hash is."""
        if self.tree is None:
            assert self.index.tree is None
            return
        self.tree._check()
        for slot, held in self.index.tree.slots.items():
            assert self.tree.blocks(slot) == len(held.names)
            for name in held.names:
                assert self.tree.position(slot, name) == self.index.tree.position(slot, name)

    def finish(self):
        """Clears everything: not a node, not a byte may be left."""
        self.compare()
        for feed in self.feeds:
            feed.clear()
            assert feed.orphans == 0
            feed.close()
            assert feed.bytes == 0
        if self.tree is None:
            return
        self.tree._check()
        stats = self.tree.stats()
        assert (stats["blocks"], stats["edges"], stats["runs"]) == (0, 0, 0)
        for slot in list(self.index.tree.slots):
            self.tree.remove_slot(slot)
        assert self.tree.stats()["bytes"] == 0


def _outcome(apply, refusal):
    try:
        return apply()
    except refusal:
        return None
