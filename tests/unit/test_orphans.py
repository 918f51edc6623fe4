"""Stored blocks that wait for their parent."""

from array import array

import pytest
from msgspec.msgpack import encode

from kvrouter_grpc.core import KvFeed, RadixTree
from kvrouter_grpc.types import Tier
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksRemoved, BlocksStored, CacheCleared


class Feed:
    """A feed on a tree with blocks of one token: block `n` holds token `n` unless told otherwise."""

    def __init__(self):
        self.tree = RadixTree(1)
        self.feed = KvFeed(self.learn, lambda *_: self.tree.add_slot(), lambda _: None)

    def learn(self, size, _several):
        return self.tree if size == 1 else None

    def store(self, parent, *names, **kwargs):
        tokens = array("I", (name % 2**32 for name in names))
        self.feed.apply(encode_batch([BlocksStored(array("Q", names), parent, tokens, 1, **kwargs)]))

    def remove(self, *names, **kwargs):
        self.feed.apply(encode_batch([BlocksRemoved(array("Q", names), **kwargs)]))

    def held(self, *names, slot=0):
        return [name for name in names if self.tree.holds(slot, name)]


@pytest.fixture
def feed():
    feed = Feed()
    yield feed
    feed.tree._check()
    feed.feed.clear()
    assert (feed.feed.orphans, feed.tree.stats()["blocks"]) == (0, 0)
    feed.feed.close()
    assert feed.feed.bytes == 0


def test_they_wait_until_the_parent_appears(feed):
    feed.store(3, 4)
    feed.store(2, 3)
    feed.store(2, 5, 6)
    feed.store(9, 10)
    assert feed.feed.orphans == 5
    feed.store(None, 1, 2)
    assert feed.held(*range(1, 11)) == [1, 2, 3, 4, 5, 6]
    assert (feed.feed.orphans, feed.feed.adopted, feed.feed.dropped) == (1, 4, 0)
    assert [feed.tree.position(0, name)[1] for name in (3, 4, 6)] == [2, 3, 3]


def test_a_removal_is_kept_for_the_block_it_means(feed):
    feed.store(None, 1)
    feed.store(8, 2)
    feed.store(8, 2)  # another physical copy
    feed.remove(2)
    feed.store(1, 8)
    assert feed.held(2) == [2]
    feed.remove(2)
    assert feed.held(2) == []


def test_no_more_removals_are_kept_than_there_are_copies(feed):
    feed.store(None, 1)
    feed.store(8, 2)
    feed.remove(2, 2, 2)
    assert feed.tree.stats()["unknown_removes"] == 2
    feed.store(1, 8)
    feed.store(8, 2)
    assert feed.held(2) == [2]


def test_tiers_are_told_apart(feed):
    feed.store(None, 1)
    feed.store(8, 2, tier=Tier.HOST)
    feed.remove(2)  # in device memory, where it is not
    feed.store(1, 8)
    assert feed.held(2, slot=1) == [2]


def test_the_lot_is_bounded_and_the_oldest_goes_first(feed):
    most = 65_536
    feed.store(None, 1)
    feed.store(2, 100)
    for parent in (3, 4):
        feed.store(parent, *range(parent << 20, (parent << 20) + most // 2))
    assert (feed.feed.orphans, feed.feed.dropped) == (most, 1)
    feed.store(1, 2)
    assert feed.held(100) == []
    feed.store(5, *range(5 << 20, (5 << 20) + most + 1))  # larger than the lot
    assert (feed.feed.orphans, feed.feed.dropped) == (0, 2 * most + 2)


def test_a_copy_given_up_takes_its_removal_along(feed):
    feed.store(None, 1)
    feed.store(2, 100)
    feed.remove(100)
    feed.store(3, *range(1 << 20, (1 << 20) + 65_536))  # 100 has to go
    feed.store(1, 2)
    feed.store(2, 100)
    assert feed.held(100) == [100]


def test_their_bytes_are_bounded_too(feed):
    """Extra keys make an event large whose blocks are few."""
    for number in range(1200):
        event = {
            "type": "BlockStored",
            "block_hashes": [number + 100],
            "parent_block_hash": number + 10_000,
            "token_ids": [1],
            "block_size": 1,
            "extra_keys": [[b"x" * 65_000]],
        }
        feed.feed.apply(encode([1.0, [event]]))
    assert 0 < feed.feed.orphans < 1200
    assert feed.feed.bytes < 65 << 20


def test_a_clear_forgets_them(feed):
    feed.store(None, 1)
    feed.store(8, 2)
    feed.feed.apply(encode_batch([CacheCleared()]))
    feed.store(None, 8)
    assert feed.held(8, 2) == [8]


def test_a_closed_feed_does_nothing(feed):
    feed.store(8, 2)
    feed.feed.close()
    feed.store(None, 8)
    assert (feed.feed.orphans, feed.held(8)) == (0, [])
