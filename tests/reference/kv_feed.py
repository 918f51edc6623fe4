"""The twin of `KvFeed`: typed events into the naive tree."""

from array import array
from math import gcd

from kvrouter_grpc.types import Tier
from reference.kv_codec import decode_batch
from reference.kv_events import BlocksRemoved, BlocksStored
from reference.orphans import OrphanLot
from reference.radix import ReferenceTree, _xxh3, chain, local_hash

KINDS = {
    "full_attention": "prefix",
    "mla_attention": "prefix",
    "sink_full_attention": "prefix",
    "sliding_window": "window",
    "sliding_window_mla": "window",
    "mamba": "state",
    "encoder_only_attention": "nothing",
    "cross_attention": "nothing",
}
MOST_NAMES = 1 << 20


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

    def learn(self, block_size, several):
        if self.tree is None:
            self.tree = ReferenceTree(block_size)
        if self.tree.block_size == block_size or (several and block_size % self.tree.block_size == 0):
            return True
        self.differing.append(block_size)
        return False


class Group:
    def __init__(self):
        self.kind = ""
        self.window = 0
        self.block_size = 0
        self.width = 0
        self.slots = {}  # tier -> slot


class ReferenceFeed:
    def __init__(self, index):
        self.index = index
        self.groups = []
        self.started = False  # this feed knows the tree
        self.orphans = OrphanLot()

    @property
    def tree(self):
        return self.index.tree

    def apply(self, payload):
        """Raises CodecError; returns how many events were skipped."""
        batch = decode_batch(payload)
        self.meet([event for event in batch.events if isinstance(event, BlocksStored)])
        postponed = []
        for event in batch.events:
            if isinstance(event, BlocksStored):
                postponed += self.stored(event)
                continue
            self.catch_up(postponed)
            if isinstance(event, BlocksRemoved):
                self.removed(event)
            else:
                self.clear()
        self.catch_up(postponed)
        return batch.skipped

    def meet(self, stores):
        before = len(self.groups)
        while len(self.groups) <= max((event.group for event in stores), default=-1):
            self.groups.append(Group())
        if before < len(self.groups) > 1 and not self.started:
            sizes = [event.block_size for event in stores if event.tokens and KINDS.get(event.kind) != "nothing"]
            if sizes:
                self.started = self.index.learn(gcd(*sizes), True)

    def catch_up(self, postponed):
        for event in postponed:
            self.store_known(event)
        postponed.clear()

    def clear(self):
        self.orphans.clear()
        for group in self.groups:
            self.forget(group)

    def forget(self, group):
        for slot in group.slots.values():
            self.tree.clear(slot)

    def lanes(self):
        return [(number, tier) for number, group in enumerate(self.groups) if group.slots for tier in Tier]

    def slot(self, lane):
        return self.groups[lane[0]].slots.get(lane[1])

    def place(self, lane):
        if self.slot(lane) is None:
            self.groups[lane[0]].slots[lane[1]] = self.tree.add_slot()
        return self.slot(lane)

    def knowing(self, lane, name):
        """The first slot that knows a name, the lane's own before all others."""
        slots = [self.slot(other) for other in [lane, *self.lanes()]]
        return next((slot for slot in slots if slot is not None and self.tree.holds(slot, name)), None)

    def judged(self, event):
        """The group of a store; None when its blocks say nothing about prefixes."""
        group = self.groups[event.group]
        kind, window = KINDS.get(event.kind, "other"), event.window if event.window and 0 < event.window < 2**32 else 0
        if not event.kind:
            kind, window = group.kind or ("prefix" if event.group == 0 else "other"), group.window
        if kind != "window":
            window = 0
        elif not window:
            kind = "other"
        if (kind, window) != (group.kind, group.window):
            self.forget(group)
            group.kind, group.window = kind, window
        return group if kind in ("prefix", "window", "state") else None

    def learn(self, group, block_size):
        several = len(self.groups) > 1
        if several and block_size < group.block_size:
            return False
        if not self.index.learn(block_size, several):
            return False
        self.started = True
        self.forget(group)
        group.block_size, group.width = block_size, block_size // self.tree.block_size
        return True

    def stored(self, event):
        """The event itself if it has to wait for others."""
        group = self.judged(event)
        several = len(self.groups) > 1
        if group is None:
            return []
        sized = event.tokens or (several and event.block_size)
        if sized and event.block_size != group.block_size and not self.learn(group, event.block_size):
            return []
        if not self.started:
            return []  # nothing is known that the hashes could stand for
        if not event.tokens or (event.mm_hashes and group.width > 1):
            if several:
                return [event]
            self.store_known(event)
            return []
        self.place(event.lane)
        if not self.store(event):
            self.orphans.park(event)
            return []
        waiting = self.orphans.adopt(event.hashes)
        while waiting:
            orphan = waiting.pop()
            if not self.store_orphan(orphan):  # its parent is gone again, by a removal noted for another orphan
                self.orphans.link(orphan)
                continue
            self.orphans.adopted += len(orphan.hashes)
            for name in orphan.hashes:
                if self.orphans.release(orphan.lane, name):
                    self.take(orphan.lane, [name])
            waiting += self.orphans.adopt(orphan.hashes)
        return []

    def store_orphan(self, event):
        group = self.groups[event.group]
        if event.block_size != group.block_size or group.kind not in ("prefix", "window", "state"):
            return True  # the group is another one by now: the blocks are void
        return self.store(event)

    def store(self, event):
        width = self.groups[event.group].width
        seed = seed_for(event.lora_name, event.cache_salt)
        parent_slot = -1
        if event.parent is not None:
            parent_slot = self.knowing(event.lane, event.parent)
            if parent_slot is None:
                return False
        hashes = event.hashes
        if width > 1:
            parent = None
            if event.parent is not None:
                block = self.tree.slots[parent_slot].names[event.parent][0]
                parent, seed = block.seq, block.seed
            size = self.tree.block_size
            tokens = [event.tokens[i * size : (i + 1) * size] for i in range(len(hashes) * width)]
            names = chain([local_hash(block, seed) for block in tokens], parent)
            names[width - 1 :: width] = hashes
            hashes = array("Q", names)
        slot = self.slot(event.lane)
        return self.tree.store(slot, event.parent, hashes, event.tokens, seed, event.mm_hashes, parent_slot)

    def store_known(self, event):
        width = self.groups[event.group].width or 1
        if event.hashes:
            self.place(event.lane)
        if len(event.hashes) * width > MOST_NAMES:
            return
        for name in event.hashes:
            knowing = self.knowing(event.lane, name)
            path = self.tree.path_to(knowing, name, width) if knowing is not None else None
            for block in path or ():
                self.tree.store_at(self.slot(event.lane), name if block is path[-1] else block.seq, block)

    def removed(self, event):
        if self.tree is None or not self.started or event.group >= len(self.groups):
            return
        slot = self.slot(event.lane)
        hashes = [
            name
            for name in event.hashes
            if (slot is not None and self.tree.holds(slot, name)) or not self.orphans.remove(event.lane, name)
        ]
        self.take(event.lane, hashes)

    def take(self, lane, hashes):
        slot, width = self.slot(lane), self.groups[lane[0]].width
        if slot is None:
            return
        if width <= 1:
            self.tree.remove(slot, array("Q", hashes))
            return
        for name in hashes:
            path = self.tree.path_to(slot, name, width) if self.tree.holds(slot, name) else None
            if path is None:
                self.tree.unknown_removes += 1
            else:
                self.tree.remove(slot, [*(block.seq for block in path[:-1]), name])
