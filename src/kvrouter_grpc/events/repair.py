"""The whole history of a stream, fetched again to make good what was given up."""

from kvrouter_grpc.events.held import HeldBatches


class Repair:
    """Collects an answer from 0 aside: only a complete one may replace what was taken of the stream.

    Args:
        max_held: Most batches of a history.
        max_held_bytes: Most bytes of their payloads together.
        max_attempts: Failures after which it is left at that.

    Attributes:
        possible: What was given up may still be had from this process.
    """

    def __init__(self, *, max_held: int, max_held_bytes: int, max_attempts: int) -> None:
        self.possible = True
        self._bounds = (max_held, max_held_bytes)
        self._max_attempts = max_attempts
        self._failures = 0
        self._history: HeldBatches | None = None

    @property
    def under_way(self) -> bool:
        """Whether an answer from 0 is being collected."""
        return self._history is not None

    def begin(self) -> None:
        """The history is being asked for."""
        self._history = HeldBatches(*self._bounds)

    def collect(self, seq: int, payload: bytes) -> None:
        """A batch arrived; it matters only while a repair is under way."""
        if self._history is not None:
            self._history.add(seq, payload)

    def end(self, first: int | None, next_seq: int, *, suffix_helps: bool) -> HeldBatches | None:
        """The answer has ended.

        Args:
            first: Number of its first batch; None when there was none.
            next_seq: Number up to which it has to go.
            suffix_helps: Even a history that begins after 0 is better than what is known.

        Returns:
            The history to start over with; None when what was taken stays as it is.
        """
        history, self._history = self._history, None
        if history is None or first is None or (first and not suffix_helps):
            self.possible = False  # the ring has rolled
        elif history.overflowed or not history.covers(first, next_seq):
            self._failed()
            self.possible = self.possible and not history.overflowed
        else:
            return history
        return None

    def break_off(self) -> None:
        """The answer will not end."""
        if self._history is not None:
            self._history = None
            self._failed()

    def abandon(self) -> None:
        """Whatever comes of the answer is of no use any more."""
        self._history = None

    def new_process(self) -> None:
        """What failed with the process before says nothing of this one."""
        self._history = None
        self._failures = 0
        self.possible = True

    def _failed(self) -> None:
        self._failures += 1
        self.possible = self._failures < self._max_attempts
