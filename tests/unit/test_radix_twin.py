"""Hypothesis drives the compiled tree and its twin and compares everything after each step."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrouter_grpc.core import RadixTree, read_slot, write_slot
from reference.pair import Pair

SEEDS = st.sampled_from([1337, 7])
NAMES = st.integers(0, 40)  # few, so that duplicates, aliases and conflicts are common
TOKENS = st.integers(0, 1)
MOST_BLOCKS = 12


class RadixMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.fresh = 1000

    @initialize(block_size=st.integers(1, 4), slots=st.integers(1, 4))
    def start(self, block_size, slots):
        self.pair = Pair(block_size)
        for _ in range(slots):
            self.pair.add_slot()

    def _slot(self, data):
        return data.draw(st.sampled_from(self.pair.slots()), label="slot")

    def _tokens(self, data, blocks):
        # One token decides a block: prefixes are shared as often as possible.
        return [
            token
            for block in data.draw(st.lists(TOKENS, min_size=blocks, max_size=blocks), label="tokens")
            for token in [block] * self.pair.block_size
        ]

    def _names(self, data, blocks):
        if data.draw(st.booleans(), label="fresh names"):
            self.fresh += blocks
            return range(self.fresh - blocks, self.fresh)
        return data.draw(st.lists(NAMES, min_size=blocks, max_size=blocks), label="names")

    def _held(self, data, slot):
        names = list(self.pair.twin.slots[slot].names)
        return data.draw(st.sampled_from(names), label="held") if names else 0

    @rule(data=st.data(), seed=SEEDS, blocks=st.integers(0, MOST_BLOCKS))
    def store_at_root(self, data, seed, blocks):
        slot = self._slot(data)
        self.pair.store(slot, None, self._names(data, blocks), self._tokens(data, blocks), seed)

    @rule(data=st.data(), elsewhere=st.booleans())
    def write_and_read_back(self, data, elsewhere):
        slot, tree = self._slot(data), self.pair.tree
        written = write_slot(tree, slot)
        if elsewhere:
            other = RadixTree(self.pair.block_size)
            read_slot(other, other.add_slot(), written)
            other._check()
            written = write_slot(other, 0)
        tree.clear(slot)
        read_slot(tree, slot, written)
        self.pair.twin.slots[slot].doubted.clear()

    @rule(data=st.data(), blocks=st.integers(0, MOST_BLOCKS))
    def store_below(self, data, blocks):
        slot = self._slot(data)
        names = self._names(data, blocks)
        self.pair.store(slot, self._held(data, slot), names, self._tokens(data, blocks), 5)

    @rule(data=st.data(), blocks=st.integers(1, 4), mm=st.dictionaries(st.integers(0, 4), st.just([3, 1])))
    def store_below_block_of_another_slot(self, data, blocks, mm):
        slot, other = self._slot(data), self._slot(data)
        names = self._names(data, blocks)
        self.pair.store(slot, self._held(data, other), names, self._tokens(data, blocks), 5, mm, other)

    @rule(data=st.data(), seed=SEEDS, blocks=st.integers(0, MOST_BLOCKS))
    def store_path(self, data, seed, blocks):
        slot = self._slot(data)
        self.pair.store_path(slot, self.pair.seqs(self._tokens(data, blocks), seed), seed)

    @rule(data=st.data(), seed=SEEDS, blocks=st.integers(0, MOST_BLOCKS))
    def remove_path(self, data, seed, blocks):
        self.pair.remove_path(self._slot(data), self.pair.seqs(self._tokens(data, blocks), seed))

    @rule(data=st.data())
    def remove_any_as_a_path(self, data):
        slot = self._slot(data)
        held = list(self.pair.twin.slots[slot].names)
        self.pair.remove_path(slot, data.draw(st.lists(st.sampled_from([*held, 5]), max_size=8), label="names"))

    @rule(data=st.data())
    def copy_between_tiers(self, data):
        slot, other = self._slot(data), self._slot(data)
        held = list(self.pair.twin.slots[other].names)
        names = data.draw(st.lists(st.sampled_from([*held, 5]), max_size=8), label="names")
        self.pair.store_known(slot, other, names)

    @rule(data=st.data())
    def remove_some(self, data):
        slot = self._slot(data)
        held = list(self.pair.twin.slots[slot].names)
        self.pair.remove(slot, data.draw(st.lists(st.sampled_from([*held, 5]), max_size=8), label="names"))

    @rule(data=st.data(), count=st.integers(1, 8))
    def evict_from_the_tail(self, data, count):
        slot = self._slot(data)
        names = self.pair.twin.slots[slot].names
        deepest = sorted(names, key=lambda name: -names[name][0].depth)[:count]
        self.pair.remove(slot, deepest)

    @rule(data=st.data())
    def clear(self, data):
        self.pair.clear(self._slot(data))

    @rule(data=st.data())
    def doubt(self, data):
        self.pair.doubt(self._slot(data))

    @rule(data=st.data(), prefixes=st.booleans())
    def drop_doubted(self, data, prefixes):
        self.pair.drop_doubted(self._slot(data), prefixes=prefixes)

    @precondition(lambda self: len(self.pair.twin.slots) > 1)
    @rule(data=st.data())
    def remove_slot(self, data):
        self.pair.remove_slot(self._slot(data))

    @precondition(lambda self: len(self.pair.twin.slots) < 6)
    @rule()
    def add_slot(self):
        self.pair.add_slot()

    @rule(data=st.data(), seed=SEEDS, blocks=st.integers(0, 2 * MOST_BLOCKS), start=st.integers(0, MOST_BLOCKS))
    def ask(self, data, seed, blocks, start):
        seqs = self.pair.seqs(self._tokens(data, blocks), seed)
        self.pair.match(seqs)
        self.pair.extend(seqs, self._slot(data), start)

    @invariant()
    def agree(self):
        self.pair.tree._check()
        self.pair.compare()

    def teardown(self):
        if hasattr(self, "pair"):
            self.pair.finish()


RadixMachine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestRadixTree = RadixMachine.TestCase
