"""A picture that lost events becomes true again: the index against an engine's own cache, with the rules of vLLM."""

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import RadixTree
from kvrouter_grpc.mock_worker.block_hash import CacheScope
from kvrouter_grpc.mock_worker.blocks import BlockManager, BlockTable
from kvrouter_grpc.mock_worker.kv_events import encode_batch
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.renewal import Renewal, SlotFacts
from kvrouter_grpc.types import Prompt, Target

SIZE = 4
A = Target(1, 0)
SYSTEM = list(range(100, 112))


class Engine:
    """An engine's cache, and an index that hears of it unless `deaf`.

    Args:
        room: Blocks.
        told: Whether the index knows that number.
        seed: Of new prompts.
    """

    def __init__(self, room: int, seed: int, *, told: bool = True) -> None:
        self.blocks = BlockManager(room + 1, SIZE)
        self.index = KvIndex(SIZE, lambda *_: None)
        self.index.add(A)
        if told:
            (row,) = [self.index.targets.row(A)]
            self.index.targets.describe(row, total_blocks=room)
        self.deaf = False
        self.stored = 0
        self.prompts: list[list[int]] = []
        self.rng = random.Random(seed)

    def compute(self, tokens: list[int]) -> None:
        """A prompt comes, is computed and goes."""
        table = BlockTable(list(tokens), CacheScope())
        assert self.blocks.admit(table, self.blocks.find_prefix(table), len(tokens))
        self.blocks.free(table)
        self.prompts.append(tokens)
        events = self.blocks.take_events()
        self.stored += sum(len(event.hashes) for event in events if hasattr(event, "hashes"))
        if events and not self.deaf:
            self.index.apply_payload(A, encode_batch(0.0, events, 0, "map", "int"))

    def fresh(self) -> list[int]:
        """New words of a block or more, and of no whole number of blocks."""
        return [self.rng.randrange(1000, 60_000) for _ in range(SIZE * self.rng.randint(1, 4) + 1)]

    def claimed(self, tokens: list[int]) -> int:
        seqs = self.index.sequence(Prompt(array("I", tokens)))
        return self.index.overlaps(seqs, [A])[0].device

    def held(self, tokens: list[int]) -> int:
        return self.blocks.find_prefix(BlockTable([*tokens, 0], CacheScope()))

    def wrong(self) -> list[tuple[int, int]]:
        """(blocks claimed, blocks held) of prompts of which these differ."""
        both = [(self.claimed(tokens), self.held(tokens)) for tokens in self.prompts]
        return [(claimed, held) for claimed, held in both if claimed != held]

    def lose(self, prompts: int) -> None:
        """Prompts are computed of which nothing is heard."""
        self.deaf = True
        for _ in range(prompts):
            self.compute(SYSTEM + self.fresh())
        self.deaf = False
        self.index.doubt(A)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_when_the_cache_has_turned_over_the_index_is_what_the_engine_holds(seed: int, told: bool) -> None:
    """Sessions that go on below one system prompt, stored once long before the loss."""
    engine = Engine(60, seed, told=told)
    for _ in range(30):
        engine.compute(SYSTEM + engine.fresh())
    assert engine.wrong() == []
    engine.lose(12)
    assert any(claimed > held for claimed, held in engine.wrong()), "blocks are claimed that are gone"
    before, known = engine.stored, len(engine.prompts)
    while not engine.index.renewed(A):
        recent = engine.rng.choice(engine.prompts[known:]) if len(engine.prompts) > known else SYSTEM
        engine.compute(recent + engine.fresh() if len(recent) < 40 else SYSTEM + engine.fresh())
    assert engine.stored - before <= 60 + 16, "it takes one turnover"
    assert engine.wrong() == []
    for _ in range(20):
        engine.compute(SYSTEM + engine.fresh())
    assert engine.wrong() == [], "and it stays so"


@given(st.integers(0, 2**32), st.integers(12, 60), st.integers(1, 20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_is_asked_nothing_is_claimed_that_is_gone(seed: int, room: int, lost: int, told: bool) -> None:
    """Also prompts that were cached unseen, and such as add nothing: these may be hidden, and never more."""
    engine = Engine(room, seed, told=told)
    rng = engine.rng
    for _ in range(rng.randint(1, 30)):
        engine.compute(SYSTEM[: rng.choice([0, 5, 9])] + engine.fresh())
    engine.lose(lost)
    for _ in range(1000):
        engine.compute(rng.choice(engine.prompts) if rng.random() < 0.3 else engine.fresh())
        if engine.index.renewed(A):
            break
    else:
        pytest.fail("it never became true")
    assert [pair for pair in engine.wrong() if pair[0] > pair[1]] == []


def test_a_second_loss_begins_anew() -> None:
    engine = Engine(20, 1)
    for _ in range(10):
        engine.compute(engine.fresh())
    engine.lose(3)
    for _ in range(3):
        engine.compute(engine.fresh())
    assert not engine.index.renewed(A)
    engine.lose(3)
    before = engine.stored
    while not engine.index.renewed(A):
        engine.compute(engine.fresh())
    assert engine.stored - before >= 20
    assert engine.wrong() == []


def test_a_picture_that_holds_nothing_is_not_true_for_that() -> None:
    engine = Engine(20, 1)
    assert not engine.index.renewed(A)
    engine.lose(2)
    assert not engine.index.renewed(A)
    engine.compute(engine.fresh())
    assert engine.index.renewed(A)
    assert not engine.index.renewed(A), "it is told once"


def test_to_forget_everything_ends_it() -> None:
    engine = Engine(20, 1)
    engine.compute(engine.fresh())
    engine.lose(2)
    engine.index.clear(A)
    assert not engine.index.renewed(A)


def test_lower_tiers_vouch_for_nothing_but_themselves() -> None:
    tree = RadixTree(SIZE)
    slot = tree.add_slot()
    tree.store(slot, None, array("Q", [1, 2, 3]), array("I", range(12)), 0)
    renewal = Renewal(tree, [SlotFacts(slot, 0, prefixes=False)])
    for name in (4, 5, 6):
        assert not renewal.done()
        tree.store(slot, 3, array("Q", [name]), array("I", [name] * SIZE), 0)
    while not renewal.done():
        pass
    assert [name for name in range(1, 7) if tree.holds(slot, name)] == [4, 5, 6]


def test_what_is_dropped_at_a_time_is_bounded() -> None:
    tree = RadixTree(SIZE)
    slot = tree.add_slot()
    tree.store(slot, None, array("Q", range(100)), array("I", range(400)), 0)
    assert tree.doubt(slot) == 100
    assert [tree.drop_doubted(slot, 40) for _ in range(4)] == [40, 40, 20, 0]
    tree._check()
    with pytest.raises(ValueError, match="most"):
        tree.drop_doubted(slot, 0)
