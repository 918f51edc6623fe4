"""Which blocks every target of an endpoint holds."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvrouter_grpc.core import RadixTree, TargetTable, hash_sequence, seed_for
from kvrouter_grpc.routing.orphans import OrphanLot
from kvrouter_grpc.routing.stream import StreamStatus
from kvrouter_grpc.types import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    KvBatch,
    Overlap,
    Prompt,
    Target,
    Tier,
)

PREFIX_KINDS = frozenset({"", "full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of KV cache group whose blocks serve any later prompt with the same prefix. Sliding-window and state-space
groups keep only their end, so their blocks say nothing about the prefix."""

LOWER_TIERS = (Tier.HOST, Tier.DISK, Tier.REMOTE)

TIER_NUMBERS = {tier: number for number, tier in enumerate(Tier)}


@dataclass(slots=True, eq=False)
class _CacheView:
    """What is known of one target's cache."""

    row: int  # of the target table
    slots: dict[Tier, int] = field(default_factory=dict)  # tree slot of each tier seen
    stream: StreamStatus = field(default_factory=StreamStatus)
    orphans: OrphanLot = field(default_factory=OrphanLot)
    other_groups: set[int] = field(default_factory=set)  # KV cache groups that hold no prefixes


class KvIndex:
    """The radix tree of one endpoint, keyed by target, fed with engine events and asked with prompts.

    The tree is made when the block size is known: from the configuration, from a worker's own statement or from the
    first event.

    Args:
        block_size: Tokens per block, or None to learn it.
        on_block_size: Called with (target, block size) when a target publishes blocks of another size. They are not
            indexed: hashes of different block sizes never match, they would only be silent zeros.

    Attributes:
        targets: The targets' rows, with where their blocks are and how far that is to be trusted, for the decision.
    """

    def __init__(self, block_size: int | None, on_block_size: Callable[[Target, int], None]) -> None:
        self.targets = TargetTable()
        self._tree: RadixTree | None = None
        self._views: dict[Target, _CacheView] = {}
        self._on_block_size = on_block_size
        self._depths: array[int] | None = None  # the answer of `match`, written in place
        if block_size:
            self.learn_block_size(block_size)

    @property
    def block_size(self) -> int:
        """Tokens per block; 0 while it is not known."""
        return self._tree.block_size if self._tree is not None else 0

    def learn_block_size(self, block_size: int) -> bool:
        """Fix the block size if it is still open; False when it is another one already."""
        if self._tree is None:
            self._tree = RadixTree(block_size)
            self.targets.attach(self._tree)
        return self._tree.block_size == block_size

    def add(self, target: Target) -> None:
        """Start to know `target`; nothing happens when it is known."""
        if target not in self._views:
            self._views[target] = _CacheView(self.targets.add(target))

    def remove(self, target: Target) -> None:
        """Forget `target` and everything it holds."""
        view = self._views.pop(target, None)
        if view is not None:
            self.targets.remove(target)
            if self._tree is not None:
                for slot in view.slots.values():
                    self._tree.remove_slot(slot)

    def refresh(self, target: Target) -> None:
        """Let decisions see the present freshness of `target`; called by its subscriber after every change."""
        view = self._views.get(target)
        if view is not None:
            self.targets.set_freshness(view.row, view.stream.freshness)

    def stream(self, target: Target) -> StreamStatus:
        """The state of the target's event stream.

        Raises:
            KeyError: The target was never added.
        """
        return self._views[target].stream

    def stream_if_known(self, target: Target) -> StreamStatus | None:
        """As `stream`, None when the target is not known."""
        view = self._views.get(target)
        return view.stream if view is not None else None

    def blocks(self, target: Target) -> int:
        """Blocks the target holds, over all tiers."""
        view = self._views.get(target)
        if view is None or self._tree is None:
            return 0
        return sum(self._tree.blocks(slot) for slot in view.slots.values())

    def orphans(self, target: Target) -> int:
        """Blocks of the target that wait for their parent."""
        view = self._views.get(target)
        return len(view.orphans) if view is not None else 0

    def stats(self) -> dict[str, int]:
        """Counters of the tree: `edges`, `blocks`, `bytes` and others; empty while there is no tree."""
        return self._tree.stats() if self._tree is not None else {}

    # --- events ---------------------------------------------------------------------------------------------------

    def apply(self, target: Target, batch: KvBatch) -> None:
        """Apply one message of the target's stream. Messages of a target that was removed are ignored."""
        view = self._views.get(target)
        if view is None:
            return
        for event in batch.events:
            if isinstance(event, BlocksStored):
                self._stored(target, view, event)
            elif isinstance(event, BlocksRemoved):
                self._removed(view, event)
            elif isinstance(event, CacheCleared):
                self._clear(view)

    def clear(self, target: Target) -> None:
        """Forget what the target holds: its engine restarted."""
        view = self._views.get(target)
        if view is not None:
            self._clear(view)

    def _clear(self, view: _CacheView) -> None:
        view.orphans.clear()
        if self._tree is not None:
            for slot in view.slots.values():
                self._tree.clear(slot)

    def _stored(self, target: Target, view: _CacheView, event: BlocksStored) -> None:
        if event.kind not in PREFIX_KINDS:
            view.other_groups.add(event.group)
            return
        if event.kind:
            view.other_groups.discard(event.group)
        if event.tokens and not self.learn_block_size(event.block_size):
            self._on_block_size(target, event.block_size)
            return
        waiting = [event]
        while waiting:
            stored = waiting.pop()
            if not self._store(view, stored):
                view.orphans.park(stored)
            elif view.orphans.waiting and self._tree is not None:
                slot = self._slot(self._tree, view, stored.tier)
                self._tree.remove(slot, array("Q", view.orphans.take_removals(stored.hashes)))
                waiting += view.orphans.adopt(stored.hashes)

    def _store(self, view: _CacheView, event: BlocksStored) -> bool:
        tree = self._tree
        if tree is None:
            return True  # blocks without tokens before any with: there is nothing to name them by
        slot = self._slot(tree, view, event.tier)
        if not event.tokens:
            # An offloaded copy named by hash alone: another tier of the same rank knows what the hash stands for.
            for other in tuple(view.slots.values()):
                if other != slot and tree.store_known(slot, other, event.hashes):
                    break
            return True
        seed = seed_for(event.lora_name, event.cache_salt)
        mm_hashes = event.mm_hashes or None
        if tree.store(slot, event.parent, event.hashes, event.tokens, seed, mm_hashes):
            return True
        return any(
            tree.store(slot, event.parent, event.hashes, event.tokens, seed, mm_hashes, other)
            for other in view.slots.values()
            if other != slot
        )

    def _removed(self, view: _CacheView, event: BlocksRemoved) -> None:
        if self._tree is None or event.group in view.other_groups:
            return
        slot = view.slots.get(event.tier)
        hashes = event.hashes
        if len(view.orphans):
            held = slot if slot is not None else -1
            hashes = array(
                "Q",
                [
                    engine_hash
                    for engine_hash in hashes
                    if (held >= 0 and self._tree.holds(held, engine_hash)) or not view.orphans.remove(engine_hash)
                ],
            )
        if slot is not None:
            self._tree.remove(slot, hashes)

    def _slot(self, tree: RadixTree, view: _CacheView, tier: Tier) -> int:
        slot = view.slots.get(tier)
        if slot is None:
            slot = view.slots[tier] = tree.add_slot()
            self.targets.set_slot(view.row, TIER_NUMBERS[tier], slot)
            self._depths = None  # too short by now
        return slot

    # --- questions ------------------------------------------------------------------------------------------------

    def sequence(self, prompt: Prompt) -> "array[int]":
        """Sequence hashes (u64) of the prompt's full blocks; empty while the block size is not known."""
        if self._tree is None:
            return array("Q")
        seed = seed_for(prompt.lora_name, prompt.cache_salt)
        return hash_sequence(prompt.tokens, self._tree.block_size, seed, prompt.mm_hashes or None)

    def overlaps(self, seqs: "array[int]", targets: Sequence[Target]) -> list[Overlap]:
        """What each of `targets` holds of a prompt, in their order."""
        tree = self._tree
        if tree is None or not seqs:
            return [_NOTHING] * len(targets)
        self._depths = depths = tree.match(seqs, self._depths)
        found = []
        for target in targets:
            view = self._views.get(target)
            if view is None or not view.slots:
                found.append(_NOTHING)
                continue
            slot = view.slots.get(Tier.DEVICE)
            device = depths[slot] if slot is not None else 0
            if len(view.slots) > (slot is not None):
                found.append(_extend(tree, view, seqs, device))
            else:
                found.append(Overlap(device) if device else _NOTHING)
        return found


_NOTHING = Overlap()


def _extend(tree: RadixTree, view: _CacheView, seqs: "array[int]", device: int) -> Overlap:
    """Continue a device match through the lower tiers, each from where the one above ends."""
    depth = device
    blocks = []
    for tier in LOWER_TIERS:
        slot = view.slots.get(tier)
        more = tree.extend(seqs, slot, depth) if slot is not None else 0
        blocks.append(more)
        depth += more
    return Overlap(device, *blocks)
