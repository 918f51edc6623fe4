"""What a slot holds as bytes: whatever the bytes are, the tree stays whole. That they say the same is in the twin's test."""

import random
import struct
from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import RadixTree, hash_sequence, read_slot, write_slot

SIZE = 2


def path(*words):
    return hash_sequence(array("I", [word for word in words for _ in range(SIZE)]), SIZE)


def filled():
    """A slot with branches, holes, names stored twice and blocks named twice, beside a slot that holds other things."""
    tree = RadixTree(SIZE)
    slot, other = tree.add_slot(), tree.add_slot()
    tree.store(slot, None, array("Q", range(1, 9)), array("I", [w for w in range(8) for _ in range(SIZE)]), 1337)
    tree.store(slot, 3, array("Q", [11, 12]), array("I", [7, 7, 8, 8]), 1337)
    tree.store(slot, 11, array("Q", [12, 13, 14]), array("I", [8, 8, 9, 9, 1, 1]), 1337)
    tree.store(slot, 7, array("Q", [88]), array("I", [7, 7]), 1337)
    tree.store(slot, None, array("Q", [0, 2**64 - 1]), array("I", [5, 5, 6, 6]), 7)
    tree.store_path(other, path(0, 1, 2, 9), 1337)
    tree.remove(slot, array("Q", [2, 5]))
    return tree, slot


def test_the_format_is_what_it_was():
    tree = RadixTree(SIZE)
    slot = tree.add_slot()
    tree.store_path(slot, path(1, 2), 1337)
    tree.remove(slot, path(1, 2)[:1])
    first, second = path(1, 2)
    header = struct.pack("<IIII", 1, 2, 0, 0)
    stretch = struct.pack("<IIQII", 0, 0, 1337, 2, 0)
    assert write_slot(tree, slot) == header + stretch + struct.pack("<5Q", first, second, 0b10, 0, second)
    assert write_slot(tree, tree.add_slot()) == struct.pack("<IIII", 0, 0, 0, 0)


def test_it_takes_few_bytes():
    tree = RadixTree(SIZE)
    slot = tree.add_slot()
    rng = random.Random(1)
    for _ in range(100):
        tree.store_path(slot, array("Q", [rng.getrandbits(64) for _ in range(50)]), 1337)
    assert len(write_slot(tree, slot)) / tree.blocks(slot) < 17


def test_a_slot_that_holds_something_is_not_read_into():
    tree, slot = filled()
    with pytest.raises(ValueError, match="slot"):
        read_slot(tree, slot, write_slot(tree, slot))
    with pytest.raises(KeyError):
        read_slot(tree, 99, b"")


def test_without_memory_nothing_is_left():
    tree, slot = filled()
    data = write_slot(tree, slot)
    failed = 0
    for limit in range(1_000, 12_000, 40):
        small = RadixTree(SIZE, max_bytes=limit)
        target = small.add_slot()
        try:
            read_slot(small, target, data)
        except MemoryError:
            failed += 1
            small._check()
            assert small.blocks(target) == 0
            assert small.stats()["edges"] == 0
        else:
            assert write_slot(small, target)
            break
    assert failed > 5


def reads(data):
    tree = RadixTree(SIZE)
    slot = tree.add_slot()
    other = tree.add_slot()
    tree.store_path(other, path(0, 1, 2, 3), 1337)
    try:
        read_slot(tree, slot, data)
    except ValueError:
        assert tree.blocks(slot) == 0
    tree._check()
    tree.match(path(0, 1, 2, 3))
    tree.clear(slot)
    tree.clear(other)
    tree._check()
    assert tree.stats()["edges"] == 0
    tree.remove_slot(other)
    tree.remove_slot(slot)
    assert tree.stats()["bytes"] == 0


def test_every_truncation_is_refused():
    tree, slot = filled()
    data = write_slot(tree, slot)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="data"):
            read_slot(tree, tree.add_slot(), data[:size])
        reads(data[:size])


@settings(max_examples=600, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
@example(flips=[(0, 1)])
def test_damaged_bytes_leave_the_tree_whole(flips):
    tree, slot = filled()
    data = bytearray(write_slot(tree, slot))
    for at, mask in flips:
        data[at % len(data)] ^= mask
    reads(bytes(data))


@settings(max_examples=300, deadline=None)
@given(
    stretches=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4)), max_size=5),
    hashes=st.lists(st.integers(0, 3), min_size=20, max_size=20),
    names=st.lists(st.integers(0, 5), min_size=20, max_size=20),
    presence=st.integers(0, 2**20 - 1),
    extras=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 19), st.integers(0, 3)), max_size=4),
)
def test_a_well_formed_lie_leaves_the_tree_whole(stretches, hashes, names, presence, extras):
    blocks = sum(length for _, _, length in stretches)
    data = struct.pack("<IIII", len(stretches), blocks, len(extras), 0)
    for parent, offset, length in stretches:
        data += struct.pack("<IIQII", parent, offset, 1337, length, 0)
    data += struct.pack(f"<{blocks}Q", *hashes[:blocks])
    data += struct.pack("<Q", presence) if blocks else b""
    data += struct.pack(f"<{blocks}Q", *names[:blocks])
    for name, block, references in extras:
        data += struct.pack("<QII", name, block, references)
    reads(data)
