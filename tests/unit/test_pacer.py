"""How the event plane shares the event loop, against a clock of its own."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.events.pacer import FLOOR, GATHER_S, LONGEST_SLICE_S, OTHERS_S, PAUSE_S, SLICE_S, Pacer

TURN_S = 0.000_001  # of an event loop with nothing to do


@dataclass
class Loop:
    """An event loop on which there are always events to work off, and others work as it is told."""

    pacer: Pacer = field(default_factory=Pacer)
    now: float = 100.0
    cpu: float = 5.0
    slices: list[tuple[float, float]] = field(default_factory=list)  # (begin, length)

    def others(self, seconds: float) -> None:
        """Somebody else works in this turn."""
        self.now += TURN_S + seconds
        self.cpu += TURN_S + seconds

    def ask(self) -> bool:
        """One round of the rota; whether it worked."""
        length = self.pacer.slice(self.now, self.cpu)
        if not length:
            return False
        self.slices.append((self.now, length))
        self.now += length
        self.cpu += length
        self.pacer.worked(self.now, self.cpu, more=True)
        return True

    def run(self, seconds: float, per_turn: float = 0.0) -> None:
        """For this long, others work so much in every turn."""
        ends = self.now + seconds
        while self.now < ends:
            self.others(per_turn)
            if not self.ask():
                pause = self.now + PAUSE_S
                while self.now < pause:
                    self.others(per_turn)
                    if not per_turn:
                        self.now = pause  # the loop sleeps

    def share(self, since: float) -> float:
        """Part of the time since then that went into events."""
        return sum(length for begin, length in self.slices if begin >= since) / (self.now - since)


def test_alone_it_has_the_loop_to_itself() -> None:
    loop = Loop()
    loop.run(0.1)
    assert loop.share(100.0) > 0.98
    assert {length for _, length in loop.slices} == {SLICE_S}


def test_who_comes_in_a_slice_is_left_alone_after_it() -> None:
    loop = Loop()
    loop.run(0.01)
    loop.others(2 * OTHERS_S)
    arrived = loop.now
    assert not loop.ask()
    loop.run(5 * PAUSE_S, per_turn=OTHERS_S)
    begins = [begin for begin, _ in loop.slices if begin >= arrived]
    assert begins[0] - arrived >= PAUSE_S - 3 * OTHERS_S
    assert all(later - earlier >= PAUSE_S for earlier, later in pairwise(begins))


def test_it_takes_the_loop_back_after_a_quiet_pause() -> None:
    loop = Loop()
    loop.run(0.01, per_turn=0.000_1)
    quiet_since = loop.now
    loop.run(0.1)
    assert loop.share(quiet_since + 3 * PAUSE_S) > 0.98


def test_however_busy_others_are_events_keep_their_floor() -> None:
    for per_turn in (0.000_03, 0.000_3, 0.001, 0.003):
        loop = Loop()
        loop.run(1.0, per_turn=per_turn)
        assert loop.share(100.0) > 0.6 * FLOOR, per_turn
        assert loop.share(100.0) < 1.2 * FLOOR, per_turn


def test_what_trickles_in_is_gathered() -> None:
    pacer = Pacer()
    assert pacer.slice(1.0, 0.0) == SLICE_S
    pacer.worked(1.0, 0.0, more=False)
    soon = 1.0 + GATHER_S / 2
    assert pacer.slice(soon, 0.0) == 0.0
    assert pacer.pause(soon) == pytest.approx(GATHER_S / 2)
    assert pacer.slice(soon + pacer.pause(soon), 0.0) == SLICE_S


def test_what_was_gathered_on_purpose_earns_no_longer_slice() -> None:
    pacer = Pacer()
    pacer.worked(1.0, 0.0, more=False)
    assert pacer.slice(1.0 + GATHER_S / 2, 1.0) == 0.0
    assert pacer.slice(1.0 + GATHER_S, 2.0) == SLICE_S


def test_what_comes_after_a_rest_gets_a_short_slice() -> None:
    loop = Loop()
    loop.pacer.worked(loop.now, loop.cpu, more=False)
    loop.others(10.0)
    assert loop.pacer.slice(loop.now, loop.cpu) == SLICE_S


@given(st.lists(st.tuples(st.floats(0, 0.005), st.floats(0, 0.005), st.booleans())))
def test_any_schedule(turns: list[tuple[float, float, bool]]) -> None:
    """Slices are bounded, and while others work there is at most one per pause."""
    loop = Loop()
    ended, backlog = -1.0, False
    for busy, asleep, more in turns:
        loop.others(busy)
        loop.now += asleep
        length = loop.pacer.slice(loop.now, loop.cpu)
        assert length == 0.0 or SLICE_S <= length <= LONGEST_SLICE_S
        if loop.now - ended >= (PAUSE_S if backlog else GATHER_S):
            assert length, "nothing waits longer"
        elif busy > OTHERS_S or not backlog:
            assert not length
            assert 0 < loop.pacer.pause(loop.now) <= GATHER_S
        if length:
            loop.now += length
            loop.cpu += length
            ended = loop.now
            backlog = more
            loop.pacer.worked(loop.now, loop.cpu, more=more)
