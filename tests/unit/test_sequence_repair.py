"""The stream tracker where a process restarts, a picture is begun anew, or what was given up is made good."""

import pytest

from kvrouter_grpc.events.answer import ROLLED_ANSWERS
from kvrouter_grpc.events.repair import FEW, FEW_LATE_ANSWERS
from unit.tracked_stream import APPLY, DUPLICATE, GAP, LIVE, RESTART, STALE, connected, synced, way

__all__ = ["way"]


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
    assert (stream.taken, stream.state, stream.tracker.intake.coverage.missed) == ([0], LIVE, 0)
    assert stream.live(1) == [APPLY]


def test_an_answer_that_breaks_off_says_nothing_about_the_end_of_the_ring() -> None:
    stream = synced(0)
    stream.live(5)
    for _ in range(3):
        stream.replay(0, ends=False)
        stream.tracker.replay_failed()
    stream.drain(APPLY)
    assert (stream.taken, stream.state, stream.tracker.intake.coverage.missed) == ([0, 5], STALE, 4)


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


def test_damage_is_no_restart() -> None:
    """It changes the content of a batch, too; but what cannot be read was written by nobody."""
    stream = synced(0, 1, readable=lambda payload: not payload.startswith(b"bad"))
    assert stream.live(1, process="bad") == [DUPLICATE]
    stream.tracker.audit()
    assert stream.replay(1, process="bad") == [DUPLICATE, APPLY]
    assert stream.live(1, process="b") == [RESTART]


def test_a_restart_reported_after_it_was_noticed_counts_once() -> None:
    stream = synced(0, 1, 2)
    stream.live(0, process="b")
    assert stream.drain(stream.tracker.restarted()) is RESTART
    assert stream.tracker.restarts == 1
    assert synced().tracker.restarted() is DUPLICATE


def test_a_picture_that_foretold_wrongly_is_taken_again() -> None:
    stream = synced()
    stream.live(0, 1, 2)
    stream.tracker.resync()
    assert (stream.taken, stream.state) == ([0, 1, 2], STALE)
    assert "foretold wrongly" in stream.tracker.detail
    assert stream.tracker.position is None, "nobody else should begin with it"
    stream.live(3)
    stream.replay(0, 1, 2, 3)
    assert (stream.asked, stream.taken) == (0, [0, 1, 2, 3, "|", 0, 1, 2, 3])
    coverage = stream.tracker.intake.coverage
    assert (stream.state, stream.tracker.restarts, coverage.taken, coverage.lost) == (LIVE, 0, 4, 0)
    assert not coverage.partial


def test_a_picture_that_foretold_wrongly_is_kept_in_doubt_when_the_ring_has_rolled() -> None:
    stream = synced()
    stream.live(0, 1, 2)
    stream.tracker.resync()
    while stream.tracker.repairable:
        stream.tracker.audit()
        stream.replay(1, 2)
    assert (stream.taken, stream.state) == ([0, 1, 2], STALE)
    stream.tracker.intake.renewed()
    assert (stream.state, stream.tracker.intake.coverage.partial) == (LIVE, True)


def test_a_picture_that_foretold_wrongly_without_a_replay_port_is_kept_in_doubt() -> None:
    stream = connected(replay=False)
    stream.tracker.resync()
    stream.live(0, 1)
    assert stream.state is LIVE, "there was nothing to doubt"
    stream.tracker.resync()
    stream.live(2)
    assert (stream.taken, stream.state, stream.tracker.wants_replay) == ([0, 1, 2], STALE, False)
    stream.tracker.intake.renewed()
    assert stream.state is LIVE


def test_how_far_it_is_behind_and_in_doubt() -> None:
    stream = synced()
    assert not stream.tracker.doubted
    stream.live(0, 1)
    assert (stream.tracker.intake.coverage.taken, stream.tracker.intake.behind) == (2, 0)
    stream.live(4, 5)
    assert (stream.tracker.intake.coverage.taken, stream.tracker.intake.behind) == (2, 4)
    stream.replay(1, 2, 3)
    assert (stream.tracker.intake.coverage.taken, stream.tracker.intake.behind) == (6, 0)
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


@pytest.mark.parametrize(("begins", "believed_after"), [(FEW, ROLLED_ANSWERS), (2, FEW_LATE_ANSWERS)])
def test_a_repair_begins_at_the_beginning_or_not_at_all(begins: int, believed_after: int) -> None:
    """Answers that begin late may be faults of the network, and the more so the less they miss."""
    stream = synced(0, 30)
    for _ in range(2):
        stream.silence()
    for late in range(believed_after + 1):
        assert (stream.taken, stream.state) == ([0, 30], STALE)
        assert stream.tracker.repairable is (late < believed_after)
        stream.tracker.audit()
        stream.replay(*range(begins, 31))
        assert stream.asked == (0 if late < believed_after else 30)


def test_a_repair_ends_when_the_ring_has_rolled_past_its_hole() -> None:
    stream = synced(0, 30)
    for _ in range(2):
        stream.silence()
    stream.tracker.audit()
    stream.replay(0, 1, 2, 30)
    for _ in range(ROLLED_ANSWERS):
        assert stream.tracker.repairable
        stream.tracker.audit()
        stream.replay(*range(3 + FEW, 31))
        assert stream.asked == 3
    assert not stream.tracker.repairable
    assert (stream.taken, stream.state) == ([0, 30], STALE)


def test_a_repair_goes_on_where_the_answer_before_it_had_a_hole() -> None:
    stream = synced(0, 9)
    for _ in range(2):
        stream.silence()
    stream.tracker.audit()
    stream.replay(0, 1, 2, 4, 5, 9)
    assert (stream.asked, stream.taken) == (0, [0, 9])
    stream.live(10)
    stream.replay(3, 4, 6, 8, ends=False)  # asked for at once, as it brings something
    stream.tracker.replay_failed()
    assert (stream.asked, stream.tracker.wants_replay) == (3, False)
    stream.tracker.audit()
    stream.replay(6, 7, 8, 9, 10)
    assert stream.asked == 3
    assert stream.taken == [0, 9, 10, "|", *range(11)]
    assert (stream.state, stream.tracker.intake.coverage.missed, stream.tracker.restarts) == (LIVE, 0, 0)


def test_what_is_renewed_counts_as_lost_no_more() -> None:
    stream = synced(0, 5, replay=False)
    assert (stream.state, stream.tracker.intake.coverage.losses) == (STALE, 1)
    stream.tracker.intake.renewed()
    assert (stream.state, stream.tracker.intake.coverage.partial) == (LIVE, True)
    assert "not received are unknown" in stream.tracker.detail


def test_a_repair_forgets_and_reads_again() -> None:
    stream = synced(0, 5)
    for _ in range(2):
        stream.silence()
    assert stream.tracker.intake.coverage.missed == 4
    stream.tracker.audit()
    stream.live(6)
    stream.replay(*range(7))
    assert stream.taken == [0, 5, 6, "|", *range(7)]
    assert (stream.state, stream.tracker.intake.coverage.missed, stream.tracker.restarts) == (LIVE, 0, 0)
