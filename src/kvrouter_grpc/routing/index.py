"""Which blocks every target of an endpoint holds."""

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from kvrouter_grpc.core import Applied, KvFeed, RadixTree, TargetTable, hash_sequence, read_slot, seed_for, write_slot
from kvrouter_grpc.routing.forecast import Forecast, PredictedCache, Prediction
from kvrouter_grpc.routing.groups import CacheGroup, GroupFacts, HeldSlot, Slots, rule_of, unjudged
from kvrouter_grpc.routing.prediction import HitPrediction
from kvrouter_grpc.routing.renewal import Renewal, SlotFacts
from kvrouter_grpc.routing.stream import Evidence, StreamPosition, StreamStatus, freshness
from kvrouter_grpc.types import Overlap, Prompt, StreamState, Target, Tier

TIERS = tuple(Tier)


@dataclass(slots=True, eq=False)
class _CacheView:
    """What is known of one target's cache."""

    row: int  # of the target table
    feed: KvFeed
    slots: dict[Tier, int] = field(default_factory=dict)  # tree slot of each tier seen, of the main KV cache group
    group: int | None = None  # that is the first one that holds whole prefixes; None until its first event
    more_slots: dict[int, list[int]] = field(default_factory=dict)  # of the other groups of a hybrid model
    stream: StreamStatus = field(default_factory=StreamStatus)
    forecast: Forecast | None = None  # foretells what it holds
    predicted: PredictedCache | None = None  # None until the first prediction
    capacity: int = 0  # blocks it has room for, as far as predictions need it; 0 when not known
    hits: HitPrediction = field(default_factory=HitPrediction)
    renewal: Renewal | None = None  # how it becomes true again after lost events; None: it is
    at_rest: bool = False  # its row says that all is well


class KvIndex:
    """The radix tree of one endpoint, keyed by target, fed with engine events and asked with prompts.

    The tree is made when the block size is known: from the configuration, from a worker's own statement or from the
    first event.

    Args:
        block_size: Tokens per block, or None to learn it.
        on_block_size: Called with (target, block size) when a target publishes blocks of another size. They are not
            indexed: hashes of different block sizes never match, they would only be silent zeros.
        silent: Predicts what targets without events hold; None predicts nothing.
        ahead: Predicts what targets with events are about to hold; None waits for the events.
        clock: Monotonic seconds.

    Attributes:
        targets: The targets' rows, with where their blocks are and how far that is to be trusted, for the decision.
    """

    def __init__(
        self,
        block_size: int | None,
        on_block_size: Callable[[Target, int], None],
        *,
        silent: Forecast | None = None,
        ahead: Forecast | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.targets = TargetTable()
        self.clock = clock
        self._tree: RadixTree | None = None
        self._views: dict[Target, _CacheView] = {}
        self._on_block_size = on_block_size
        self._silent = silent
        self._ahead = ahead
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
            feed = KvFeed(partial(self._tree_for, target), partial(self._place, target), partial(self._arrange, target))
            self._views[target] = _CacheView(self.targets.add(target), feed, forecast=self._ahead)

    def remove(self, target: Target) -> None:
        """Forget `target` and everything it holds."""
        self.clear(target)
        view = self._views.pop(target, None)
        if view is None:
            return
        view.feed.close()
        self.targets.remove(target)
        if self._tree is not None:
            for slot in chain(view.slots.values(), *view.more_slots.values()):
                self._tree.remove_slot(slot)

    def refresh(self, target: Target) -> None:
        """Let decisions see the present freshness of `target`; called by its subscriber when its state changes."""
        view = self._views.get(target)
        if view is not None:
            self.targets.set_freshness(view.row, freshness(self._evidence(view)).value)

    def refresh_all(self) -> None:
        """Let decisions see what time and answers do to the freshness of all targets. Those in order cost nothing."""
        for view in self._views.values():
            at_rest = view.stream.in_order and view.hits.accuracy == 1.0 and not view.feed.orphans
            if not (at_rest and view.at_rest):
                self.targets.set_freshness(view.row, freshness(self._evidence(view)).value)
                view.at_rest = at_rest

    def evidence(self, target: Target) -> Evidence:
        """What speaks for and against the picture of `target`; of one that is not known nothing was heard."""
        view = self._views.get(target)
        return self._evidence(view) if view is not None else Evidence(heard=False)

    def _evidence(self, view: _CacheView) -> Evidence:
        return view.stream.evidence(
            self.clock(), blocks=self._blocks(view), orphans=view.feed.orphans, accuracy=view.hits.accuracy
        )

    def hits(self, target: Target) -> HitPrediction | None:
        """How well the hits of `target` were foretold; None when it is not known."""
        view = self._views.get(target)
        return view.hits if view is not None else None

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
        """Blocks the target holds, over all tiers; of the KV cache groups of a hybrid model that with the most."""
        view = self._views.get(target)
        return self._blocks(view) if view is not None else 0

    def device_blocks(self, target: Target) -> int:
        """Blocks the target holds on its device."""
        view = self._views.get(target)
        if view is None or self._tree is None or Tier.DEVICE not in view.slots:
            return 0
        return self._tree.blocks(view.slots[Tier.DEVICE])

    def _blocks(self, view: _CacheView) -> int:
        tree = self._tree
        if tree is None:
            return 0
        return max(sum(map(tree.blocks, slots)) for slots in (view.slots.values(), *view.more_slots.values()))

    def orphans(self, target: Target) -> int:
        """Blocks of the target that wait for their parent."""
        view = self._views.get(target)
        return view.feed.orphans if view is not None else 0

    def orphan_fates(self, target: Target) -> tuple[int, int]:
        """Blocks of the target that waited for their parent until it appeared, and that were given up."""
        view = self._views.get(target)
        return (view.feed.adopted, view.feed.dropped) if view is not None else (0, 0)

    def stats(self) -> dict[str, int]:
        """Counters of the tree: `edges`, `blocks`, `bytes` and others; empty while there is no tree."""
        return self._tree.stats() if self._tree is not None else {}

    # --- events ---------------------------------------------------------------------------------------------------

    def feed(self, target: Target) -> KvFeed:
        """What applies the messages of the target's stream, in order. `cleared` is to be told what it says.

        Raises:
            KeyError: The target was never added.
        """
        return self._views[target].feed

    def apply_payload(self, target: Target, payload: bytes) -> Applied:
        """Apply one message of the target's stream. Messages of a target that was removed are ignored.

        Args:
            target: Whose stream it is; its messages come in order.
            payload: The message's third frame, msgpack; see `core/kv_event.pxd`.

        Raises:
            BatchError: The payload is no event batch: nothing was applied.
        """
        view = self._views.get(target)
        if view is None:
            return Applied()
        applied = view.feed.apply(payload)
        if applied.cleared:
            self.cleared(target)
        return applied

    def cleared(self, target: Target) -> None:
        """The feed has read that the engine dropped its whole cache."""
        view = self._views.get(target)
        if view is not None:
            _forget_predictions(view)
            view.hits.begun()

    def clear(self, target: Target) -> None:
        """Forget what the target holds: its engine restarted."""
        view = self._views.get(target)
        if view is not None:
            view.feed.clear()
            if view.predicted is not None:
                view.predicted.tree.clear(view.predicted.slot)  # the feed knows it from its first event on
            _forget_predictions(view)
            view.hits.begun()
            view.stream.prompts.clear()
            view.renewal = None

    def doubt(self, target: Target) -> None:
        """Events of the target are lost for good: what it holds is doubted until its further events show it."""
        view = self._views.get(target)
        if view is not None and self._tree is not None:
            view.renewal = Renewal(self._tree, self._slot_facts(view))

    def renewed(self, target: Target) -> bool:
        """Whether no doubt of that is left. Does a slice of what there is to do for it."""
        view = self._views.get(target)
        if view is None or view.renewal is None or not self._blocks(view) or not view.renewal.done():
            return False
        view.renewal = None
        view.hits.begun()
        return True

    def _slot_facts(self, view: _CacheView) -> Iterator[SlotFacts]:
        room = self.targets.total_blocks(view.row)
        for group in map(CacheGroup._make, view.feed.cache_groups()):
            for tier, slot in zip(TIERS, group.slots, strict=True):
                if slot is not None:
                    device = tier is Tier.DEVICE
                    yield SlotFacts(slot, room * group.width if device else 0, device and group.kind == "prefix")

    def _tree_for(self, target: Target, block_size: int, several_groups: bool) -> RadixTree | None:
        """The tree, if blocks of this size belong in it: a hybrid model's may span several of its blocks."""
        if several_groups and self._tree is not None and block_size % self._tree.block_size == 0:
            return self._tree
        if self.learn_block_size(block_size):
            return self._tree
        self._on_block_size(target, block_size)
        return None

    def _place(self, target: Target, group: int, tier: int) -> int:
        """A slot for a tier that a KV cache group of the target is seen to use for the first time."""
        assert self._tree is not None  # noqa: S101  # the feed asks for the tree first
        view = self._views[target]
        if view.group is None and view.feed.cache_groups()[group][0] == "prefix":
            view.group = group
        if view.group == group:
            return self._slot(target, tier)
        slot = self._tree.add_slot()
        view.more_slots.setdefault(group, []).append(slot)
        return slot

    def _arrange(self, target: Target, told: list[tuple[str, int, int, int, Slots]]) -> None:
        """Groups of the target have become known, or where their blocks are."""
        view = self._views[target]
        groups = [CacheGroup(*group) for group in told]
        rule = rule_of(groups)
        self.targets.set_groups(view.row, () if rule.plain else rule.groups, rule.step)
        view.stream.unjudged = unjudged(groups)

    def _slot(self, target: Target, tier: int) -> int:
        """The slot of a tier, of the group that holds whole prefixes."""
        assert self._tree is not None  # noqa: S101  # the feed asks for the tree first
        view = self._views[target]
        if TIERS[tier] in view.slots:
            return view.slots[TIERS[tier]]  # something was predicted before the first event
        slot = view.slots[TIERS[tier]] = self._tree.add_slot()
        self.targets.set_slot(view.row, tier, slot)
        return slot

    # --- other processes of the router ------------------------------------------------------------------------------

    def write(self, target: Target) -> tuple[tuple[GroupFacts, ...], tuple[HeldSlot, ...]]:
        """What the engine of `target` told so far, for `restore`; see `routing/snapshot.py`.

        Predictions ahead of events are given up for it: they are nothing it told.

        Returns:
            Its KV cache groups, and what they hold in each tier.
        """
        view, tree = self._views[target], self._tree
        _forget_predictions(view)
        groups = [CacheGroup(*group) for group in view.feed.cache_groups()]
        held = [
            HeldSlot(number, tier, write_slot(tree, slot))
            for number, group in enumerate(groups)
            for tier, slot in zip(TIERS, group.slots, strict=True)
            if tree is not None and slot is not None
        ]
        return tuple(GroupFacts(group.kind, group.window, group.block_size) for group in groups), tuple(held)

    def restore(
        self, target: Target, position: StreamPosition, groups: Sequence[GroupFacts], held: Sequence[HeldSlot]
    ) -> None:
        """Let `target`, of which nothing is known yet, hold what `write` gave, and its events go on at `position`.

        Raises:
            ValueError: It is not what `write` gives, or the block size is not known yet; it holds nothing then.
        """
        view, tree = self._views[target], self._tree
        if tree is None:
            raise ValueError("the block size is not known yet")
        try:
            for number, facts in enumerate(groups):
                view.feed.adopt(tree, number, *facts, {})
            for number, tier, data in held:
                facts = groups[number]
                slot = self._place(target, number, TIERS.index(tier))
                view.feed.adopt(tree, number, *facts, {TIERS.index(tier): slot})
                read_slot(tree, slot, data)
        except (IndexError, ValueError) as error:
            self.clear(target)
            raise ValueError("it is not what `write` gives") from error
        self._arrange(target, view.feed.cache_groups())
        view.stream.resume_at = position

    # --- predictions ----------------------------------------------------------------------------------------------

    def without_events(self, target: Target, detail: str = "", capacity: int = 0, *, predicted: bool = True) -> None:
        """Nothing will tell what `target` holds: predict it, if that is wanted.

        Args:
            target: The target.
            detail: One sentence for the operator when that is not as it should be.
            capacity: Blocks its engine has room for; 0 when not known.
            predicted: False: it holds nothing, whatever is sent there.
        """
        view = self._views[target]
        view.forecast = self._silent if predicted else None
        view.stream.state = StreamState.PREDICTED if view.forecast is not None else StreamState.OFF
        view.stream.detail = detail
        view.stream.settled = True
        view.capacity = capacity
        self.refresh(target)

    def predict(self, target: Target, seqs: "array[int]", prompt: Prompt, now: float) -> Prediction | None:
        """A request was booked on `target`: count its blocks as held there. None where nothing is predicted.

        Args:
            target: The target.
            seqs: Sequence hashes of the prompt.
            prompt: The prompt.
            now: Seconds.
        """
        view = self._views.get(target)
        if view is None or view.forecast is None or not seqs or self._tree is None:
            return None
        if view.predicted is None:
            view.predicted = PredictedCache(self._tree, self._slot(target, TIERS.index(Tier.DEVICE)), view.capacity)
        return view.forecast.begin(view.predicted, seqs, seed_for(prompt.lora_name, prompt.cache_salt), now)

    def expire(self, now: float) -> None:
        """End the predictions that are past their time."""
        for forecast in (self._silent, self._ahead):
            if forecast is not None:
                forecast.expire(now)

    # --- questions ------------------------------------------------------------------------------------------------

    def sequence(self, prompt: Prompt) -> "array[int]":
        """Sequence hashes (u64) of the prompt's full blocks; empty while the block size is not known."""
        if self._tree is None:
            return array("Q")
        seed = seed_for(prompt.lora_name, prompt.cache_salt)
        return hash_sequence(prompt.tokens, self._tree.block_size, seed, prompt.mm_hashes or None)

    def overlaps(self, seqs: "array[int]", targets: Sequence[Target], *, shared: bool = False) -> list[Overlap]:
        """What each of `targets` holds of a prompt, in their order; `shared` as in `TargetTable.overlaps`."""
        rows = [(i, view.row) for i, target in enumerate(targets) if (view := self._views.get(target)) is not None]
        found = [_NOTHING] * len(targets)
        held = self.targets.overlaps([row for _, row in rows], seqs, shared)
        for (i, _), tiers in zip(rows, held, strict=True):
            if any(tiers):
                found[i] = Overlap(*tiers)
        return found


_NOTHING = Overlap()


def _forget_predictions(view: _CacheView) -> None:
    if view.forecast is not None and view.predicted is not None:
        view.forecast.forget(view.predicted)
