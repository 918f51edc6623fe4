"""The tracker against a model of vLLM's publisher: whatever gets lost on the way, the picture ends true, or says it is not."""

import os
from collections import deque
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvrouter_grpc.events.sequence import StreamTracker, Verdict
from kvrouter_grpc.types import StreamState

EXAMPLES = int(os.environ.get("KVROUTER_SEQUENCE_EXAMPLES", "400"))
STEPS = 60


class Publisher:
    """One engine process: numbers its batches from 0 and keeps the last `ring` of them."""

    def __init__(self, process: int, ring: int) -> None:
        self.process = process
        self.count = 0
        self.ring: deque[tuple[int, bytes]] = deque(maxlen=ring)

    def publish(self) -> tuple[int, bytes]:
        batch = (self.count, b"%d:%d" % (self.process, self.count))
        self.ring.append(batch)
        self.count += 1
        return batch

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        return [batch for batch in self.ring if batch[0] >= start]


class StreamMachine(RuleBasedStateMachine):
    """Publishes, loses, duplicates, garbles, reconnects and restarts; `settle` ends all faults and judges."""

    can_replay = True

    @initialize(
        ring=st.integers(1, 40),
        ring_is_large=st.booleans(),
        hwm=st.integers(2, 12),
        held=st.sampled_from([1, 2, 9, 40, 10_000]),
    )
    def start(self, ring: int, ring_is_large: bool, hwm: int, held: int) -> None:
        self.ring = 10_000 if ring_is_large else ring
        self.hwm = hwm
        self.held = held
        self.publisher = Publisher(0, self.ring)
        self.tracker = StreamTracker(can_replay=self.can_replay, max_held=held, max_held_bytes=1 << 20, max_attempts=4)
        self.damages = 0
        self.online = False
        self.live: deque[tuple[int, bytes]] = deque()
        self.answer: deque[tuple[int, bytes] | None] | None = None  # None inside: the end marker
        self.applied: list[tuple[int, int]] = []
        self.restart_to_report = False

    # --- what the subscriber does ---------------------------------------------------------------------------------

    def after(self, verdict: Verdict | None = None) -> None:
        if verdict is Verdict.RESTART:
            self.applied.clear()
        while (taken := self.tracker.intake.take()) is not None:
            self.read(*taken)
        if not self.tracker.replaying:
            self.answer = None

    def read(self, seq: int, payload: bytes) -> None:
        if payload.startswith(b"!"):
            self.tracker.unreadable()
            return
        process, number = map(int, payload.split(b":"))
        assert number == seq
        self.applied.append((process, seq))

    def hear(self, seq: int, payload: bytes) -> None:
        if self.tracker.in_order and self.tracker.intake.log.follow(seq, payload):
            self.tracker.followed(1)
            self.read(seq, payload)
            self.after()
        else:
            self.after(self.tracker.live(seq, payload))

    def ask(self, lost: set[int]) -> None:
        """The tracker's request is answered from the ring; what the sender's queue has no room for is lost."""
        start = self.tracker.replay_asked()
        batches = self.publisher.replay(start)
        self.answer = deque(b for i, b in enumerate(batches) if i < self.hwm or i not in lost)
        self.answer.append(None)

    def deliver_answer(self) -> None:
        assert self.answer is not None
        item = self.answer.popleft()
        self.after(self.tracker.replay_ended() if item is None else self.tracker.replayed(*item))

    def garbled(self, payload: bytes) -> bytes:
        """Damage on the way; never twice the same."""
        self.damages += 1
        return b"!%d" % self.damages + payload

    @property
    def old_process_in_flight(self) -> bool:
        return any(map(self.is_old, self.live))

    def is_old(self, batch: tuple[int, bytes]) -> bool:
        return not batch[1].startswith(b"%d:" % self.publisher.process)

    # --- rules ----------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 8), lost=st.booleans())
    def publish(self, count: int, lost: bool) -> None:
        for _ in range(count):
            batch = self.publisher.publish()
            if self.online and not lost:
                self.live.append(batch)

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 12))
    def deliver_live(self, count: int) -> None:
        for _ in range(min(count, len(self.live))):
            self.hear(*self.live.popleft())

    @precondition(lambda self: self.live)
    @rule()
    def deliver_live_twice(self) -> None:
        self.after(self.tracker.live(*self.live[0]))

    @precondition(lambda self: self.live)
    @rule()
    def garble_live(self) -> None:
        seq, payload = self.live.popleft()
        self.after(self.tracker.live(seq, self.garbled(payload)))

    @precondition(lambda self: self.tracker.wants_replay and self.answer is None)
    @rule(lost=st.sets(st.integers(0, 60)))
    def replay(self, lost: set[int]) -> None:
        self.ask(lost)

    @precondition(lambda self: self.answer)
    @rule(count=st.integers(1, 20))
    def deliver_replay(self, count: int) -> None:
        for _ in range(count):
            if self.answer:
                self.deliver_answer()

    @precondition(lambda self: self.answer)
    @rule()
    def garble_replay(self) -> None:
        item = self.answer[0]
        if item is not None:
            self.answer[0] = (item[0], self.garbled(item[1]))
        self.deliver_answer()

    @precondition(lambda self: self.answer is not None)
    @rule()
    def replay_times_out(self) -> None:
        self.tracker.replay_failed()
        self.after()

    @rule()
    def audit(self) -> None:
        self.tracker.audit()

    @precondition(lambda self: self.online)
    @rule(in_flight_lost=st.booleans())
    def disconnect(self, in_flight_lost: bool) -> None:
        self.online = False
        if in_flight_lost:
            self.live.clear()
        self.tracker.disconnected()

    @precondition(lambda self: not self.online)
    @rule()
    def connect(self) -> None:
        self.online = True
        if not self.tracker.intake.next_seq:
            # While nothing is taken, nothing tells late batches of the old process from those of the new one. The
            # stream gets over them, but only with the batches after the end of this model's schedule.
            self.live = deque(batch for batch in self.live if not self.is_old(batch))
        self.tracker.connected()
        self.after()

    @rule(published_before=st.integers(0, 50))
    def restart(self, published_before: int) -> None:
        """A new process; what the old one sent may still be under way, its replay socket is gone."""
        if self.online:
            self.disconnect(in_flight_lost=False)
        self.publisher = Publisher(self.publisher.process + 1, self.ring)
        for _ in range(published_before):
            self.publisher.publish()
        if self.answer is not None:
            self.replay_times_out()
        self.restart_to_report = True

    @precondition(lambda self: self.restart_to_report and self.online and not self.old_process_in_flight)
    @rule()
    def report_restart(self) -> None:
        """The engine's process start time was seen to change; the subscriber says so when its socket is drained."""
        self.restart_to_report = False
        self.after(self.tracker.restarted())

    @precondition(lambda self: not self.old_process_in_flight)
    @rule()
    def resync(self) -> None:
        """The picture foretold wrongly, whatever the numbers say."""
        restarts = self.tracker.restarts
        self.tracker.resync()
        assert self.tracker.restarts == restarts

    # --- judgement ------------------------------------------------------------------------------------------------

    @invariant()
    def numbers_ascend(self) -> None:
        numbers = [seq for _, seq in getattr(self, "applied", [])]
        assert all(a < b for a, b in pairwise(numbers)), "a batch was applied twice or late"

    def finish_replays(self) -> None:
        while self.tracker.wants_replay or self.answer is not None:
            if self.answer is None:
                self.ask(set())
            while self.answer:
                self.deliver_answer()

    @rule(audits=st.sampled_from([0, 3]))
    def settle(self, audits: int) -> None:
        """All faults end. What is left is judged."""
        if not self.online:
            self.connect()
        if self.restart_to_report and not self.can_replay:
            self.deliver_live(len(self.live))
            self.report_restart()
        self.publish(1, lost=False)
        self.deliver_live(len(self.live))
        self.finish_replays()
        for _ in range(audits):
            self.tracker.audit()
            self.finish_replays()
        self.publish(1, lost=False)  # a live worker goes on, and shows if its last batch was missing
        self.deliver_live(1)
        self.finish_replays()
        everything = [(self.publisher.process, seq) for seq in range(self.publisher.count)]
        state = self.tracker.state
        assert state in (StreamState.LIVE, StreamState.STALE)
        assert self.applied[-1] == everything[-1], "a live worker must be indexed"
        tracker = self.tracker
        assert (tracker.intake.coverage.taken, tracker.intake.behind) == (len(self.applied), 0)
        if state is StreamState.LIVE:
            assert (tracker.intake.coverage.lost, tracker.doubted) == (0, False), "what is repaired is trusted again"
            dead = {process for process, _ in self.applied} - {self.publisher.process}
            assert not dead, "blocks of a dead process remain"
        if state is StreamState.LIVE and not self.tracker.intake.coverage.partial:
            assert self.applied == everything, "it says it knows everything"
        if state is StreamState.LIVE:
            assert self.applied == everything[-len(self.applied) :], "it says nothing was lost since its first batch"
        room = min(self.ring, self.held)
        if self.can_replay and self.publisher.count <= room and (audits or not self.tracker.repairable):
            assert self.applied == everything, "the ring holds the whole history"
            assert state is StreamState.LIVE
            assert not self.tracker.intake.coverage.partial


class DeafStreamMachine(StreamMachine):
    """The same without a replay port."""

    can_replay = False


def run(machine: type[StreamMachine]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)
    )


def test_any_schedule_ends_true_or_says_so() -> None:
    run(StreamMachine)


def test_any_schedule_without_replay_ends_true_or_says_so() -> None:
    run(DeafStreamMachine)
