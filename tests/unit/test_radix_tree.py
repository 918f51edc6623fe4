"""The rules of the radix tree, one by one, in small examples."""

from array import array

import pytest

from kvrouter_grpc.core import RadixTree, hash_sequence, seed_for

SIZE = 4
SEED = 1337


def prompt(*blocks):
    """Tokens of a prompt whose blocks are filled with one number each."""
    return array("I", (block for block in blocks for _ in range(SIZE)))


def seqs(*blocks, seed=SEED):
    return hash_sequence(prompt(*blocks), SIZE, seed)


def names(*values):
    return array("Q", values)


@pytest.fixture
def tree():
    tree = RadixTree(SIZE)
    yield tree
    tree._check()
    for slot in range(64):
        try:
            tree.remove_slot(slot)
        except KeyError:
            continue
        tree._check()
    stats = tree.stats()
    assert (stats["edges"], stats["runs"], stats["blocks"], stats["bytes"]) == (0, 0, 0, 0)


def matched(tree, *blocks, seed=SEED):
    return list(tree.match(seqs(*blocks, seed=seed)))


def test_slot_ids_are_the_lowest_free(tree):
    assert [tree.add_slot() for _ in range(3)] == [0, 1, 2]
    tree.remove_slot(1)
    assert tree.add_slot() == 1
    assert tree.add_slot() == 3
    tree.remove_slot(3)
    tree.remove_slot(2)
    assert len(tree.match(seqs(1))) == 2  # the array is no longer than the highest id needs


def test_match_is_the_longest_prefix_per_slot(tree):
    a, b = tree.add_slot(), tree.add_slot()
    assert tree.store(a, None, names(1, 2, 3), prompt(1, 2, 3), SEED)
    assert tree.store(b, None, names(1), prompt(1), SEED)
    assert matched(tree, 1, 2, 3, 4) == [3, 1]
    assert matched(tree, 1, 2) == [2, 1]
    assert matched(tree, 1, 9, 3) == [1, 1]
    assert matched(tree, 2, 3) == [0, 0]
    assert matched(tree) == [0, 0]


def test_a_store_goes_on_from_its_parent(tree):
    a = tree.add_slot()
    assert tree.store(a, None, names(1), prompt(1), SEED)
    assert tree.store(a, 1, names(2, 3), prompt(2, 3), SEED)
    assert tree.position(a, 3) == (seqs(1, 2, 3)[2], 2)
    assert matched(tree, 1, 2, 3) == [3]
    assert tree.stats()["edges"] == 1


def test_an_unknown_parent_changes_nothing(tree):
    a, b = tree.add_slot(), tree.add_slot()
    assert tree.store(a, None, names(1), prompt(1), SEED)
    assert not tree.store(b, 1, names(2), prompt(2), SEED)
    assert tree.stats()["blocks"] == 1
    assert tree.store(b, 1, names(2), prompt(2), SEED, None, a)
    assert matched(tree, 1, 2) == [1, 0]  # b holds the second block only
    assert tree.extend(seqs(1, 2), b, 1) == 1


def test_branches_split_and_merge_again(tree):
    a = tree.add_slot()
    tree.store(a, None, names(1, 2, 3, 4), prompt(1, 2, 3, 4), SEED)
    tree.store(a, 2, names(5), prompt(5), SEED)
    assert (tree.stats()["edges"], tree.stats()["splits"]) == (3, 1)
    assert matched(tree, 1, 2, 3, 4) == [4]
    assert matched(tree, 1, 2, 5) == [3]
    assert tree.remove(a, names(5)) == 0
    assert (tree.stats()["edges"], tree.stats()["merges"]) == (1, 1)
    assert matched(tree, 1, 2, 3, 4) == [4]


def test_tail_eviction_splits_nothing_and_returns_memory(tree):
    a, b = tree.add_slot(), tree.add_slot()
    count = 1000
    tree.store(a, None, array("Q", range(count)), prompt(*range(count)), SEED)
    tree.store(b, None, array("Q", range(10)), prompt(*range(10)), SEED)
    full = tree.stats()["bytes"]
    for name in reversed(range(10, count)):
        tree.remove(a, names(name))
    stats = tree.stats()
    assert (stats["edges"], stats["splits"]) == (1, 0)
    assert stats["bytes"] < full / 10
    assert matched(tree, *range(count)) == [10, 10]


def test_a_gap_hides_what_lies_behind_until_it_is_filled(tree):
    a = tree.add_slot()
    tree.store(a, None, names(1, 2, 3), prompt(1, 2, 3), SEED)
    tree.remove(a, names(2))
    assert matched(tree, 1, 2, 3) == [1]
    assert tree.extend(seqs(1, 2, 3), a, 2) == 1
    tree._check()
    assert tree.store(a, 1, names(2), prompt(2), SEED)
    assert matched(tree, 1, 2, 3) == [3]


def test_a_hash_is_held_until_it_was_removed_as_often_as_stored(tree):
    a = tree.add_slot()
    for _ in range(3):
        tree.store(a, None, names(1), prompt(1), SEED)
    assert tree.blocks(a) == 1
    assert tree.stats()["duplicates"] == 2
    for left in (1, 1, 0):
        assert tree.remove(a, names(1)) == 0
        assert matched(tree, 1) == [left]
    assert tree.remove(a, names(1)) == 1
    assert tree.stats()["unknown_removes"] == 1


def test_a_block_is_held_until_all_its_names_are_gone(tree):
    a = tree.add_slot()
    tree.store(a, None, names(1), prompt(1), SEED)
    tree.store(a, None, names(2), prompt(1), SEED)
    assert tree.blocks(a) == 2
    tree.remove(a, names(1))
    assert matched(tree, 1) == [1]
    tree.remove(a, names(2))
    assert matched(tree, 1) == [0]


def test_a_hash_stored_for_another_block_moves(tree):
    a = tree.add_slot()
    tree.store(a, None, names(1), prompt(1), SEED)
    tree.store(a, None, names(1), prompt(2), SEED)
    assert tree.stats()["conflicts"] == 1
    assert matched(tree, 1) == [0]
    assert matched(tree, 2) == [1]


def test_one_store_that_moves_many_hashes_leaves_nothing_behind(tree):
    """The blocks it takes the hashes from lie below each other, and another slot holds the upper ones."""
    a, b = tree.add_slot(), tree.add_slot()
    tree.store(a, None, names(7, 9), prompt(1, 2), SEED)
    tree.store(a, 9, names(2), prompt(3), SEED)
    tree.store(a, 9, names(11, 10, 1), prompt(4, 3, 4), SEED)
    tree.store(a, 1, names(8, 9, 0, 5, 5, 1), prompt(5, 6, 4, 3, 5, 6), SEED)
    tree.store(a, 2, names(5, 8), prompt(7, 4), SEED)
    tree.store(b, 11, names(7, 3, 4), prompt(6, 3, 4), SEED, None, a)
    tree.store(a, 0, names(8, 9), prompt(4, 3), SEED)
    tree._check()
    tree.store(a, 3, names(1, 8, 9, 4, 2, 0), prompt(8, 4, 4, 5, 4, 4), SEED, None, b)
    tree._check()


def test_equal_hashes_in_one_store_and_a_parent_in_its_own_list(tree):
    a = tree.add_slot()
    tree.store(a, None, names(7, 7, 7), prompt(1, 2, 3), SEED)
    assert tree.position(a, 7) == (seqs(1, 2, 3)[2], 2)
    assert matched(tree, 1, 2, 3) == [0]
    tree._check()
    tree.store(a, 7, names(7, 8), prompt(4, 5), SEED)
    assert tree.position(a, 7) == (seqs(1, 2, 3, 4)[3], 3)
    assert tree.extend(seqs(1, 2, 3, 4, 5), a, 3) == 2


def test_adapters_tenants_and_images_never_match_across(tree):
    a = tree.add_slot()
    seed = seed_for("adapter", "tenant")
    tree.store(a, None, names(1), prompt(1), seed)
    tree.store(a, 1, names(2), prompt(2), SEED)  # a child inherits the seed, whatever the event says
    tree.store(a, None, names(3), prompt(1), SEED, {0: [99]})
    assert matched(tree, 1, 2, seed=seed) == [2]
    assert matched(tree, 1, 2) == [0]
    assert list(tree.match(hash_sequence(prompt(1), SIZE, SEED, {0: [99]}))) == [1]
    assert list(tree.match(hash_sequence(prompt(1), SIZE, seed, {0: [99]}))) == [0]


def test_tiers_share_places_by_engine_hash(tree):
    device, host = tree.add_slot(), tree.add_slot()
    tree.store(device, None, names(1, 2, 3), prompt(1, 2, 3), SEED)
    assert tree.store_known(host, device, names(2, 3, 4)) == 2
    tree.remove(device, names(3))
    tree.remove(device, names(2))
    assert matched(tree, 1, 2, 3) == [1, 0]
    assert tree.extend(seqs(1, 2, 3), host, 1) == 2
    assert tree.extend(seqs(1, 2, 3), host, 3) == 0
    assert tree.extend(seqs(1, 2, 3), host, 99) == 0


def test_a_path_of_sequence_hashes(tree):
    a = tree.add_slot()
    path = seqs(1, 2, 3)
    tree.store_path(a, path, SEED)
    assert list(tree.match(path)) == [3]
    assert tree.store(a, path[0], names(5), prompt(9), SEED)
    assert matched(tree, 1, 9) == [2]
    tree.remove(a, path)
    assert matched(tree, 1, 2, 3) == [0]


def test_a_path_keeps_the_seed_it_was_first_stored_with(tree):
    a = tree.add_slot()
    tree.store_path(a, names(1, 2), SEED)
    tree.store_path(a, names(1, 3), 99)
    tree._check()
    tree.store(a, 3, names(4), prompt(9), 99)
    b = tree.add_slot()
    tree.store_path(b, names(1, 2), 99)
    tree.store(b, 2, names(4), prompt(9), 99)
    tree._check()


def test_clearing_one_slot_leaves_the_others(tree):
    a, b = tree.add_slot(), tree.add_slot()
    for slot in (a, b):
        tree.store(slot, None, names(1, 2), prompt(1, 2), SEED)
    assert tree.clear(a) == 2
    assert tree.clear(a) == 0
    assert not tree.holds(a, 1)
    assert tree.holds(b, 1)
    assert matched(tree, 1, 2) == [0, 2]


def test_match_writes_into_the_given_array(tree):
    a = tree.add_slot()
    tree.store(a, None, names(1), prompt(1), SEED)
    out = array("I", [9, 9, 9])
    assert tree.match(seqs(1), out) is out
    assert list(out) == [1, 0, 0]
    with pytest.raises(ValueError, match="out has 0 entries"):
        tree.match(seqs(1), array("I"))
    with pytest.raises(ValueError, match=r"array\('I'\)"):
        tree.match(seqs(1), array("Q", [0]))


def test_more_references_than_are_counted_stop_at_the_limit(tree):
    a = tree.add_slot()
    hashes, tokens = names(1), prompt(1)
    for _ in range(131_071 + 5):
        tree.store(a, None, hashes, tokens, SEED)
    assert tree.remove(a, array("Q", [1] * 131_070)) == 0
    assert tree.holds(a, 1)
    assert tree.remove(a, names(1, 1)) == 1


def test_a_run_that_grows_past_its_limit_goes_on_in_another(tree):
    a = tree.add_slot()
    most = 1 << 20
    tree.store(a, None, array("Q", range(most - 1)), array("I", range(SIZE * (most - 1))), SEED)
    tree.store(a, most - 2, names(most, most + 1), prompt(1, 2), SEED)
    assert tree.stats()["runs"] == 2
    whole = hash_sequence(array("I", [*range(SIZE * (most - 1)), *prompt(1)]), SIZE)
    assert list(tree.match(whole)) == [most]
    assert tree.position(a, most + 1)[1] == most


def test_memory_over_the_limit_is_refused_and_nothing_is_lost():
    tree = RadixTree(SIZE, max_bytes=100_000)
    a = tree.add_slot()
    tree.store(a, None, names(1), prompt(1), SEED)
    with pytest.raises(MemoryError):
        tree.store(a, 1, array("Q", range(2, 50_000)), prompt(*range(2, 50_000)), SEED)
    tree._check()
    assert matched(tree, 1, 2) == [1]
    assert tree.stats()["bytes"] <= 100_000


@pytest.mark.parametrize("slot", [-1, 1, 1 << 40, "0", None, 0.0])
def test_slots_that_are_not_in_use(tree, slot):
    tree.add_slot()
    for call in (
        lambda: tree.store(slot, None, names(1), prompt(1), SEED),
        lambda: tree.store_path(slot, names(1), SEED),
        lambda: tree.store_known(slot, 0, names(1)),
        lambda: tree.store_known(0, slot, names(1)),
        lambda: tree.remove(slot, names(1)),
        lambda: tree.clear(slot),
        lambda: tree.remove_slot(slot),
        lambda: tree.blocks(slot),
        lambda: tree.holds(slot, 1),
        lambda: tree.position(slot, 1),
        lambda: tree.extend(names(1), slot, 0),
    ):
        with pytest.raises(KeyError, match="not in use"):
            call()


def test_bad_input_is_named_and_changes_nothing(tree):
    a = tree.add_slot()
    before = tree.stats()
    bad = [
        ((a, None, names(1, 2), prompt(1), SEED), "tokens: 2 blocks"),
        ((a, None, array("Q", bytes(8 * ((1 << 20) + 1))), prompt(1), SEED), "engine_hashes"),
        ((a, -1, names(1), prompt(1), SEED), "parent"),
        ((a, 1 << 64, names(1), prompt(1), SEED), "parent"),
        ((a, "x", names(1), prompt(1), SEED), "parent"),
        ((a, None, names(1), prompt(1), -5), "seed"),
        ((a, None, names(1), prompt(1), SEED, {0: [-1]}), "mm_hashes"),
        ((a, None, memoryview(bytes(17))[1:].cast("Q"), prompt(1, 1), SEED), "aligned"),
        ((a, None, array("I", [1]), prompt(1), SEED), "mismatch"),
        ((a, None, names(1), names(1), SEED), "mismatch"),
    ]
    for args, message in bad:
        with pytest.raises(ValueError, match=message):
            tree.store(*args)
    with pytest.raises(TypeError):
        tree.store(a, None, [1], prompt(1), SEED)
    with pytest.raises(KeyError):
        tree.store(a, 1, names(1), prompt(1), SEED, None, 7)
    with pytest.raises(ValueError, match="start"):
        tree.extend(seqs(1), a, -1)
    assert tree.stats() == before


def test_nothing_stored_is_fine(tree):
    a = tree.add_slot()
    assert tree.store(a, None, names(), prompt(), SEED)
    assert not tree.store(a, 5, names(), prompt(), SEED)
    assert tree.remove(a, names()) == 0
    assert tree.store_known(a, a, names()) == 0
    tree.store_path(a, names(), SEED)
    assert tree.stats()["edges"] == 0


@pytest.mark.parametrize("block_size", [0, -1, (1 << 20) + 1, "4", None])
def test_block_sizes_out_of_range(block_size):
    with pytest.raises(ValueError, match="block_size"):
        RadixTree(block_size)


def test_sequence_hashes_that_are_not_chained_harm_nothing(tree):
    paths = [[5, 5, 5], [5, 6, 5], [6, 5], [5, 5, 6, 5], [5], [6, 6, 6, 6], [5, 6, 7, 5, 6, 7], [6, 6, 5], [5, 5, 5, 5]]
    for path in paths:
        slot = tree.add_slot()
        tree.store_path(slot, array("Q", path), SEED)
        tree._check()
        tree.match(array("Q", path * 2))
        tree.extend(array("Q", path * 2), slot, 1)
    assert tree.stats()["splits"] > 2
    for slot in range(len(paths)):
        for name in (5, 6, 7):
            tree.remove(slot, names(name))
            tree._check()
    assert tree.stats()["edges"] == 0


def test_gaps_survive_splits_and_merges_of_long_edges(tree):
    """Bit sets are moved by words: every cut of a path of several words, with gaps on both sides of the cut."""
    count, gaps = 300, (3, 63, 64, 65, 127, 128, 200, 299)
    a, b = tree.add_slot(), tree.add_slot()
    path = seqs(*range(count))
    tree.store(a, None, array("Q", range(count)), prompt(*range(count)), SEED)
    tree.store(b, None, array("Q", range(count)), prompt(*range(count)), SEED)
    tree.remove(a, names(*gaps))
    expected = [next((gap for gap in gaps if gap >= start), count) - start for start in range(count)]
    for cut in (1, 62, 63, 64, 65, 100, 127, 128, 129, 192, 250, 298, 299):
        tree.store(b, cut - 1, names(1000), prompt(1000), SEED)
        assert tree.stats()["edges"] == 3
        tree._check()
        assert [tree.extend(path, a, start) for start in range(count)] == expected
        tree.remove(b, names(1000))
        assert tree.stats()["edges"] == 1
        tree._check()
        assert [tree.extend(path, a, start) for start in range(count)] == expected
    cuts = (10, 64, 66, 130, 190, 280)
    for order in (cuts, cuts[::-1], cuts[1::2] + cuts[::2]):  # tails that are cut again, and heads, merged in any order
        for cut in order:
            tree.store(b, cut - 1, names(1000 + cut), prompt(1000), SEED)
        tree.remove(a, names(250, 251))  # a bit set made in a short edge
        tree._check()
        assert tree.stats()["edges"] == 13
        assert tree.extend(path, a, 201) == 49
        tree.store(a, 249, names(250, 251), prompt(250, 251), SEED)
        tree.remove(a, names(298))
        for cut in order:
            tree.remove(b, names(1000 + cut))
            tree._check()
            assert tree.extend(path, a, 201) == 97
        tree.store(a, 297, names(298), prompt(298), SEED)
        assert [tree.extend(path, a, start) for start in range(count)] == expected
    for gap in gaps:
        tree.store(a, gap - 1, names(gap), prompt(gap), SEED)
    assert list(tree.match(path)) == [count, count]
