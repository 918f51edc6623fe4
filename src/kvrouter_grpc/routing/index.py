"""Which blocks every target of an endpoint holds."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvrouter_grpc.core import Applied, KvFeed, RadixTree, hash_sequence, seed_for
from kvrouter_grpc.routing.stream import StreamStatus
from kvrouter_grpc.types import (
    Overlap,
    Prompt,
    Target,
    Tier,
)

TIERS = tuple(Tier)
LOWER_TIERS = (Tier.HOST, Tier.DISK, Tier.REMOTE)


@dataclass(slots=True, eq=False)
class _CacheView:
    """What is known of one target's cache."""

    feed: KvFeed
    slots: dict[Tier, int] = field(default_factory=dict)  # tree slot of each tier seen
    stream: StreamStatus = field(default_factory=StreamStatus)


class KvIndex:
    """The radix tree of one endpoint, keyed by target, fed with engine events and asked with prompts.

    The tree is made when the block size is known: from the configuration, from a worker's own statement or from the
    first event.

    Args:
        block_size: Tokens per block, or None to learn it.
        on_block_size: Called with (target, block size) when a target publishes blocks of another size. They are not
            indexed: hashes of different block sizes never match, they would only be silent zeros.
    """

    def __init__(self, block_size: int | None, on_block_size: Callable[[Target, int], None]) -> None:
        self._tree = RadixTree(block_size) if block_size else None
        self._views: dict[Target, _CacheView] = {}
        self._on_block_size = on_block_size
        self._depths: array[int] | None = None  # the answer of `match`, written in place

    @property
    def block_size(self) -> int:
        """Tokens per block; 0 while it is not known."""
        return self._tree.block_size if self._tree is not None else 0

    def learn_block_size(self, block_size: int) -> bool:
        """Fix the block size if it is still open; False when it is another one already."""
        if self._tree is None:
            self._tree = RadixTree(block_size)
        return self._tree.block_size == block_size

    def add(self, target: Target) -> None:
        """Start to know `target`; nothing happens when it is known."""
        if target not in self._views:
            feed = KvFeed(partial(self._tree_for, target), partial(self._slot, target))
            self._views[target] = _CacheView(feed)

    def remove(self, target: Target) -> None:
        """Forget `target` and everything it holds."""
        view = self._views.pop(target, None)
        if view is None:
            return
        view.feed.close()
        if self._tree is not None:
            for slot in view.slots.values():
                self._tree.remove_slot(slot)

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
        return view.feed.orphans if view is not None else 0

    def stats(self) -> dict[str, int]:
        """Counters of the tree: `edges`, `blocks`, `bytes` and others; empty while there is no tree."""
        return self._tree.stats() if self._tree is not None else {}

    # --- events ---------------------------------------------------------------------------------------------------

    def apply_payload(self, target: Target, payload: bytes) -> Applied:
        """Apply one message of the target's stream. Messages of a target that was removed are ignored.

        Args:
            target: Whose stream it is; its messages come in order.
            payload: The message's third frame, msgpack; see `core/kv_event.pxd`.

        Raises:
            BatchError: The payload is no event batch: nothing was applied.
        """
        view = self._views.get(target)
        return view.feed.apply(payload) if view is not None else Applied()

    def clear(self, target: Target) -> None:
        """Forget what the target holds: its engine restarted."""
        view = self._views.get(target)
        if view is not None:
            view.feed.clear()

    def refresh(self, target: Target) -> None:
        """The status of the target's stream has changed."""

    def _tree_for(self, target: Target, block_size: int) -> RadixTree | None:
        """The tree, if blocks of this size belong in it."""
        if self.learn_block_size(block_size):
            return self._tree
        self._on_block_size(target, block_size)
        return None

    def _slot(self, target: Target, tier: int) -> int:
        """A slot for a tier that the target is seen to use for the first time."""
        assert self._tree is not None  # noqa: S101  # the feed asks for the tree first
        slot = self._views[target].slots[TIERS[tier]] = self._tree.add_slot()
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
