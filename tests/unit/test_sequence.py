"""The stream tracker, input by input: a table of schedules, each with what is taken and how the stream stands after it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kvrouter_grpc.events.batch_log import REMEMBERED
from kvrouter_grpc.events.sequence import Verdict
from kvrouter_grpc.types import StreamState
from unit.tracked_stream import (
    APPLY,
    COLD,
    DUPLICATE,
    GAP,
    HOLD,
    LIVE,
    RESTART,
    STALE,
    SYNCING,
    Stream,
    connected,
    synced,
    way,
)

__all__ = ["way"]


@dataclass(frozen=True)
class Row:
    """One step of a schedule and everything that is to be seen after it."""

    do: Callable[[Stream], Any]
    verdicts: list[Verdict] | None
    taken: list[int | str]
    state: StreamState
    wants: bool = False


def row(
    do: str, verdicts: list[Verdict] | None, taken: list[int | str], state: StreamState, *, wants: bool = False
) -> Row:
    return Row(do, verdicts, taken, state, wants)


SCHEDULES = {
    "a new engine": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(), [APPLY], [], LIVE),
        row(lambda s: s.live(0, 1), [APPLY, APPLY], [0, 1], LIVE),
    ],
    "an engine with history": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1, 2), [APPLY, APPLY, APPLY, APPLY], [0, 1, 2], LIVE),
        row(lambda s: s.live(3), [APPLY], [0, 1, 2, 3], LIVE),
    ],
    "live batches wait for the history": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.live(3, 4), [HOLD, HOLD], [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1, 2, 3), [APPLY, APPLY, APPLY, DUPLICATE, APPLY], [0, 1, 2, 3, 4], LIVE),
        row(lambda s: s.live(3), [DUPLICATE], [0, 1, 2, 3, 4], LIVE),
    ],
    "a gap": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0), [APPLY, APPLY], [0], LIVE),
        row(lambda s: s.live(3, 4), [GAP, HOLD], [0], SYNCING, wants=True),
        row(
            lambda s: s.replay(0, 1, 2, 3, 4),
            [DUPLICATE, APPLY, APPLY, DUPLICATE, DUPLICATE, APPLY],
            [0, 1, 2, 3, 4],
            LIVE,
        ),
    ],
    "a late batch closes the gap by itself": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0), [APPLY, APPLY], [0], LIVE),
        row(lambda s: s.live(2, 1), [GAP, APPLY], [0, 1, 2], LIVE),
    ],
    "holes in the answer": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1, 3, 5), [APPLY, APPLY, HOLD, HOLD, GAP], [0, 1], SYNCING, wants=True),
        row(
            lambda s: s.replay(1, 2, 3, 5),
            [DUPLICATE, APPLY, DUPLICATE, DUPLICATE, GAP],
            [0, 1, 2, 3],
            SYNCING,
            wants=True,
        ),
        row(lambda s: s.replay(3, 4, 5), [DUPLICATE, APPLY, DUPLICATE, APPLY], [0, 1, 2, 3, 4, 5], LIVE),
    ],
    "holes that never close": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 2), [APPLY, HOLD, GAP], [0], SYNCING, wants=True),
        row(lambda s: s.replay(0, 2), [DUPLICATE, DUPLICATE, GAP], [0], SYNCING, wants=True),
        row(lambda s: s.replay(0, 2), [DUPLICATE, DUPLICATE, GAP], [0], SYNCING, wants=True),
        row(lambda s: s.replay(0, 2), [DUPLICATE, DUPLICATE, APPLY], [0, 2], STALE),
        row(lambda s: s.live(3), [APPLY], [0, 2, 3], STALE),
    ],
    "a ring that has rolled before we came": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(7, 8), [APPLY, APPLY, APPLY], [7, 8], LIVE),
        row(lambda s: s.live(9), [APPLY], [7, 8, 9], LIVE),
    ],
    "a ring that has rolled over a gap": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0), [APPLY, APPLY], [0], LIVE),
        row(lambda s: s.live(9), [GAP], [0], SYNCING, wants=True),
        row(lambda s: s.replay(7, 8, 9), [HOLD, HOLD, DUPLICATE, GAP], [0], SYNCING, wants=True),
        row(lambda s: s.replay(7, 8, 9), [APPLY, DUPLICATE, DUPLICATE, APPLY], [0, 7, 8, 9], STALE),
    ],
    "a restart seen on the live socket": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1), [APPLY, APPLY, APPLY], [0, 1], LIVE),
        row(lambda s: s.live(2), [APPLY], [0, 1, 2], LIVE),
        row(lambda s: s.live(0, process="b"), [RESTART], [0, 1, 2, "|", 0], SYNCING, wants=True),
        row(lambda s: s.replay(0, process="b"), [DUPLICATE, APPLY], [0, 1, 2, "|", 0], LIVE),
    ],
    "a restart that has published nothing yet": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1), [APPLY, APPLY, APPLY], [0, 1], LIVE),
        row(lambda s: s.tracker.disconnected(), None, [0, 1], SYNCING),
        row(lambda s: s.tracker.connected(), None, [0, 1], SYNCING, wants=True),
        row(lambda s: s.replay(), [RESTART], [0, 1, "|"], SYNCING, wants=True),
        row(lambda s: s.replay(), [APPLY], [0, 1, "|"], LIVE),
    ],
    "a restart that has counted past us": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1), [APPLY, APPLY, APPLY], [0, 1], LIVE),
        row(lambda s: s.tracker.disconnected(), None, [0, 1], SYNCING),
        row(lambda s: s.tracker.connected(), None, [0, 1], SYNCING, wants=True),
        row(lambda s: s.replay(1, process="b"), [RESTART], [0, 1, "|"], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1, 2, process="b"), [APPLY] * 4, [0, 1, "|", 0, 1, 2], LIVE),
    ],
    "a reconnection without loss": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0, 1), [APPLY, APPLY, APPLY], [0, 1], LIVE),
        row(lambda s: s.tracker.disconnected(), None, [0, 1], SYNCING),
        row(lambda s: s.tracker.connected(), None, [0, 1], SYNCING, wants=True),
        row(lambda s: s.replay(1), [DUPLICATE, APPLY], [0, 1], LIVE),
    ],
    "a replay port that does not answer": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.live(5), [HOLD], [], SYNCING, wants=True),
        row(lambda s: s.silence(), None, [], SYNCING, wants=True),
        row(lambda s: s.silence(), None, [5], LIVE),
        row(lambda s: s.live(6), [APPLY], [5, 6], LIVE),
        row(lambda s: s.tracker.audit(), None, [5, 6], LIVE, wants=True),
        row(lambda s: s.replay(*range(7)), [*[DUPLICATE] * 7, RESTART], [5, 6, "|", *range(7)], LIVE),
    ],
    "a lost last batch is found by an audit": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0), [APPLY, APPLY], [0], LIVE),
        row(lambda s: s.tracker.audit(), None, [0], LIVE, wants=True),
        row(lambda s: s.replay(0, 1), [DUPLICATE, APPLY, APPLY], [0, 1], LIVE),
    ],
    "a reported restart": [
        row(lambda s: s.tracker.connected(), None, [], SYNCING, wants=True),
        row(lambda s: s.replay(0), [APPLY, APPLY], [0], LIVE),
        row(lambda s: s.drain(s.tracker.restarted()), None, [0, "|"], SYNCING, wants=True),
        row(lambda s: s.replay(0, process="b"), [APPLY, APPLY], [0, "|", 0], LIVE),
    ],
}


@pytest.mark.parametrize("rows", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedule(rows: list[Row]) -> None:
    stream = Stream()
    assert stream.state is COLD
    for number, step in enumerate(rows):
        verdicts = step.do(stream)
        assert step.verdicts is None or verdicts == step.verdicts, number
        assert stream.taken == step.taken, number
        assert stream.state is step.state, number
        assert stream.tracker.wants_replay is step.wants, number


def test_a_replay_starts_at_the_last_batch_taken() -> None:
    stream = synced(0, 1, 2, 5)
    stream.replay(2, 3, 4, 5)
    assert stream.asked == 2
    stream.tracker.audit()
    stream.replay(5)
    assert stream.asked == 5


def test_counters() -> None:
    stream = synced(0, 4)
    assert stream.tracker.gaps == 1
    stream.replay(0, 1, 2, 3, 4)
    assert (stream.tracker.gaps, stream.tracker.intake.coverage.missed, stream.tracker.intake.coverage.partial) == (
        1,
        0,
        False,
    )
    stream.live(9)
    for _ in range(2):
        stream.replay(7, 8, 9)
    assert (stream.tracker.gaps, stream.tracker.intake.coverage.missed, stream.tracker.restarts) == (2, 2, 0)
    assert "2 batches are lost" in stream.tracker.detail
    stream.live(0, process="b")
    assert (stream.tracker.intake.coverage.missed, stream.tracker.restarts) == (2, 1)


def test_history_before_the_ring_is_no_loss() -> None:
    stream = connected()
    stream.live(9)
    stream.replay(7, 8, 9)
    assert stream.taken == [7, 8, 9]
    assert (stream.tracker.intake.coverage.partial, stream.tracker.intake.coverage.missed, stream.tracker.gaps) == (
        True,
        0,
        0,
    )


def test_an_empty_cache_makes_a_stale_stream_true_again() -> None:
    stream = synced(0, 5, replay=False)
    assert stream.state is STALE
    stream.live(6)
    stream.tracker.intake.emptied()
    assert stream.state is LIVE
    assert not stream.tracker.intake.coverage.partial


# --- without a replay port -----------------------------------------------------------------------------------------


def test_without_replay_the_stream_begins_where_it_begins() -> None:
    stream = connected(replay=False)
    assert stream.state is COLD
    assert stream.live(3) == [APPLY]
    assert (stream.state, stream.tracker.intake.coverage.partial) == (LIVE, True)


def test_without_replay_a_gap_is_final_and_what_follows_is_taken() -> None:
    stream = connected(replay=False)
    assert stream.live(0, 1, 4, 5) == [APPLY, APPLY, GAP, APPLY]
    assert stream.taken == [0, 1, 4, 5]
    assert (stream.state, stream.tracker.intake.coverage.missed) == (STALE, 2)


def test_without_replay_a_late_batch_is_no_restart() -> None:
    stream = connected(replay=False)
    assert stream.live(0, 2, 1) == [APPLY, GAP, DUPLICATE]
    assert stream.taken == [0, 2]


def test_without_replay_a_reconnection_is_doubtful_until_the_numbers_go_on() -> None:
    stream = connected(replay=False)
    stream.live(0, 1)
    stream.tracker.disconnected()
    stream.tracker.connected()
    assert stream.state is STALE
    stream.live(2)
    assert stream.state is LIVE
    assert stream.live(0, process="b") == [RESTART]
    assert stream.taken == [0, 1, 2, "|", 0]


# --- duplicates ----------------------------------------------------------------------------------------------------


def test_live_copies_that_a_replay_overtook_are_duplicates_however_old() -> None:
    stream = connected()
    stream.replay(*range(REMEMBERED + 100))
    assert set(stream.live(*range(REMEMBERED + 100))) == {DUPLICATE}
    assert stream.live(REMEMBERED + 100) == [APPLY]


def test_a_second_copy_is_a_duplicate_and_another_content_a_restart() -> None:
    stream = synced(0, 1, 2)
    assert stream.live(2, 0, 1) == [DUPLICATE] * 3
    assert stream.live(1, process="b") == [RESTART]


# --- bounds --------------------------------------------------------------------------------------------------------


def test_held_batches_are_bounded_in_number_and_the_oldest_go() -> None:
    stream = synced(0, max_held=3)
    stream.live(*range(5, 15))
    stream.replay(*range(12))
    assert stream.taken == list(range(15))


def test_held_batches_are_bounded_in_bytes() -> None:
    stream = synced(0, max_held_bytes=100)
    for seq in range(5, 50):
        stream.tracker.live(seq, bytes(60))
    assert stream.tracker.intake.take() is None
    stream.replay(0, 1, 2, 3, 4)
    assert stream.taken == [0, 1, 2, 3, 4]
    assert stream.state is SYNCING


def test_one_batch_over_the_byte_bound_still_passes() -> None:
    stream = synced(max_held_bytes=1)
    stream.live(0, 1)
    assert stream.taken == [0, 1]


# --- unreadable batches --------------------------------------------------------------------------------------------


def test_an_unreadable_batch_is_asked_for_again() -> None:
    stream = synced(0)
    stream.live(1, process="bad")
    assert (stream.state, stream.tracker.wants_replay) == (SYNCING, True)
    stream.live(2)
    stream.replay(0, 1, 2)
    assert stream.taken == [0, 1, 2]
    assert (stream.state, stream.tracker.gaps, stream.tracker.intake.coverage.missed) == (LIVE, 1, 0)


def test_a_batch_the_engine_wrote_unreadable_is_given_up() -> None:
    stream = synced(0)
    stream.live(1, process="bad")
    stream.drain(stream.tracker.live(2, b"a2"))
    assert stream.tracker.wants_replay
    stream.tracker.replay_asked()
    for seq, payload in ((0, b"a0"), (1, b"bad1"), (2, b"a2")):
        stream.drain(stream.tracker.replayed(seq, payload))
    stream.drain(stream.tracker.replay_ended())
    assert stream.taken == [0, 2]
    assert (stream.state, stream.tracker.intake.coverage.missed) == (STALE, 1)
    assert not stream.tracker.repairable


def test_an_unreadable_batch_that_the_network_doubles_is_not_the_engines_word() -> None:
    stream = synced(0)
    stream.live(1, 1, process="bad")
    assert stream.tracker.wants_replay
    stream.tracker.replay_asked()
    for payload in (b"bad other", b"bad other", b"a1"):  # damaged once more, and doubled
        stream.drain(stream.tracker.replayed(1, payload))
    stream.drain(stream.tracker.replay_ended())
    assert (stream.taken, stream.state, stream.tracker.intake.coverage.missed) == ([0, 1], LIVE, 0)


def test_an_engine_of_which_nothing_can_be_read_is_stale_and_does_not_cost_a_replay_each_time() -> None:
    stream = synced()
    stream.live(0, process="bad")
    stream.replay(0, process="bad")
    stream.live(1, 2, 3, process="bad")
    assert not stream.tracker.wants_replay
    assert (stream.state, stream.taken, stream.tracker.intake.coverage.missed) == (STALE, [], 4)
