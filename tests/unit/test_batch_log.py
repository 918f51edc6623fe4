"""What is remembered of the batches taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.events.batch_log import HIGHEST_SEQ, LOST, OTHER, REMEMBERED, SAME, UNKNOWN, BatchLog


def test_only_the_next_batch_is_taken():
    log = BatchLog()
    assert not log.follow(1, b"b")
    assert log.follow(0, b"a")
    assert not log.follow(0, b"a")
    assert log.follow(1, b"b")
    assert log.next_seq == 2


def test_the_content_of_late_copies_is_compared():
    log = BatchLog()
    log.follow(0, b"a")
    log.note_lost(1)
    assert [log.compare(0, b"a"), log.compare(0, b"b"), log.compare(1, b""), log.compare(2, b"")] == [
        SAME,
        OTHER,
        LOST,
        UNKNOWN,
    ]
    log.note_hash(0, log.forget(0))
    assert log.compare(0, b"a") == SAME
    log.forget(0)
    assert log.compare(0, b"a") == UNKNOWN
    log.note(0, b"c")
    log.clear()
    assert (log.compare(0, b"c"), log.next_seq) == (UNKNOWN, 0)


def test_the_highest_number():
    log = BatchLog()
    log.next_seq = HIGHEST_SEQ
    assert log.follow(HIGHEST_SEQ, b"x")
    assert log.next_seq == HIGHEST_SEQ + 1
    with pytest.raises(OverflowError):
        log.follow(1 << 64, b"")


@given(st.lists(st.tuples(st.integers(0, 3 * REMEMBERED), st.binary(max_size=2))))
def test_the_last_ones_are_remembered(notes):
    """Against a dictionary with a place for each number, as the log has."""
    log, twin = BatchLog(), {}
    for seq, payload in notes:
        log.note(seq, payload)
        twin[seq % REMEMBERED] = seq, payload
    for seq, payload in notes:
        noted, content = twin[seq % REMEMBERED]
        expected = UNKNOWN if noted != seq else SAME if content == payload else OTHER
        assert log.compare(seq, payload) == expected
