"""Held batches: bounds in number and bytes, the later copy, and what makes room."""

import pytest

from kvrouter_grpc.events.held import HeldBatches


def held(*seqs: int, batches: int = 10, size: int = 1000) -> HeldBatches:
    store = HeldBatches(batches, size)
    for seq in seqs:
        store.add(seq, b"%d" % seq)
    return store


def test_the_oldest_arrival_makes_room() -> None:
    store = held(7, 5, 9, batches=2)
    assert 7 not in store
    assert (store.take(5), store.take(9)) == (b"5", b"9")
    assert store.overflowed
    store.clear()
    assert (store.count, store.overflowed) == (0, False)


def test_bytes_are_counted_through_every_change() -> None:
    store = HeldBatches(10, 100)
    store.add(1, bytes(60))
    store.add(1, bytes(90))
    assert not store.overflowed
    store.take(1)
    store.add(2, bytes(50))
    store.add(3, bytes(50))
    assert not store.overflowed
    store.add(4, bytes(1))
    assert store.overflowed
    assert (2 in store, 3 in store, 4 in store) == (False, True, True)


def test_one_batch_may_be_larger_than_all_the_room() -> None:
    store = HeldBatches(10, 100)
    store.add(1, bytes(500))
    assert 1 in store
    store.add(2, bytes(1))
    assert (1 in store, 2 in store) == (False, True)


def test_what_is_about_to_be_taken_displaces_nothing() -> None:
    store = held(5, 6, batches=2)
    store.add(4, b"4", keep=True)
    assert (store.count, store.first(), store.overflowed) == (3, 4, False)


def test_of_two_copies_the_later_stays() -> None:
    store = held(1)
    assert not store.add(1, b"1")
    assert store.add(1, b"other")
    assert store.take(1) == b"other"
    with pytest.raises(KeyError):
        store.take(1)


def test_covers() -> None:
    store = held(3, 4, 6)
    assert store.covers(3, 5)
    assert store.covers(9, 9)
    assert not store.covers(3, 7)
