"""Makes one rank's event stream contiguous: a state machine over sequence numbers, without I/O and without a clock.

A publisher numbers its batches from 0, sends each once to whoever is connected, and keeps the last ones in a ring from
which they can be asked again. Batches get lost on both ways, the ring rolls, and a restarted engine starts at 0 without
a word. The tracker is told what arrives and hands out, in order and once, what is to be applied.

Three facts carry it:

* Every request for a replay starts at the last batch that was taken. Its copy in the answer proves that the publisher
  is still the same process; another content under that number, or an empty answer, proves a restart. So a restarted
  engine that has already counted past us, or not yet reached us, is told from one that simply has nothing new.
* The first batch of an answer is never one that was lost in sending: the queue that overflows is still empty then. An
  answer that begins too late means that the ring has rolled.
* A live socket delivers ascending numbers. A number that comes back with another content is a new process.

A hole that nothing fills is given up: the stream goes on behind it and is STALE, for the lost batches may have
removed blocks. `audit()` repairs it when the whole history can still be had: it asks from 0, collects the answer
aside, and only when that is complete everything is forgotten and taken again. When it cannot be had, time heals: the
engine's further events show what is still there (`routing/renewal.py`), and `renewed()` says that they have.
"""

from collections.abc import Callable
from enum import Enum

from kvrouter_grpc.events.answer import Answer
from kvrouter_grpc.events.batch_log import LOST, OTHER, SAME, UNKNOWN
from kvrouter_grpc.events.intake import Intake, Unreadable
from kvrouter_grpc.events.repair import Repair
from kvrouter_grpc.routing.stream import StreamPosition
from kvrouter_grpc.types import StreamState


class Verdict(Enum):
    """What an input meant. After every input the caller drains `Intake.take()`."""

    APPLY = "apply"  # in order
    DUPLICATE = "duplicate"  # known already
    HOLD = "hold"  # kept until what comes before it is there
    GAP = "gap"  # batches before it are missing
    RESTART = "restart"  # it starts over, as a new process or to be repaired: forget its blocks before taking more


class StreamTracker:
    """The order of one (worker, rank) stream.

    Args:
        can_replay: Whether the publisher has a replay port.
        max_held: Batches held back while earlier ones are fetched.
        max_held_bytes: Their payloads together.
        max_attempts: Answers in a row that bring no progress after which a gap is given up.
        readable: Whether a payload is whole: damage, too, changes a content, and proves no restart.

    Attributes:
        intake: Where it stands. The caller takes batches there, and may take some by itself, see `followed`.
        gaps: Times a number was missing.
        restarts: Restarts found or reported.
        replaying: A replay was asked for and has not ended. The caller gives up its own when this turns False.
    """

    def __init__(
        self,
        *,
        can_replay: bool,
        max_held: int,
        max_held_bytes: int,
        max_attempts: int,
        readable: Callable[[bytes], bool] = lambda _: True,
    ) -> None:
        self.intake = Intake(max_held, max_held_bytes)
        self.gaps = 0
        self.restarts = 0
        self.replaying = False
        self._can_replay = can_replay
        self._readable = readable
        self._connected = False
        self._heard = False  # the publisher said anything: a batch, or the end of a replay
        self._proof = self.intake.proof
        self._audit = False  # a replay is wanted to look for losses that no later batch has shown
        self._repair = Repair(max_held=max_held, max_held_bytes=max_held_bytes)
        self._answer = Answer(max_attempts)
        self._answers = 0  # asked for so far
        self._rubbish = False  # the publisher writes batches that cannot be read
        self._restart_seen = False  # since the last handshake

    # --- outputs --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> StreamState:
        """How true the picture is that the batches taken so far give."""
        if not self._heard:
            return StreamState.SYNCING if self._proof.open else StreamState.COLD
        if self._proof.open or self.intake.hole or not self._connected:
            return StreamState.SYNCING
        return StreamState.STALE if self.intake.faulty else StreamState.LIVE

    @property
    def settled(self) -> bool:
        """Whether what was published before has been told, or is not to be had."""
        return self._connected and not self._proof.open

    @property
    def unreached(self) -> bool:
        """Whether nobody was ever there."""
        return not (self._heard or self._connected)

    @property
    def wants_replay(self) -> bool:
        """Whether a replay should be asked for as soon as the caller's pace allows."""
        if not (self._can_replay and self._connected) or self.replaying:
            return False
        return self._proof.wanted or self._audit or self.intake.hole

    @property
    def detail(self) -> str:
        """One sentence for the operator; "" when there is nothing to say."""
        if not self._heard:
            return "connected, and nothing heard yet" if self._connected else "not connected yet"
        if not self._connected:
            return "the connection is lost; what the engine does meanwhile is fetched when it is back"
        if self.intake.hole:
            return f"batch {self.intake.next_seq} is missing and asked for again"
        if self._proof.open:
            return f"asking what happened from batch {self.intake.next_seq} on"
        if self.intake.coverage.lost:
            return (
                f"{self.intake.coverage.lost} batches are lost: what they removed counts as cached until it is replaced"
            )
        if self._proof.unverified:
            return "reconnected, and no replay has shown what was missed"
        if self.intake.coverage.suspected:
            return "it foretold wrongly: what it holds counts as cached until it is replaced"
        if self.intake.coverage.partial:
            return "blocks cached by batches that were not received are unknown"
        return ""

    @property
    def doubted(self) -> bool:
        """Whether nothing has proved yet that the publisher is the process whose batches were taken."""
        return not self._connected or self._proof.doubted or self._proof.unverified

    @property
    def repairable(self) -> bool:
        """Whether an audit may make good what was given up."""
        return self._can_replay and (self.intake.faulty or self.intake.coverage.partial) and self._repair.possible

    @property
    def position(self) -> StreamPosition | None:
        """Where another process of the router could go on; a proof will be asked for, so None without a replay port."""
        return self.intake.position if self._can_replay else None

    # --- the connection -------------------------------------------------------------------------------------------

    def connected(self) -> None:
        """The live socket has made its (first or repeated) handshake."""
        self._connected = True
        self._restart_seen = False
        if self._can_replay:
            # Held batches, and an answer under way, may be of a process that is gone.
            self.intake.held.clear()
            self._repair.abandon()
            self.replaying = False
            self._proof.reconnected(known=self.intake.next_seq > 0)
            self._answer.forgive()
        elif self.intake.coverage.taken:
            self.intake.lose_proof()

    def disconnected(self) -> None:
        """The live socket has lost its connection."""
        self._connected = False

    def restarted(self) -> Verdict:
        """Somebody else knows that the engine's process is a new one. Tell this when the live socket is drained.

        It starts over even when a restart was noticed here already: that may have been another one.

        Returns:
            RESTART, or DUPLICATE when there is nothing to forget.
        """
        if not self.intake.next_seq:
            self.intake.held.clear()
            return Verdict.DUPLICATE
        self.restarts -= self._restart_seen  # most likely the same one: it counts once
        return self._restart()

    def resync(self) -> None:
        """The picture is wrong although no batch is known to be lost.

        It is treated as if some were: doubted, and taken again if the whole history can be had. To forget it for what a
        ring that has rolled still holds would hide more than it mends.
        """
        if self.intake.coverage.taken:
            self.intake.coverage.suspect()
            self.audit()

    # --- live batches ---------------------------------------------------------------------------------------------

    @property
    def in_order(self) -> bool:
        """Whether the next live batch may be taken at once, without a word here: nothing else is to be considered.

        That is what `live` and `take` would do together, at a fraction of the cost: a stream in order is the rule.
        """
        return self._proof.idle and not (self.intake.held.count or self.intake.hole or self._repair.under_way)

    def followed(self, count: int) -> None:
        """`count` live batches were taken, as `in_order` allowed, and are in the log."""
        if count:
            self._heard = True
            self.intake.live_high = max(self.intake.live_high, self.intake.next_seq - 1)
            self.intake.coverage.taken += count

    def live(self, seq: int, payload: bytes) -> Verdict:
        """A batch arrived on the live socket."""
        self._heard = True
        again = seq <= self.intake.live_high
        self.intake.live_high = max(self.intake.live_high, seq)
        self._proof.heard(seq)
        if seq < self.intake.next_seq:
            known = self.intake.log.compare(seq, payload)
            if known == LOST:
                self.audit()  # late, or a new process that the batches of the old one had run ahead of: a replay tells
            if known in (SAME, LOST) or (known == UNKNOWN and not again) or not self._readable(payload):
                return Verdict.DUPLICATE
            self._restart()
            self._heard = True
            self.intake.live_high = seq
            self._keep(seq, payload)
            return Verdict.RESTART
        if self.intake.is_echo(seq, payload, None):
            return Verdict.DUPLICATE
        self._repair.collect(seq, payload)
        gap = seq > self.intake.next_seq and self.intake.coverage.taken > 0 and not self.intake.hole
        self.gaps += gap
        if not self._keep(seq, payload):
            return Verdict.DUPLICATE
        if gap:
            return Verdict.GAP
        if not self.intake.ready:
            return Verdict.HOLD
        if not (self._can_replay and self._proof.empty_proves):
            self._proof.unverified = False  # the numbers go on where they were: no better proof is to be had
        return Verdict.APPLY

    def _keep(self, seq: int, payload: bytes) -> bool:
        """Hold a live batch. Without a replay port, what lies before it will never come."""
        if not self._can_replay and seq > self.intake.next_seq:
            self.intake.skip_to(seq)
        return self.intake.held.add(seq, payload, keep=seq == self.intake.next_seq)

    # --- replays --------------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Look for lost batches although none is known to be missing: the last one leaves no hole behind.

        Where batches were given up, this tries to repair the stream.
        """
        self._audit = self._can_replay

    def replay_asked(self) -> int:
        """A replay is being asked for.

        Returns:
            The number it has to start from.
        """
        self.replaying = True
        self._answers += 1
        repairs = self._audit and self.repairable and not (self._proof.wanted or self.intake.hole)
        self._proof.ask()
        self._audit = False
        self._answer.ask(self.intake.next_seq)
        return self._repair.ask() if repairs else max(self.intake.next_seq - 1, 0)

    def replayed(self, seq: int, payload: bytes) -> Verdict:
        """A batch arrived on the replay socket."""
        self._heard = True
        if self._answer.hear(seq):
            self._proof.filled()
            if self._repair.asked:
                self._repair.answer_begins(seq, suffix_helps=self._proof.unverified)
            elif not self.intake.next_seq and seq:
                # Nothing is known yet, and of what was before nothing needs to be.
                held = self.intake.held
                self.intake.skip_to(min(seq, held.first()) if held.count else seq)
        self._repair.collect(seq, payload)
        if seq < self.intake.next_seq:
            known = self.intake.log.compare(seq, payload)
            if known == OTHER and self._readable(payload):
                self._restart()
                self._heard = True
                return Verdict.RESTART
            if known == SAME:
                self._proof.shown()
            return Verdict.DUPLICATE
        if self.intake.is_echo(seq, payload, self._answers):
            return Verdict.DUPLICATE
        news = self.intake.held.add(seq, payload, keep=seq == self.intake.next_seq)
        doubtful = self._proof.doubted or self._repair.asked
        if self._answer.first == seq and self.intake.hole and self._answer.rolled_again and not doubtful:
            # To wait for its end would cost the time of a whole ring.
            self._give_up(whole_answer=False)
        if self.intake.ready:
            return Verdict.APPLY
        return Verdict.HOLD if news else Verdict.DUPLICATE

    def replay_ended(self) -> Verdict:
        """The answer's end marker arrived.

        Returns:
            APPLY when nothing is missing now, GAP when something is, RESTART when the answer proved one.
        """
        self.replaying = False
        self._heard = True
        self._answer.end()
        if self._answer.first is None and self._answer.asked_at and self._proof.empty_proves:
            emptied_at = self.intake.next_seq
            self._restart()
            self._heard = True
            self._proof.emptied(emptied_at)
            return Verdict.RESTART
        self._proof.answered()
        if self._repair.asked:
            return self._repair_ended()
        if self._proof.doubted:
            return self._unproved()
        if not self.intake.hole:
            self._answer.forgive()
            return Verdict.APPLY
        self._answer.count_rolled(rolled=self._answer.begins_late and self.intake.next_seq == self._answer.asked_at)
        self._answer.count_attempt(self.intake.next_seq)
        if self._answer.rolled or self._answer.vain:
            self._give_up(whole_answer=self._answer.first is not None)
            return Verdict.APPLY
        return Verdict.GAP

    def _repair_ended(self) -> Verdict:
        """Take the history from its beginning, if it is complete up to now."""
        history = self._repair.end(self.intake.next_seq)
        if history is None:
            self._audit = self._repair.advanced
            return Verdict.GAP if self.intake.hole else Verdict.APPLY
        first = self._repair.begins
        if not first:
            self.intake.coverage.fetched()
        self._start_over()
        self.intake.held = history
        if first:
            self.intake.skip_to(first)
            self._repair.possible = False
        return Verdict.RESTART

    def _unproved(self) -> Verdict:
        """The answer did not hold the batch that would prove the same process: the ring has rolled past it."""
        if not self._proof.empty_proves:
            self.intake.lose_proof()
            return Verdict.APPLY
        self._answer.count_rolled()
        self._proof.wanted = True
        if not self._answer.rolled:
            return Verdict.GAP
        self._start_over()
        return Verdict.RESTART

    def replay_failed(self) -> None:
        """The replay timed out or broke off: what came of it is kept, its end is unknown."""
        self.replaying = False
        self._answer.fail()
        if self._repair.asked:
            self._repair.break_off()
            return
        self._answer.count_attempt(self.intake.next_seq)
        self._proof.failed()
        if self._answer.silent or self._answer.vain:
            self._answer.forgive()
            if self._proof.wanted:
                self.intake.lose_proof()
                self._repair.possible = True
            if self.intake.hole:
                self._give_up(whole_answer=False)

    def _give_up(self, *, whole_answer: bool) -> None:
        """Go on behind the hole: a picture with a known fault is worth more than none."""
        self._answer.forgive()
        waiting = self.intake.held.first() if self.intake.held.count else self.intake.next_seq
        if whole_answer and self._answer.last < waiting:
            # The ring ends before what waits behind the hole, or is damaged in it: a process that is gone sent that.
            self.intake.held.clear()
            self.intake.unreadable = None
        else:
            self.intake.skip_to(max(waiting, self.intake.next_seq + 1))

    # --- taking ---------------------------------------------------------------------------------------------------

    def unreadable(self) -> None:
        """The batch just taken cannot be read. It counts as not received, and as lost if another copy is no better."""
        intake = self.intake
        seq, content = intake.give_back()
        before = intake.unreadable
        if (
            self._can_replay
            and (before is None or before[:2] != (seq, content))
            and (intake.coverage.taken or not self._rubbish)
        ):
            self.gaps += before is None or before.seq != seq
            intake.unreadable = Unreadable(seq, content, self._answers)
        else:
            # The same bytes from two sides, so the engine wrote them; then, of one that never wrote anything else, all
            # are lost.
            intake.lose(seq + 1)
            intake.log.note_hash(seq, content)
            self._repair.possible = False
            self._rubbish = True

    # --- parts ----------------------------------------------------------------------------------------------------

    def _restart(self) -> Verdict:
        """Another process: nothing of the old one holds any more."""
        self.restarts += 1
        self._start_over()
        self._proof.new_process(wanted=self._can_replay)
        self._heard = self.replaying = self._audit = False
        self.intake.live_high = -1
        self.intake.unreadable = None
        self._restart_seen = True
        self._repair.new_process()
        self._rubbish = False
        return Verdict.RESTART

    def _start_over(self) -> None:
        """Know nothing of the stream's batches."""
        self.intake.start_over()
        self._repair.abandon()
        self._repair.possible = True
        self._answer.start_over()
