"""KvIndex: engine events in, overlaps out; compared with a memory of whole caches kept by hand."""

import random
from array import array
from collections import Counter

import pytest

from kvrouter_grpc.core import hash_sequence, seed_for
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.types import (
    Overlap,
    Prompt,
    Target,
    Tier,
)
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksRemoved, BlocksStored, CacheCleared

A, B = Target(1, 0), Target(2, 0)
SIZE = 4


def tokens(*values):
    return array("I", values)


def prompt(values, **kwargs):
    return Prompt(array("I", values), **kwargs)


def stored(hashes, values, parent=None, **kwargs):
    return BlocksStored(array("Q", hashes), parent, array("I", values), kwargs.pop("block_size", SIZE), **kwargs)


def removed(*hashes, **kwargs):
    return BlocksRemoved(array("Q", hashes), **kwargs)


@pytest.fixture
def differing():
    return []


@pytest.fixture
def index(differing):
    index = KvIndex(SIZE, lambda target, size: differing.append((target, size)))
    index.add(A)
    index.add(B)
    return index


def apply(index, target, *events):
    index.apply_payload(target, encode_batch(events))


def overlap(index, values, target=A, **kwargs):
    return index.overlaps(index.sequence(prompt(values, **kwargs)), [target])[0]


WORDS = list(range(100, 116))  # four blocks


def test_overlap_is_the_leading_blocks_held(index):
    apply(index, A, stored([1, 2, 3], WORDS[:12]))
    apply(index, B, stored([7], WORDS[:4]))
    seqs = index.sequence(prompt(WORDS))
    assert index.overlaps(seqs, [A, B, Target(9, 0)]) == [Overlap(3), Overlap(1), Overlap()]
    assert overlap(index, WORDS[:11]) == Overlap(2)
    assert overlap(index, WORDS[:3]) == Overlap()
    assert overlap(index, [0, *WORDS]) == Overlap()


def test_a_physical_copy_removed_leaves_the_other(index):
    apply(index, A, stored([1, 2], WORDS[:8]), stored([2], WORDS[4:8], parent=1), removed(2))
    assert overlap(index, WORDS) == Overlap(2)
    apply(index, A, removed(2))
    assert overlap(index, WORDS) == Overlap(1)


def test_clearing_forgets_one_target_only(index):
    for target in (A, B):
        apply(index, target, stored([1], WORDS[:4]))
    apply(index, A, CacheCleared())
    assert (overlap(index, WORDS), overlap(index, WORDS, B)) == (Overlap(), Overlap(1))
    index.clear(B)
    assert index.blocks(B) == 0


@pytest.mark.parametrize(
    "other", [{"lora_name": "a"}, {"cache_salt": "s"}, {"lora_name": "a", "cache_salt": "s"}, {"lora_name": "b"}]
)
def test_lora_and_salt_are_kept_apart(index, other):
    apply(index, A, stored([1, 2], WORDS[:8], lora_name="a"), stored([3], WORDS[:4], cache_salt="x"))
    assert overlap(index, WORDS) == Overlap()
    apply(index, A, stored([5, 6], WORDS[:8]))
    assert overlap(index, WORDS) == Overlap(2)
    assert overlap(index, WORDS, **other) == (Overlap(2) if other == {"lora_name": "a"} else Overlap())


def test_children_inherit_the_salt_of_their_chain(index):
    apply(index, A, stored([1], WORDS[:4], cache_salt="x"), stored([2], WORDS[4:8], parent=1))
    assert overlap(index, WORDS, cache_salt="x") == Overlap(2)
    assert overlap(index, WORDS) == Overlap()


def test_multimodal_hashes_are_part_of_a_block(index):
    apply(index, A, stored([1, 2], WORDS[:8], mm_hashes={1: [77]}))
    assert overlap(index, WORDS) == Overlap(1)
    assert overlap(index, WORDS, mm_hashes={1: [77]}) == Overlap(2)
    assert overlap(index, WORDS, mm_hashes={1: [78]}) == Overlap(1)


def test_orphans_wait_and_are_adopted_in_any_order(index):
    apply(index, A, stored([3], WORDS[8:12], parent=2), stored([4], WORDS[12:16], parent=3), removed(4))
    assert (overlap(index, WORDS), index.orphans(A)) == (Overlap(), 2)
    apply(index, A, stored([2], WORDS[4:8], parent=1))
    apply(index, A, stored([1], WORDS[:4]))
    assert (overlap(index, WORDS), index.orphans(A)) == (Overlap(3), 0)


def test_lower_tiers_extend_the_device(index):
    apply(index, A, stored([1, 2], WORDS[:8]))
    apply(index, A, stored([2, 3], WORDS[4:12], parent=1, tier=Tier.HOST))
    apply(index, A, stored([4], WORDS[12:16], parent=3, tier=Tier.DISK))
    assert overlap(index, WORDS) == Overlap(2, 1, 1)
    apply(index, A, removed(2))
    assert overlap(index, WORDS) == Overlap(1, 2, 1)
    apply(index, A, removed(2, 3, tier=Tier.HOST))
    assert overlap(index, WORDS) == Overlap(1)
    assert index.blocks(A) == 2


def test_an_offloaded_copy_without_tokens_is_known_by_its_hash(index):
    apply(index, A, stored([1, 2], WORDS[:8]))
    apply(index, A, stored([1, 2], [], block_size=0, tier=Tier.HOST), removed(1, 2))
    assert overlap(index, WORDS) == Overlap(0, 2)


def test_an_offloaded_copy_that_is_stored_twice_goes_with_its_second_removal(index):
    apply(index, A, stored([1], WORDS[:4]), *[stored([1], [], block_size=0, tier=Tier.HOST)] * 2, removed(1))
    apply(index, A, removed(1, tier=Tier.HOST))
    assert overlap(index, WORDS) == Overlap(0, 1)
    apply(index, A, removed(1, tier=Tier.HOST))
    assert (overlap(index, WORDS), index.blocks(A)) == (Overlap(), 0)


def both_groups(blocks):
    """A step of a model with full attention and a sliding window of 6 tokens: two blocks of 4."""
    names = range(1, blocks + 1)
    values = WORDS[: blocks * SIZE]
    return [
        stored(names, values, group=1, kind="sliding_window", window=6),
        stored(names, values, group=0, kind="full_attention"),
    ]


def test_a_prefix_ends_where_the_window_before_its_end_is_held(index):
    apply(index, A, *both_groups(4))
    assert (overlap(index, WORDS), index.blocks(A)) == (Overlap(4), 4)
    apply(index, A, removed(1, group=1))  # far behind the window of a long prompt, but a short one needs it
    assert [overlap(index, WORDS[:end]) for end in (16, 12, 8, 4)] == [Overlap(4), Overlap(3), Overlap(), Overlap()]
    apply(index, A, removed(3, group=1))
    assert overlap(index, WORDS) == Overlap()
    apply(index, A, stored([3], WORDS[8:12], parent=2, group=1, kind="sliding_window", window=6))
    apply(index, A, removed(4, group=0))
    assert overlap(index, WORDS) == Overlap(3)


def test_a_group_may_name_its_blocks_by_hash_alone_before_their_tokens_come(index):
    state = stored([2, 4], WORDS[:16], group=0, kind="mamba")  # of four blocks it keeps two states
    apply(index, A, state, stored([1, 2, 3, 4], WORDS, group=1, kind="full_attention"))
    assert [overlap(index, WORDS[:end]) for end in (16, 12, 8, 4)] == [Overlap(4), Overlap(2), Overlap(2), Overlap()]
    apply(index, A, removed(4, group=0))
    assert overlap(index, WORDS) == Overlap(2)


def test_blocks_of_a_group_may_span_several_of_the_index(index, differing):
    wide = stored([2, 4], WORDS, block_size=8, group=1, kind="sliding_window", window=9)
    apply(index, A, stored([1, 2, 3, 4], WORDS, group=0, kind="full_attention"), wide)
    other = [*WORDS[:12], 0, 0, 0, 0]
    assert [overlap(index, tokens) for tokens in (WORDS, WORDS[:12], other)] == [Overlap(4), Overlap(2), Overlap(2)]
    apply(index, A, removed(2, group=1))
    assert [overlap(index, tokens) for tokens in (WORDS, WORDS[:12])] == [Overlap(4), Overlap()]
    apply(index, A, removed(4, group=1))
    assert (overlap(index, WORDS), index.blocks(A), differing) == (Overlap(), 4, [])


def test_the_unit_divides_the_blocks_of_all_groups(differing):
    index = KvIndex(None, lambda target, size: differing.append((target, size)))
    index.add(A)
    full = stored([2, 4], WORDS, block_size=8, group=0, kind="full_attention")
    apply(index, A, full, stored([1, 2, 3, 4], WORDS, group=1, kind="sliding_window", window=5))
    assert (index.block_size, overlap(index, WORDS), overlap(index, WORDS[:12])) == (4, Overlap(4), Overlap(2))
    coarse = KvIndex(8, lambda target, size: differing.append((target, size)))
    coarse.add(A)
    apply(coarse, A, full, stored([1, 2, 3, 4], WORDS, group=1, kind="sliding_window", window=5))
    assert differing[0] == (A, 4)


def test_a_group_of_unknown_rule_is_told_of(index):
    apply(
        index,
        A,
        stored([1], WORDS[:4], group=0, kind="full_attention"),
        stored([1], WORDS[:4], group=1, kind="chunked_local_attention"),
    )
    assert overlap(index, WORDS) == Overlap(1)
    assert index.stream(A).unjudged.startswith("KV cache group 1 of its model is of a kind")


def test_lower_tiers_of_several_groups(index):
    apply(index, A, *both_groups(2))
    for group in (0, 1):  # offloaded copies name their blocks by hash
        apply(index, A, stored([1, 2], [], block_size=0, group=group, tier=Tier.HOST), removed(1, 2, group=group))
    assert overlap(index, WORDS) == Overlap(0, 2)
    apply(index, A, *both_groups(1))
    assert overlap(index, WORDS) == Overlap(1, 1)
    apply(index, A, removed(1, 2, group=1, tier=Tier.HOST))
    assert overlap(index, WORDS) == Overlap(1)
    index.remove(A)
    assert index.stats()["blocks"] == 0


def test_another_block_size_is_reported_and_not_indexed(index, differing):
    apply(index, A, stored([1], WORDS[:8], block_size=8))
    assert (differing, index.blocks(A)) == ([(A, 8)], 0)


def test_the_block_size_is_learned_from_the_first_event(differing):
    index = KvIndex(None, lambda target, size: differing.append((target, size)))
    index.add(A)
    assert (index.block_size, len(index.sequence(prompt(WORDS))), overlap(index, WORDS)) == (0, 0, Overlap())
    apply(index, A, stored([1], WORDS[:4]))
    assert (index.block_size, overlap(index, WORDS), differing) == (4, Overlap(1), [])
    assert index.learn_block_size(4)
    assert not index.learn_block_size(8)


def test_a_removed_target_is_gone_and_may_come_back(index):
    apply(index, A, stored([1], WORDS[:4]))
    index.remove(A)
    apply(index, A, stored([1], WORDS[:4]))
    assert (overlap(index, WORDS), index.stats()["blocks"]) == (Overlap(), 0)
    assert index.stream_if_known(A) is None
    index.add(A)
    apply(index, A, stored([1], WORDS[:4]))
    assert overlap(index, WORDS) == Overlap(1)


class Engine:
    """A cache kept by hand: which sequences of tokens are held, by engine hash."""

    def __init__(self, rng, base):
        self.rng, self.base, self.names, self.copies = rng, base, {}, Counter()

    def name(self, path):
        return self.names.setdefault(path, self.base + len(self.names))

    def store(self, path, depth):
        """Store the blocks of `path` from `depth` on."""
        hashes = [self.name(path[: end + 1]) for end in range(depth, len(path))]
        for end in range(depth, len(path)):
            self.copies[path[: end + 1]] += 1
        values = [value for block in path[depth:] for value in block]
        return stored(hashes, values, self.name(path[:depth]) if depth else None)

    def evict(self):
        path = self.rng.choice(sorted(self.copies))
        self.copies[path] -= 1
        if not self.copies[path]:
            del self.copies[path]
        return removed(self.name(path))

    def holds(self, path):
        return next((end for end in range(len(path)) if path[: end + 1] not in self.copies), len(path))


@pytest.mark.parametrize("seed", range(20))
def test_random_caches_stay_exact(index, seed):
    """Stores, evictions anywhere, duplicates, clears and late parents: the overlap is what the cache would hit."""
    rng = random.Random(seed)
    engines = {A: Engine(rng, 1), B: Engine(rng, 10_000)}
    held_back = {A: [], B: []}
    for _ in range(400):
        target = rng.choice([A, B])
        engine = engines[target]
        path = tuple(tuple(rng.choices([1, 2], k=SIZE)[:1] * SIZE) for _ in range(rng.randint(1, 6)))
        roll = rng.random()
        if roll < 0.6:
            # An engine names a parent only while it holds it, which is when it computes the rest.
            depth = rng.choice([end for end in range(len(path)) if engine.holds(path[:end]) == end])
            event = engine.store(path, depth)
            if rng.random() < 0.1 and depth == 0:
                held_back[target].append(event)  # lost for now: its children are orphans
            else:
                apply(index, target, event)
        elif roll < 0.95 and engine.copies and not held_back[target]:
            apply(index, target, engine.evict())
        elif roll > 0.99:
            engine.copies.clear()
            held_back[target].clear()
            apply(index, target, CacheCleared())
        if rng.random() < 0.5:
            apply(index, target, *held_back[target])
            held_back[target].clear()
        if not held_back[target]:
            asked = [value for block in path for value in block]
            assert overlap(index, asked, target).device == engine.holds(path)
            assert index.orphans(target) == 0
    for target in (A, B):
        index.remove(target)
    assert index.stats()["blocks"] == index.stats()["edges"] == 0


def test_sequence_hashes_are_the_contracts(index):
    asked = prompt(WORDS, lora_name="a", cache_salt="s")
    assert index.sequence(asked) == hash_sequence(asked.tokens, SIZE, seed_for("a", "s"))
