"""Blocks that wait for their parent."""

from array import array

import pytest

from kvrouter_grpc.routing.orphans import OrphanLot
from kvrouter_grpc.types import BlocksStored


def stored(parent, *hashes):
    return BlocksStored(array("Q", hashes), parent, array("I", range(len(hashes))), 1)


def test_parks_until_the_parent_appears():
    lot = OrphanLot()
    first, second = stored(1, 2, 3), stored(1, 4)
    lot.park(first)
    lot.park(second)
    assert len(lot) == 3
    assert lot.adopt([7, 1]) == [first, second]
    assert len(lot) == 0
    assert lot.adopt([1]) == []


def test_removals_of_parked_blocks_are_handed_out_once():
    lot = OrphanLot()
    lot.park(stored(1, 2, 2))  # two physical copies
    assert [lot.remove(2), lot.remove(2), lot.remove(2), lot.remove(9)] == [True, True, False, False]
    (event,) = lot.adopt([1])
    assert lot.take_removals(event.hashes) == [2, 2]
    assert lot.take_removals(event.hashes) == []


def test_is_bounded_oldest_out_first():
    lot = OrphanLot(limit=4)
    lot.park(stored(1, 10, 11))
    assert lot.remove(10)
    lot.park(stored(2, 20, 21))
    lot.park(stored(3, 30))
    assert (len(lot), lot.dropped) == (3, 2)
    assert lot.adopt([1]) == []
    assert lot.take_removals([10]) == []
    assert len(lot.adopt([2, 3])) == 2


def test_a_store_larger_than_the_lot_is_given_up():
    lot = OrphanLot(limit=2)
    lot.park(stored(1, 2, 3, 4))
    assert (len(lot), lot.dropped) == (0, 3)


def test_a_root_is_no_orphan():
    with pytest.raises(ValueError, match="root"):
        OrphanLot().park(stored(None, 1))


def test_clear_forgets_everything():
    lot = OrphanLot()
    lot.park(stored(1, 2))
    lot.remove(2)
    lot.clear()
    assert (len(lot), lot.adopt([1]), lot.remove(2), lot.take_removals([2])) == (0, [], False, [])
