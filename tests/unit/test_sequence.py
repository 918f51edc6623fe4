"""The stream tracker, input by input: a table of schedules, each with what is taken and how the stream stands after it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kvrouter_grpc.events.batch_log import REMEMBERED
from kvrouter_grpc.events.sequence import StreamTracker, Verdict
from kvrouter_grpc.types import StreamState

APPLY, DUPLICATE, HOLD, GAP, RESTART = Verdict
COLD, SYNCING, LIVE, STALE = StreamState.COLD, StreamState.SYNCING, StreamState.LIVE, StreamState.STALE


class Stream:
    """A tracker and what was taken from it; `RESTART` is written down as a "|" between what was before and after."""

    follows = True  # whether batches that come in order take the short way

    def __init__(
        self, *, replay: bool = True, max_held: int = 100, max_held_bytes: int = 10_000, attempts: int = 3
    ) -> None:
        self.tracker = StreamTracker(
            can_replay=replay, max_held=max_held, max_held_bytes=max_held_bytes, max_attempts=attempts
        )
        self.taken: list[int | str] = []

    def drain(self, verdict: Verdict) -> Verdict:
        if verdict is RESTART:
            self.taken.append("|")
        while (batch := self.tracker.take()) is not None:
            self.read(*batch)
        return verdict

    def read(self, seq: int, payload: bytes) -> None:
        if payload.startswith(b"bad"):
            self.tracker.unreadable()
        else:
            self.taken.append(seq)

    def live(self, *seqs: int, process: str = "a") -> list[Verdict]:
        return [self.one_live(seq, f"{process}{seq}".encode()) for seq in seqs]

    def one_live(self, seq: int, payload: bytes) -> Verdict:
        if self.follows and self.tracker.in_order and self.tracker.log.follow(seq, payload):
            self.tracker.followed(1)
            self.read(seq, payload)
            return self.drain(APPLY)
        return self.drain(self.tracker.live(seq, payload))

    def replay(self, *seqs: int, process: str = "a", ends: bool = True) -> list[Verdict]:
        """An answer to the replay that is wanted now."""
        assert self.tracker.wants_replay
        self.asked = self.tracker.replay_asked()
        verdicts = [self.drain(self.tracker.replayed(seq, f"{process}{seq}".encode())) for seq in seqs]
        if ends and self.tracker.replaying:
            verdicts.append(self.drain(self.tracker.replay_ended()))
        return verdicts

    def silence(self) -> None:
        assert self.tracker.wants_replay
        self.asked = self.tracker.replay_asked()
        self.tracker.replay_failed()
        self.drain(APPLY)

    @property
    def state(self) -> StreamState:
        return self.tracker.state


@pytest.fixture(autouse=True, params=[True, False], ids=["follows", "told"])
def way(request, monkeypatch) -> None:
    """A batch in order may be followed or told: nothing else may differ."""
    monkeypatch.setattr(Stream, "follows", request.param)


def connected(**kwargs) -> Stream:
    stream = Stream(**kwargs)
    stream.tracker.connected()
    return stream


def synced(*seqs: int, **kwargs) -> Stream:
    """Connected, its history fetched, `seqs` received live."""
    stream = connected(**kwargs)
    if stream.tracker.wants_replay:
        stream.replay()
    stream.live(*seqs)
    return stream


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
        row(lambda s: s.replay(7, 8, 9), [DUPLICATE, DUPLICATE, DUPLICATE, APPLY], [0, 7, 8, 9], STALE),
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
    assert (stream.tracker.gaps, stream.tracker.coverage.missed, stream.tracker.coverage.partial) == (1, 0, False)
    stream.live(9)
    for _ in range(2):
        stream.replay(7, 8, 9)
    assert (stream.tracker.gaps, stream.tracker.coverage.missed, stream.tracker.restarts) == (2, 2, 0)
    assert "2 batches are lost" in stream.tracker.detail
    stream.live(0, process="b")
    assert (stream.tracker.coverage.missed, stream.tracker.restarts) == (2, 1)


def test_history_before_the_ring_is_no_loss() -> None:
    stream = connected()
    stream.live(9)
    stream.replay(7, 8, 9)
    assert stream.taken == [7, 8, 9]
    assert (stream.tracker.coverage.partial, stream.tracker.coverage.missed, stream.tracker.gaps) == (True, 0, 0)


def test_an_empty_cache_makes_a_stale_stream_true_again() -> None:
    stream = synced(0, 5, replay=False)
    assert stream.state is STALE
    stream.live(6)
    stream.tracker.cleared()
    assert stream.state is LIVE
    assert not stream.tracker.coverage.partial


# --- without a replay port -----------------------------------------------------------------------------------------


def test_without_replay_the_stream_begins_where_it_begins() -> None:
    stream = connected(replay=False)
    assert stream.state is COLD
    assert stream.live(3) == [APPLY]
    assert (stream.state, stream.tracker.coverage.partial) == (LIVE, True)


def test_without_replay_a_gap_is_final_and_what_follows_is_taken() -> None:
    stream = connected(replay=False)
    assert stream.live(0, 1, 4, 5) == [APPLY, APPLY, GAP, APPLY]
    assert stream.taken == [0, 1, 4, 5]
    assert (stream.state, stream.tracker.coverage.missed) == (STALE, 2)


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
    assert stream.tracker.take() is None
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
    assert (stream.state, stream.tracker.gaps, stream.tracker.coverage.missed) == (LIVE, 1, 0)


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
    assert (stream.state, stream.tracker.coverage.missed) == (STALE, 1)
    assert not stream.tracker.repairable


def test_an_engine_of_which_nothing_can_be_read_is_stale_and_does_not_cost_a_replay_each_time() -> None:
    stream = synced()
    stream.live(0, process="bad")
    stream.replay(0, process="bad")
    stream.live(1, 2, 3, process="bad")
    assert not stream.tracker.wants_replay
    assert (stream.state, stream.taken, stream.tracker.coverage.missed) == (STALE, [], 4)


# --- restarts and repairs ------------------------------------------------------------------------------------------


def test_a_restart_ends_the_replay_that_was_under_way() -> None:
    stream = synced(0, 3)
    stream.tracker.replay_asked()
    stream.live(0, process="b")
    assert not stream.tracker.replaying
    assert stream.tracker.wants_replay


def test_batches_that_the_ring_has_not_reached_are_of_a_dead_process() -> None:
    stream = synced(0)
    stream.live(5, process="dead")
    assert [stream.replay(0)[-1] for _ in range(3)] == [GAP, GAP, APPLY]
    assert (stream.taken, stream.state, stream.tracker.coverage.missed) == ([0], LIVE, 0)
    assert stream.live(1) == [APPLY]


def test_an_answer_that_breaks_off_says_nothing_about_the_end_of_the_ring() -> None:
    stream = synced(0)
    stream.live(5)
    for _ in range(3):
        stream.replay(0, ends=False)
        stream.tracker.replay_failed()
    stream.drain(APPLY)
    assert (stream.taken, stream.state, stream.tracker.coverage.missed) == ([0, 5], STALE, 4)


def test_low_numbers_behind_an_echo_of_the_old_process_are_looked_into_at_once() -> None:
    stream = synced(0, 5)  # 5 is the last that the old process sent, long on its way
    for _ in range(2):
        stream.silence()
    assert (stream.taken, stream.state) == ([0, 5], STALE)
    assert not stream.tracker.wants_replay
    assert stream.live(3, process="b") == [DUPLICATE]  # its number was given up
    assert stream.replay(0, ends=False, process="b") == [RESTART]
    stream.replay(0, 1, 2, 3, process="b")
    assert (stream.taken, stream.state) == ([0, 5, "|", 0, 1, 2, 3], LIVE)


def test_a_restart_reported_after_it_was_noticed_counts_once() -> None:
    stream = synced(0, 1, 2)
    stream.live(0, process="b")
    assert stream.drain(stream.tracker.restarted()) is RESTART
    assert stream.tracker.restarts == 1
    assert synced().tracker.restarted() is DUPLICATE


def test_a_picture_begun_anew_takes_what_the_ring_still_has() -> None:
    stream = synced()
    stream.live(0, 1, 2)
    assert stream.drain(stream.tracker.resync()) is RESTART
    assert (stream.tracker.coverage.taken, stream.state) == (0, SYNCING)
    stream.live(3)
    stream.replay(0, 1, 2, 3)
    assert (stream.asked, stream.taken) == (0, [0, 1, 2, "|", 0, 1, 2, 3])
    assert (stream.state, stream.tracker.restarts, stream.tracker.coverage.partial) == (LIVE, 0, False)
    assert (stream.tracker.coverage.taken, stream.tracker.coverage.lost, stream.tracker.behind) == (4, 0, 0)


def test_a_picture_begun_anew_from_a_ring_that_has_rolled_is_partial() -> None:
    stream = synced()
    stream.live(0, 1, 2)
    stream.drain(stream.tracker.resync())
    stream.replay(1, 2)
    assert stream.taken[3:] == ["|", 1, 2]
    assert (stream.state, stream.tracker.coverage.partial, stream.tracker.coverage.missed) == (LIVE, True, 0)


def test_a_picture_begun_anew_without_a_replay_port_goes_on_with_what_comes() -> None:
    stream = connected(replay=False)
    stream.live(0, 1)
    assert stream.drain(stream.tracker.resync()) is RESTART
    stream.live(2)
    assert (stream.taken, stream.state, stream.tracker.coverage.partial) == ([0, 1, "|", 2], LIVE, True)
    assert connected().tracker.resync() is DUPLICATE


def test_how_far_it_is_behind_and_in_doubt() -> None:
    stream = synced()
    assert not stream.tracker.doubted
    stream.live(0, 1)
    assert (stream.tracker.coverage.taken, stream.tracker.behind) == (2, 0)
    stream.live(4, 5)
    assert (stream.tracker.coverage.taken, stream.tracker.behind) == (2, 4)
    stream.replay(1, 2, 3)
    assert (stream.tracker.coverage.taken, stream.tracker.behind) == (6, 0)
    stream.tracker.disconnected()
    assert stream.tracker.doubted
    stream.tracker.connected()
    assert stream.tracker.doubted
    stream.replay(5)
    assert not stream.tracker.doubted


def test_a_ring_without_room_is_not_taken_for_restarts_again_and_again() -> None:
    stream = synced(0, 1)
    stream.tracker.audit()
    assert stream.replay() == [RESTART]
    stream.live(2)
    while stream.tracker.wants_replay:
        stream.replay()
    assert (stream.taken, stream.state) == ([0, 1, "|", 2], LIVE)
    stream.tracker.audit()
    assert stream.replay() == [APPLY]
    assert stream.tracker.restarts == 1


def test_a_repair_is_tried_once_and_only_from_the_beginning() -> None:
    stream = synced(0, 5)
    for _ in range(2):
        stream.silence()
    assert (stream.taken, stream.state, stream.tracker.repairable) == ([0, 5], STALE, True)
    stream.tracker.audit()
    stream.replay(2, 3, 4, 5)
    assert stream.asked == 0
    assert (stream.taken, stream.state, stream.tracker.repairable) == ([0, 5], STALE, False)


def test_a_repair_forgets_and_reads_again() -> None:
    stream = synced(0, 5)
    for _ in range(2):
        stream.silence()
    assert stream.tracker.coverage.missed == 4
    stream.tracker.audit()
    stream.live(6)
    stream.replay(*range(7))
    assert stream.taken == [0, 5, 6, "|", *range(7)]
    assert (stream.state, stream.tracker.coverage.missed, stream.tracker.restarts) == (LIVE, 0, 0)
