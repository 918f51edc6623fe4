"""Load from elsewhere: told from engine reports, counted once, and not believed for ever."""

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import TargetTable
from kvrouter_grpc.routing.foreign import Booked, Foreign, ForeignLoad, Surplus
from kvrouter_grpc.types import EngineReport, Target

NOTHING = Booked(0, 0, 0)
A = Target(1, 0)
COUNT = st.integers(0, 1000)
REPORTS = st.builds(EngineReport, COUNT, COUNT, st.none() | st.floats(0, 1))
BOOKINGS = st.tuples(COUNT, COUNT, COUNT).map(lambda some: Booked(max(some[:2]), min(some[:2]), some[2]))


def after(*reports, booked=NOTHING, total=100, every=2.0):
    surplus = None
    for number, report in enumerate(reports):
        surplus = Surplus.after(surplus, report, booked, total, number * every)
    return surplus


def test_what_is_reported_beyond_what_was_booked_is_foreign():
    report = EngineReport(running=6, waiting=2, kv_usage=0.5)
    assert after(report).foreign(0.0) == Foreign(8, 2, 50)
    assert after(report, booked=Booked(8, 3, 50)).foreign(0.0) == Foreign()
    # Three of eight requests are foreign: three eighths of the 40 blocks that nobody booked.
    assert after(report, booked=Booked(5, 1, 10)).foreign(0.0) == Foreign(3, 1, 15)
    assert after(report, booked=Booked(20, 20, 90)).foreign(0.0) == Foreign()
    assert after(EngineReport(6, 2)).foreign(0.0) == Foreign(8, 2, 0)


def test_output_of_booked_requests_is_not_foreign():
    """The engine counts more blocks than were booked: its requests have generated some."""
    assert after(EngineReport(4, 0, 0.9), booked=Booked(4, 0, 20)).foreign(0.0) == Foreign()


def test_errors_in_either_direction_come_to_nothing():
    """A report counts requests that were freed already, the next one lacks requests that were booked just now."""
    rng = random.Random(1)
    surplus, seen = None, []
    for number in range(200):
        booked = rng.randrange(10, 20)
        report = EngineReport(running=max(0, booked + rng.choice((-2, -1, 0, 0, 1, 2))), waiting=0)
        surplus = Surplus.after(surplus, report, Booked(booked, 0, 0), 0, float(number))
        seen.append(surplus.foreign(float(number)).requests)
    assert sum(seen) / len(seen) < 1


def test_a_change_is_seen_within_a_few_reports_and_goes_again():
    quiet, busy = EngineReport(0, 0), EngineReport(16, 0)
    assert after(quiet, *[busy] * 4).foreign(8.0).requests == 15
    assert after(busy, *[quiet] * 6).foreign(12.0).requests == 0


def test_figures_of_a_silent_engine_fade():
    surplus = after(EngineReport(16, 8, 0.5), EngineReport(16, 8, 0.5))
    assert surplus.foreign(2.0 + 6.0) == surplus.foreign(2.0) == Foreign(24, 8, 50)
    assert [surplus.foreign(8.0 + age).requests for age in (2.0, 4.0, 6.0, 100.0)] == [12, 6, 3, 0]


@settings(max_examples=100)
@given(st.lists(st.tuples(REPORTS, BOOKINGS), min_size=1, max_size=6), st.floats(0, 1e6))
def test_never_negative_never_more_than_reported(history, later):
    surplus = None
    for number, (report, booked) in enumerate(history):
        surplus = Surplus.after(surplus, report, booked, 1000, float(number))
    foreign = surplus.foreign(len(history) + later)
    assert 0 <= foreign.waiting <= foreign.requests <= max(report.running + report.waiting for report, _ in history)
    assert 0 <= foreign.blocks <= 1000


@pytest.fixture
def table():
    table = TargetTable()
    table.describe(table.add(A), total_blocks=100)
    return table


def test_the_rows_carry_it_beside_what_is_booked(table):
    row, load = table.row(A), ForeignLoad(table)
    ticket = table.book(row, array("Q", range(10)), 500, True)
    load.reported(A, EngineReport(running=3, waiting=2, kv_usage=0.5), 100.0, 0.0)
    assert table.foreign(row) == (4, 1, 100, 32)  # four fifths of 50 - 10 blocks
    assert table.load(row) == (5, 600, 42)
    assert table.waiting(row) == 2
    for now in (2.0, 4.0, 6.0):  # the same again changes nothing: what was put on the row is not taken for booked
        load.reported(A, EngineReport(running=3, waiting=2, kv_usage=0.5), 100.0, now)
    assert table.load(row) == (5, 600, 42)
    table.first_token(ticket, 500)
    table.release(ticket, array("Q", range(10)), True)
    assert table.load(row) == (4, 100, 32)
    load.fade(100.0, 1e6)
    assert table.load(row) == (*table.foreign(row)[:1], 0, 0) == (0, 0, 0)


def test_a_target_that_goes_takes_it_along(table):
    load = ForeignLoad(table)
    load.reported(Target(9, 9), EngineReport(5, 0), 1.0, 0.0)
    load.reported(A, EngineReport(5, 0), 1.0, 0.0)
    load.forget(A)
    assert table.load(table.row(A)) == (0, 0, 0)
    load.reported(A, EngineReport(5, 0), 1.0, 0.0)
    table.remove(A)
    load.fade(1.0, 1e6)
    assert table.stats() == {"rows": 0, "bookings": 0, "pinned_blocks": 0, "bytes": 0}


def test_what_is_wrong_is_named(table):
    with pytest.raises(ValueError, match="5 of them waiting"):
        table.set_foreign(table.row(A), 4, 5, 0, 0)
    with pytest.raises(OverflowError):
        table.set_foreign(table.row(A), -1, 0, 0, 0)
