"""The block manager: allocation, reuse and eviction, and the events that tell of them."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrouter_grpc.mock_worker.block_hash import CacheScope
from kvrouter_grpc.mock_worker.blocks import BlockManager, BlockTable
from kvrouter_grpc.mock_worker.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

SIZE = 4


def run_prompt(blocks: BlockManager, tokens: list[int], scope: CacheScope | None = None) -> tuple[BlockTable, int]:
    """Admit a prompt as a whole; returns its table and its hits in blocks."""
    table = BlockTable(list(tokens), scope or CacheScope())
    hits = blocks.find_prefix(table)
    assert blocks.admit(table, hits, len(tokens))
    return table, hits


def count(held: Counter[bytes], events: list[KvEvent]) -> None:
    """What a listener that counts references makes of events."""
    for event in events:
        match event:
            case BlockStored(hashes=hashes):
                held.update(hashes)
            case BlockRemoved(hash=digest):
                assert held[digest] > 0, "removed what was not stored"
                held[digest] -= 1
            case AllBlocksCleared():
                held.clear()


def test_a_prompt_is_found_again_but_for_its_last_block() -> None:
    blocks = BlockManager(16, SIZE)
    table, hits = run_prompt(blocks, list(range(8)))
    assert hits == 0
    blocks.free(table)
    (stored,) = blocks.take_events()
    assert isinstance(stored, BlockStored)
    assert stored.parent is None
    assert stored.tokens == list(range(8))
    again, hits = run_prompt(blocks, list(range(8)))
    assert hits == 1
    (stored_again,) = blocks.take_events()
    assert isinstance(stored_again, BlockStored)
    assert stored_again.hashes == stored.hashes[1:]
    assert stored_again.parent == stored.hashes[0]
    assert again.blocks[0] == table.hashes.index(stored.hashes[0]) + 1  # the first physical block, revived
    blocks.free(again)
    _, hits = run_prompt(blocks, list(range(9)))
    assert hits == 2


@pytest.mark.parametrize(
    "other",
    [
        CacheScope(cache_salt="tenant"),
        CacheScope(lora_id=1, lora_name="a", lora_path="p"),
        CacheScope(lora_id=1, lora_name="a", lora_path="p", cache_salt="tenant"),
    ],
)
def test_scopes_never_share(other: CacheScope) -> None:
    blocks = BlockManager(32, SIZE)
    run_prompt(blocks, list(range(9)))
    table, hits = run_prompt(blocks, list(range(9)), other)
    assert hits == 0
    assert blocks.find_prefix(BlockTable(list(range(9)), other)) == 2
    stored = blocks.take_events()[-1]
    assert isinstance(stored, BlockStored)
    assert stored.lora_name == other.lora_name
    expected_first = [key for key in (other.lora_name, other.cache_salt) if key]
    assert stored.extra_keys[0] == expected_first
    assert stored.extra_keys[1] == ([other.lora_name] if other.lora_name else None)
    assert len(set(table.hashes)) == 2


def test_the_tail_of_the_oldest_sequence_is_evicted_first() -> None:
    blocks = BlockManager(5, SIZE)  # 4 usable
    first, _ = run_prompt(blocks, list(range(8)))
    blocks.free(first)
    second, _ = run_prompt(blocks, list(range(100, 108)))
    blocks.free(second)
    blocks.take_events()
    third, _ = run_prompt(blocks, list(range(200, 212)))
    removed = [event.hash for event in blocks.take_events() if isinstance(event, BlockRemoved)]
    assert removed == [first.hashes[1], first.hashes[0], second.hashes[1]]
    assert blocks.holds(second.hashes[0])
    assert len(third.blocks) == 3


def test_of_duplicates_the_oldest_serves_the_hit() -> None:
    blocks = BlockManager(16, SIZE)
    original, _ = run_prompt(blocks, list(range(8)))
    duplicate, _ = run_prompt(blocks, list(range(8)))
    assert original.blocks[1] != duplicate.blocks[1]
    third, hits = run_prompt(blocks, list(range(9)))
    assert hits == 2
    assert third.blocks[:2] == original.blocks


def test_a_duplicate_leaves_one_behind() -> None:
    blocks = BlockManager(16, SIZE)
    for _ in range(2):
        table, _ = run_prompt(blocks, list(range(8)))
        blocks.free(table)
    assert blocks.cached_blocks == 3
    blocks.take_events()
    filler, _ = run_prompt(blocks, list(range(100, 100 + 13 * SIZE)))  # 12 unused blocks and one of the duplicates
    events = blocks.take_events()
    assert [event.hash for event in events if isinstance(event, BlockRemoved)] == [table.hashes[1]]
    assert blocks.holds(table.hashes[1])
    assert len(filler.blocks) == 13


def test_admission_needs_the_whole_sequence_to_fit_and_changes_nothing_otherwise() -> None:
    blocks = BlockManager(5, SIZE)
    table, _ = run_prompt(blocks, list(range(8)))
    waiting = BlockTable(list(range(100, 112)))
    assert not blocks.admit(waiting, blocks.find_prefix(waiting), SIZE)  # a chunk of 4 would fit, all 12 would not
    assert blocks.free_blocks == 2
    assert waiting.blocks == []
    blocks.free(table)
    assert blocks.admit(waiting, 0, SIZE)
    assert len(waiting.blocks) == 1


def test_reset_is_refused_while_blocks_are_held_and_told_with_what_follows() -> None:
    blocks = BlockManager(16, SIZE)
    table, _ = run_prompt(blocks, list(range(9)))
    assert not blocks.reset()
    blocks.free(table)
    blocks.take_events()
    assert blocks.reset()
    assert blocks.usage == 0.0
    assert blocks.cached_blocks == 0
    _, hits = run_prompt(blocks, list(range(9)))
    assert hits == 0
    assert [type(event) for event in blocks.take_events()] == [AllBlocksCleared, BlockStored]


class BlockManagerMachine(RuleBasedStateMachine):
    """Random requests come, decode and go; what listeners believe always equals what is cached."""

    @initialize(num_blocks=st.integers(2, 24))
    def start(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, 2)
        self.tables: list[BlockTable] = []
        self.held: Counter[bytes] = Counter()
        self.salts = [CacheScope(), CacheScope(cache_salt="s")]

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=12), salted=st.booleans())
    def admit(self, tokens: list[int], salted: bool) -> None:
        table = BlockTable(tokens, self.salts[salted])
        hits = self.blocks.find_prefix(table)
        assert hits <= (len(tokens) - 1) // 2
        free = self.blocks.free_blocks
        if self.blocks.admit(table, hits, len(tokens)):
            self.tables.append(table)
        else:
            assert free == self.blocks.free_blocks
            assert not table.blocks

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), token=st.integers(0, 2))
    def decode(self, data: st.DataObject, token: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        length = len(table.tokens)
        table.tokens.append(token)
        if not self.blocks.grow(table, length + 1):
            table.tokens.pop()
            assert self.blocks.free_blocks == 0

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables = [other for other in self.tables if other is not table]
        self.blocks.free(table)

    @rule()
    def reset(self) -> None:
        assert self.blocks.reset() == (not any(table.blocks for table in self.tables))

    @invariant()
    def listeners_know_the_truth(self) -> None:
        if not hasattr(self, "blocks"):
            return
        count(self.held, self.blocks.take_events())
        assert self.held.total() == self.blocks.cached_blocks
        assert all(self.blocks.holds(digest) for digest, number in self.held.items() if number)

    @invariant()
    def blocks_are_neither_lost_nor_invented(self) -> None:
        if not hasattr(self, "blocks"):
            return
        used = {block for table in self.tables for block in table.blocks}
        assert 0 not in used
        assert len(used) + self.blocks.free_blocks == self.blocks.num_blocks - 1
        for table in self.tables:
            assert len(table.blocks) == -(-len(table.tokens) // 2)
            assert all(self.blocks.holds(digest) for digest in table.hashes[: table.registered])


BlockManagerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestBlockManagerMachine = BlockManagerMachine.TestCase
