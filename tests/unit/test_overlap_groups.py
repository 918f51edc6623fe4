"""What several KV cache groups leave usable of a prompt, against the twin that tries every cut."""

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import Decider, Policy, RadixTree, Shortlist, TargetTable, hash_sequence
from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.groups import CacheGroup, Rule, rule_of, unjudged
from kvrouter_grpc.routing.mode import Knobs
from reference.usable import usable

SEED = 1337
NO_SLOTS = (None, None, None, None)


class Tree:
    """One prompt in a tree, and branches off it, so that its path has several edges."""

    def __init__(self, rng, length):
        self.rng, self.length = rng, length
        self.tree = RadixTree(1)
        self.tokens = array("I", [rng.randrange(5) for _ in range(length)])
        self.seqs = hash_sequence(self.tokens, 1, SEED)
        others = self.tree.add_slot()
        for cut in rng.sample(range(length), min(length, rng.randrange(4))):
            branch = self.tokens[:cut] + array("I", [9, 9])
            self.tree.store(others, None, array("Q", range(cut + 2)), branch, SEED)
            self.tree.clear(others) if rng.random() < 0.3 else None

    def slot(self):
        """A slot with some of the prompt's blocks, or none; and their positions."""
        rng = self.rng
        if rng.random() < 0.3:
            return None, None
        slot = self.tree.add_slot()
        held = set()
        if self.length:
            names = array("Q", range(1000, 1000 + self.length))
            self.tree.store(slot, None, names, self.tokens, SEED)
            share = rng.choice([0.0, 0.1, 0.5])
            held = {block for block in range(rng.randint(0, self.length)) if rng.random() >= share}
            gone = [names[block] for block in range(self.length) if block not in held]
            rng.shuffle(gone)
            self.tree.remove(slot, array("Q", gone))
        return slot, held


@settings(max_examples=150)
@given(rng=st.randoms(use_true_random=False), count=st.integers(1, 4), length=st.integers(0, 140))
def test_the_twin_agrees(rng, count, length):
    tree = Tree(random.Random(rng.random()), length)
    groups, held = [], []
    for _ in range(count):
        window = rng.choice([0, 0, 1, 2, 5, 64])
        slots, positions = zip(*(tree.slot() for _ in range(4)), strict=True)
        groups.append((window, slots))
        held.append((window, positions))
    step = rng.choice([1, 1, 2, 3])
    table = TargetTable()
    table.attach(tree.tree)
    row = table.add("target")
    table.set_groups(row, groups, step)
    assert table.overlaps([row], tree.seqs) == [usable(held, step, length)]
    # The decision asks for no more than an engine uses: all but the block of the last token.
    table.set_freshness(row, 1.0)
    choice = Decider(table, 1).decide(
        tree.tokens, SEED, Shortlist(array("I", [row])), Policy(Weights(), Knobs()), explain=True
    )
    assert choice.tiers == (usable(held, step, length - 1) if length else (0, 0, 0, 0))
    table.set_groups(row, (), 1)
    assert table.overlaps([row], tree.seqs) == [(0, 0, 0, 0)]


def test_a_row_forgets_its_groups_with_its_target():
    tree = RadixTree(1)
    slot = tree.add_slot()
    tree.store(slot, None, array("Q", [1, 2]), array("I", [1, 2]), SEED)
    seqs = hash_sequence(array("I", [1, 2]), 1, SEED)
    table = TargetTable()
    table.attach(tree)
    table.set_groups(table.add("a"), [(1, (slot, None, None, None))], 1)
    assert table.overlaps([table.row("a")], seqs) == [(2, 0, 0, 0)]
    table.remove("a")
    rows = [table.add(name) for name in range(40)]
    assert table.overlaps(rows, seqs) == [(0, 0, 0, 0)] * 40
    table.set_groups(rows[30], [(1, (slot, None, None, None))], 1)
    assert [tiers[0] for tiers in table.overlaps(rows, seqs)] == [2 * (i == 30) for i in range(40)]
    with pytest.raises(KeyError):
        table.set_groups(rows[0], [(1, (slot + 1, None, None, None))], 1)
    for groups, step in (([(1, NO_SLOTS)] * 65, 1), ([], 0), ([], 1 << 21)):
        with pytest.raises(ValueError, match="step"):
            table.set_groups(rows[0], groups, step)


def test_rules_of_models():
    full = CacheGroup("prefix", 0, 16, 1, NO_SLOTS)
    window = CacheGroup("window", 1024, 16, 1, NO_SLOTS)
    assert rule_of([]) == Rule((), 1)
    assert rule_of([full, CacheGroup("nothing", 0, 16, 1, NO_SLOTS)]).plain
    assert rule_of([CacheGroup("", 0, 0, 0, NO_SLOTS), full]).plain
    assert rule_of([full, window]) == Rule(((0, NO_SLOTS), (64, NO_SLOTS)), 1)
    assert not rule_of([window]).plain
    # The window before a token is one token shorter; one of a single token needs a block all the same.
    spans = {1: 1, 2: 1, 17: 1, 18: 2, 33: 2}
    for tokens, blocks in spans.items():
        assert rule_of([window._replace(window=tokens)]).groups[0][0] == blocks
    wide = [full, CacheGroup("state", 0, 32, 2, NO_SLOTS), CacheGroup("window", 100, 48, 3, NO_SLOTS)]
    assert rule_of(wide) == Rule(((0, NO_SLOTS), (2, NO_SLOTS), (9, NO_SLOTS)), 6)
    assert not rule_of([full._replace(width=2)]).plain
    assert unjudged([full, window]) == ""
    assert "group 1, 2 of" in unjudged(
        [full, CacheGroup("other", 0, 0, 0, NO_SLOTS), CacheGroup("other", 0, 0, 0, NO_SLOTS)]
    )
