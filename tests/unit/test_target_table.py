"""Rows of targets: identity, limits, and tickets that outlive their target."""

from array import array

import pytest

from kvrouter_grpc.core import RadixTree, TargetTable

PATH = array("Q", range(1, 9))


@pytest.fixture
def table():
    table = TargetTable()
    table.attach(RadixTree(16))
    return table


def test_rows_are_reused_and_versions_tell(table):
    a, b = table.add("a"), table.add("b")
    assert (table.add("a"), len(table), table.version) == (a, 2, 2)
    table.remove("a")
    table.remove("a")
    assert (table.row("a"), table.row("b"), len(table), table.version) == (None, b, 1, 3)
    assert table.add("c") == a


def test_a_shared_prefix_is_pinned_once_and_an_own_one_each_time(table):
    row = table.add("a")
    tickets = [table.book(row, PATH[:4], 10, True), table.book(row, PATH, 20, True), table.book(row, PATH, 5, False)]
    assert table.load(row) == (3, 35, 8 + 8)
    assert table.stats() | {"bytes": 0} == {"rows": 1, "bookings": 3, "pinned_blocks": 8, "bytes": 0}
    table.first_token(tickets[1], 20)
    table.release(tickets[1], PATH, True)
    assert table.load(row) == (2, 15, 4 + 8)
    assert [table.pinned(row, seqs) for seqs in (PATH, PATH[:2], PATH[1:], PATH[:0])] == [4, 2, 0, 0]
    table.release(tickets[0], PATH[:4], True)
    table.release(tickets[2], PATH, False)
    assert table.load(row)[::2] == (0, 0)


def test_a_ticket_of_a_target_that_went_takes_nothing(table):
    row = table.add("a")
    ticket = table.book(row, PATH, 10, True)
    table.remove("a")
    table.first_token(ticket, 10)
    assert table.add("b") == row
    kept = table.book(row, PATH[:3], 7, True)
    table.first_token(ticket, 10)
    table.release(ticket, PATH, True)
    assert table.load(row) == (1, 7, 3)
    for never in (0, row, 2**64 - 1):
        table.release(never, PATH, True)
    assert table.load(row) == (1, 7, 3)
    table.first_token(kept, 7)
    table.release(kept, PATH[:3], True)
    table.remove("b")
    assert table.stats() == {"rows": 0, "bookings": 0, "pinned_blocks": 0, "bytes": 0}


def test_many_targets_come_and_go_and_leave_nothing(table):
    tickets = {}
    for number in range(3000):
        tickets[number] = table.book(table.add(number), array("Q", range(number % 7)), number, number % 2 == 0)
    for number in range(0, 3000, 3):
        table.remove(number)
    for number, ticket in tickets.items():
        table.first_token(ticket, number)
        table.release(ticket, array("Q", range(number % 7)), number % 2 == 0)
    assert all(table.load(table.row(number)) == (0, 0, 0) for number in range(3000) if number % 3)
    for number in range(3000):
        table.remove(number)
    assert table.stats() == {"rows": 0, "bookings": 0, "pinned_blocks": 0, "bytes": 0}


def test_what_is_wrong_is_named(table):
    row = table.add("a")
    for call in (table.load, lambda row: table.set_freshness(row, 1.0), lambda row: table.book(row, PATH, 0, True)):
        for wrong in (-1, row + 1, 10**9, "0"):
            with pytest.raises(KeyError, match="not in use"):
                call(wrong)
    for freshness in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="freshness"):
            table.set_freshness(row, freshness)
    with pytest.raises(ValueError, match="tier"):
        table.set_slot(row, 4, 0)
    with pytest.raises(KeyError, match="slot 0"):
        table.set_slot(row, 0, 0)
    bare = TargetTable()
    with pytest.raises(ValueError, match="no index"):
        bare.set_slot(bare.add("a"), 0, 0)
    with pytest.raises(ValueError, match="-1 tokens"):
        table.book(row, PATH, -1, True)
    with pytest.raises(ValueError, match="index already"):
        table.attach(RadixTree(16))
    assert table.load(row) == (0, 0, 0)
