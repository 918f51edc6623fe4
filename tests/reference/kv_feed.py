"""The twin of `KvFeed`: typed events into the naive tree."""

from array import array

from kvrouter_grpc.types import Tier
from reference.kv_codec import decode_batch
from reference.kv_events import BlocksRemoved, BlocksStored
from reference.orphans import OrphanLot
from reference.radix import ReferenceTree, _xxh3

PREFIX_KINDS = {"", "full_attention", "mla_attention", "sink_full_attention"}


def seed_for(lora_name, cache_salt):
    seed = 1337
    if lora_name:
        seed += _xxh3(lora_name.encode(), 0)
    if cache_salt:
        seed += _xxh3(cache_salt.encode(), 1)
    return seed % 2**64


class ReferenceIndex:
    """Feeds of several targets on one tree, made when the block size is known."""

    def __init__(self, block_size=None):
        self.tree = ReferenceTree(block_size) if block_size else None
        self.differing = []  # block sizes that did not fit

    def learn(self, block_size):
        if self.tree is None:
            self.tree = ReferenceTree(block_size)
        if self.tree.block_size == block_size:
            return True
        self.differing.append(block_size)
        return False


class ReferenceFeed:
    def __init__(self, index):
        self.index = index
        self.slots = {}  # tier -> slot
        self.orphans = OrphanLot()
        self.other_groups = set()

    @property
    def tree(self):
        return self.index.tree

    def apply(self, payload):
        """Raises CodecError; returns how many events were skipped."""
        batch = decode_batch(payload)
        for event in batch.events:
            if isinstance(event, BlocksStored):
                self.stored(event)
            elif isinstance(event, BlocksRemoved):
                self.removed(event)
            else:
                self.clear()
        return batch.skipped

    def clear(self):
        self.orphans.clear()
        for slot in self.slots.values():
            self.tree.clear(slot)

    def slot(self, tier):
        if tier not in self.slots:
            self.slots[tier] = self.tree.add_slot()
        return self.slots[tier]

    def others(self, tier):
        return [self.slots[other] for other in Tier if other is not tier and other in self.slots]

    def stored(self, event):
        if event.kind not in PREFIX_KINDS:
            self.other_groups.add(event.group)
            return
        if event.kind:
            self.other_groups.discard(event.group)
        if event.tokens and not self.index.learn(event.block_size):
            return
        if not event.tokens and not self.slots:
            return  # nothing is known that the hashes could stand for
        slot = self.slot(event.tier)
        if not event.tokens:
            any(self.tree.store_known(slot, other, event.hashes) for other in self.others(event.tier))
            return
        if not self.store(event):
            self.orphans.park(event)
            return
        waiting = self.orphans.adopt(event.hashes)
        while waiting:
            orphan = waiting.pop()
            if not self.store(orphan):  # its parent is gone again, by a removal noted for another orphan
                self.orphans.link(orphan)
                continue
            for name in orphan.hashes:
                if self.orphans.release(orphan.tier, name):
                    self.tree.remove(self.slot(orphan.tier), array("Q", [name]))
            waiting += self.orphans.adopt(orphan.hashes)

    def store(self, event):
        slot = self.slot(event.tier)
        seed = seed_for(event.lora_name, event.cache_salt)
        return any(
            self.tree.store(slot, event.parent, event.hashes, event.tokens, seed, event.mm_hashes, parent_slot)
            for parent_slot in [slot, *self.others(event.tier)]
        )

    def removed(self, event):
        if self.tree is None or event.group in self.other_groups:
            return
        slot = self.slots.get(event.tier)
        hashes = [
            name
            for name in event.hashes
            if (slot is not None and self.tree.holds(slot, name)) or not self.orphans.remove(event.tier, name)
        ]
        if slot is not None:
            self.tree.remove(slot, hashes)
