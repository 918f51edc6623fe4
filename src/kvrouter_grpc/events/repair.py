"""The whole history of a stream, fetched again to make good what was given up."""

from kvrouter_grpc.events.answer import ROLLED_ANSWERS
from kvrouter_grpc.events.held import HeldBatches

FEW = 16
FEW_LATE_ANSWERS = 8
"""An answer that begins so few batches late may have lost them on the way; a ring that rolls is soon far behind. So it
takes as many of those in a row to believe it."""


class Repair:
    """Collects answers from 0 on aside: only what is complete may replace what was taken of the stream.

    Answers have holes, on bad networks and with publishers that lose messages of long ones. So what has come is kept,
    and the next answer begins where the first hole is.

    Args:
        max_held: Most batches of a history.
        max_held_bytes: Most bytes of their payloads together.

    Attributes:
        possible: What was given up may still be had from this process.
        asked: The answer under way is for it.
        advanced: The last answer has brought something; ask again soon.
        begins: Number of the first batch of the history.
    """

    def __init__(self, *, max_held: int, max_held_bytes: int) -> None:
        self.possible = True
        self.asked = False
        self.advanced = False
        self.begins = 0
        self._bounds = (max_held, max_held_bytes)
        self._history: HeldBatches | None = None
        self._hole = 0  # number of the first batch that is missing; what is asked for
        self._began: int | None = None  # number of the answer's first batch; None: it has none yet
        self._late = 0  # answers in a row that began behind what was asked for, and brought nothing

    @property
    def under_way(self) -> bool:
        """Whether a history is being collected."""
        return self._history is not None

    def ask(self) -> int:
        """It is being asked for; from which number on."""
        if self._history is None:
            self._history = HeldBatches(*self._bounds)
            self.begins = self._hole = 0
        self.asked = True
        self._began = None
        return self._hole

    def answer_begins(self, seq: int, *, suffix_helps: bool) -> None:
        """Its answer begins with that number; `suffix_helps`: a history without its beginning is better than none."""
        self._began = seq
        if self._hole:
            return
        if seq and not suffix_helps:
            self._history = None  # it cannot become complete
        else:
            self.begins = seq

    def collect(self, seq: int, payload: bytes) -> None:
        """A batch arrived; it matters only while a repair is under way."""
        if self._history is not None:
            self._history.add(seq, payload)

    def end(self, next_seq: int) -> HeldBatches | None:
        """The answer has ended.

        Args:
            next_seq: Number up to which the history has to go.

        Returns:
            The history to start over with; None when what was taken stays as it is.
        """
        self.asked = self.advanced = False
        history, self._history = self._history, None
        if history is not None and history.overflowed:
            self.possible = False
            return None
        hole = history.gap_after(max(self._hole, self.begins)) if history is not None and history.count else self._hole
        self.advanced = hole > self._hole
        if history is not None and self.advanced and hole >= next_seq:
            self._late = 0
            return history
        if self.advanced or self._began == self._hole:
            self._late = 0
        else:
            self._late += 1
            few = self._began is not None and self._began - self._hole < FEW
            self.possible = self._late < (FEW_LATE_ANSWERS if few else ROLLED_ANSWERS)
        if self.possible:
            self._hole, self._history = hole, history
        return None

    def break_off(self) -> None:
        """The answer will not end; what came of it counts all the same."""
        self.asked = False

    def abandon(self) -> None:
        """Whatever has come, or still comes, is of no use any more."""
        self._history = None
        self.asked = False

    def new_process(self) -> None:
        """What failed with the process before says nothing of this one."""
        self.abandon()
        self.possible = True
        self._late = 0
