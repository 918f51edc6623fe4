"""The answer to a replay request, and how those before it went."""

SILENT_REPLAYS = 2
"""Replays in a row without any answer after which the port counts as dead until it answers again."""

ROLLED_ANSWERS = 2
"""Answers in a row that begin too late after which the ring counts as rolled; one may be a fault of the network."""


class Answer:
    """What the current answer has shown so far, and what the last ones came to.

    Args:
        max_attempts: Answers in a row that bring no progress after which the request is vain.

    Attributes:
        asked_at: Number of the next batch when it was asked for.
        first: Number of its first batch; None before one.
        last: Number of its last batch.
    """

    def __init__(self, max_attempts: int) -> None:
        self.asked_at = 0
        self.first: int | None = None
        self.last = -1
        self._max_attempts = max_attempts
        self._vain = 0  # in a row
        self._rolled = 0  # in a row
        self._silent = 0  # in a row

    @property
    def begins_late(self) -> bool:
        """Whether it does not reach back to what was asked for."""
        return self.first is None or self.first > self.asked_at

    @property
    def rolled_again(self) -> bool:
        """Whether this one shows, from its beginning, what the one before it showed: that the ring has rolled."""
        return self.first is not None and self.begins_late and self._rolled + 1 >= ROLLED_ANSWERS

    @property
    def vain(self) -> bool:
        """Whether asking again is of no use: the answers bring nothing new."""
        return self._vain >= self._max_attempts

    @property
    def rolled(self) -> bool:
        """Whether the ring no longer holds what is asked for."""
        return self._rolled >= ROLLED_ANSWERS

    @property
    def silent(self) -> bool:
        """Whether the port counts as dead."""
        return self._silent >= SILENT_REPLAYS

    def ask(self, next_seq: int) -> None:
        """A replay is being asked for."""
        self.asked_at = next_seq
        self.first = None

    def hear(self, seq: int) -> bool:
        """A batch of it arrived; whether it is the first."""
        self.last = seq
        if self.first is not None:
            return False
        self.first = seq
        return True

    def end(self) -> None:
        """Its end marker arrived: somebody is there."""
        self._silent = 0

    def fail(self) -> None:
        """It timed out or broke off."""
        self._silent = self._silent + 1 if self.first is None else 0

    def count_attempt(self, next_seq: int) -> None:
        """It is over; `next_seq` tells whether it brought anything."""
        self._vain = self._vain + 1 if next_seq == self.asked_at else 0

    def count_rolled(self, *, rolled: bool = True) -> None:
        """Whether it began behind what is needed."""
        self._rolled = self._rolled + 1 if rolled else 0

    def forgive(self) -> None:
        """What the answers before failed to bring no longer matters."""
        self._vain = self._rolled = 0

    def start_over(self) -> None:
        """The stream begins anew, at 0."""
        self.asked_at = 0
        self.forgive()
