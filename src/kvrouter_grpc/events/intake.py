"""Batches on their way into the picture: held until their turn, taken in order, given up when they cannot be had."""

from typing import NamedTuple

from kvrouter_grpc.events.batch_log import REMEMBERED, BatchLog
from kvrouter_grpc.events.coverage import Coverage
from kvrouter_grpc.events.held import HeldBatches
from kvrouter_grpc.events.proof import ProcessProof
from kvrouter_grpc.routing.stream import StreamPosition


class Unreadable(NamedTuple):
    """A batch that cannot be read."""

    seq: int
    content: int  # its hash
    answer: int  # the last answer that was asked for when it came


class Intake:
    """Where a stream stands.

    Args:
        max_held: Batches held back while earlier ones are fetched.
        max_held_bytes: Their payloads together.

    Attributes:
        log: The batches taken; whoever takes some in order by itself does so there.
        coverage: What of the history these are.
        proof: Whether they are of the process that publishes now.
        held: Batches that wait.
        live_high: Highest number seen on the live socket; -1 before the first.
        unreadable: The last batch that could not be read; None when there was none.
    """

    def __init__(self, max_held: int, max_held_bytes: int) -> None:
        self.log = BatchLog()
        self.coverage = Coverage()
        self.proof = ProcessProof()
        self.held = HeldBatches(max_held, max_held_bytes)
        self.live_high = -1
        self.unreadable: Unreadable | None = None

    @property
    def next_seq(self) -> int:
        """Number of the batch to be taken next."""
        return self.log.next_seq

    @property
    def ready(self) -> bool:
        """Whether `take()` would give a batch."""
        return self.held.count > 0 and self.next_seq in self.held and not self.proof.doubted

    @property
    def hole(self) -> bool:
        """Whether the next batch is known to be missing."""
        if self.held.count:
            return self.next_seq not in self.held
        return self.unreadable is not None and self.unreadable.seq == self.next_seq

    @property
    def behind(self) -> int:
        """Batches that are known to be published and are not taken: missing, or held back."""
        if not (self.held.count or self.hole):
            return 0  # the highest number heard may be that of a process that is gone
        return max(1, self.live_high + 1 - self.next_seq)

    @property
    def faulty(self) -> bool:
        """Whether the picture may hold blocks that are gone."""
        return self.coverage.lost > 0 or self.coverage.suspected or self.proof.unverified

    def take(self) -> tuple[int, bytes] | None:
        """The next batch in order, number and payload; None when it is not here."""
        if not self.ready:
            return None
        seq = self.next_seq
        payload = self.held.take(seq)
        self.log.follow(seq, payload)
        self.coverage.taken += 1
        return seq, payload

    def is_echo(self, seq: int, payload: bytes, answer: int | None) -> bool:
        """Whether it is but another copy of the unreadable batch, damaged before the network doubled it.

        Args:
            seq: Its number.
            payload: Its content.
            answer: Which answer it is of; None: it came live.
        """
        bad = self.unreadable
        if bad is None or seq != bad.seq or seq != self.next_seq or answer not in (None, bad.answer):
            return False
        self.log.note(seq, payload)
        return self.log.forget(seq) == bad.content

    def give_back(self) -> tuple[int, int]:
        """The batch just taken counts as not received; its number and content."""
        seq = self.next_seq - 1
        content = self.log.forget(seq)
        self.log.next_seq = seq
        self.coverage.taken -= 1
        return seq, content

    def skip_to(self, seq: int) -> None:
        """Do without the batches before `seq`."""
        if self.coverage.taken:
            self.lose(seq)
        else:
            self.coverage.partial = True
            self.log.next_seq = seq

    def lose(self, seq: int) -> None:
        """Give up the batches before `seq`, which may have removed blocks that are indexed."""
        self.coverage.lose(seq - self.next_seq)
        for lost in range(max(self.next_seq, seq - REMEMBERED), seq):
            self.log.note_lost(lost)
        self.log.next_seq = seq

    def lose_proof(self) -> None:
        """Go on although it may be another process, and batches may be missing."""
        self.proof.give_up(known=self.coverage.taken > 0)
        self.coverage.losses += self.proof.unverified

    def emptied(self) -> None:
        """The batch just taken says that the engine dropped its whole cache: whatever was lost before is void."""
        self.coverage.emptied()
        self.proof.unverified = False

    def renewed(self) -> None:
        """Nothing of what was lost, however it was, can be wrong in the picture any more."""
        self.coverage.renewed()
        self.proof.unverified = False

    def start_over(self) -> None:
        """Know nothing of the stream's batches."""
        self.log.clear()
        self.coverage.start_over()
        self.proof.start_over()
        self.held.clear()

    # --- other processes of the router ----------------------------------------------------------------------------

    @property
    def position(self) -> StreamPosition | None:
        """Where another one could go on, in the same doubt; None when nothing good would come of that.

        That is when what was taken may be of two processes, or foretold wrongly.
        """
        content, coverage = self.log.last_content, self.coverage
        if not coverage.taken or coverage.suspected or self.proof.unverified or not content:
            return None
        return StreamPosition(self.next_seq, content, coverage.taken, coverage.partial, coverage.lost)

    def resume(self, position: StreamPosition) -> None:
        """Go on where another one was. The connection proves, or disproves, that it is the same process."""
        self.coverage.resume(position.known, position.lost, partial=position.partial)
        self.log.note_hash(position.next_seq - 1, position.content)
        self.log.next_seq = position.next_seq
