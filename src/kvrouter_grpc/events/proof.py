"""Whether the publisher is still the process whose batches were taken: numbers alone do not tell."""


class ProcessProof:
    """What has been shown of the process behind a stream, and what is still to be.

    A connection drops when an engine restarts, but not only then. The copy of the last batch that was taken, in the
    answer to a replay, proves the same process; an empty answer proves a restart, unless the ring of this publisher is
    known to hold nothing.

    Attributes:
        wanted: A replay has to show what was missed.
        asked: ... and was asked for.
        doubted: Since a reconnection nothing has proved the process: take nothing.
        unverified: ... and the proof was given up.
        empty_proves: An empty answer proves a restart.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.asked = False
        self.doubted = False
        self.unverified = False
        self.empty_proves = True
        self._emptied_at: int | None = None  # next number before the last restart that an empty answer proved

    @property
    def open(self) -> bool:
        """Whether an answer has yet to show something."""
        return self.wanted or self.asked

    @property
    def idle(self) -> bool:
        """Whether it has no interest in the next live batch."""
        return not (self.doubted or self.unverified or self._emptied_at is not None)

    def reconnected(self, *, known: bool) -> None:
        """There is another connection; `known`: to somebody whose batches were taken before."""
        self.wanted = True
        self.asked = False
        self.doubted = known

    def ask(self) -> None:
        """A replay is being asked for."""
        self.asked, self.wanted = self.wanted, False

    def shown(self) -> None:
        """The last batch taken came again."""
        self.doubted = False

    def answered(self) -> None:
        """The answer is complete."""
        self.asked = False

    def failed(self) -> None:
        """The answer is not."""
        self.wanted = self.open
        self.asked = False

    def give_up(self, *, known: bool) -> None:
        """There will be no answer that proves anything; `known`: batches were taken."""
        self.wanted = self.doubted = False
        self.unverified = known

    def new_process(self, *, wanted: bool) -> None:
        """It is another one; `wanted`: and what it has published is to be asked for."""
        self.asked = False
        self.wanted = wanted
        self._emptied_at = None
        self.start_over()

    def start_over(self) -> None:
        """Nothing that was taken counts any more, so nothing needs a proof."""
        self.doubted = self.unverified = False

    # --- publishers whose ring holds nothing -----------------------------------------------------------------------

    def emptied(self, next_seq: int) -> None:
        """An empty answer proved a restart."""
        self._emptied_at = next_seq

    def heard(self, seq: int) -> None:
        """A live batch came. Had the publisher restarted, it would hardly go on where we were."""
        if self._emptied_at is not None:
            self.empty_proves = seq != self._emptied_at
            self._emptied_at = None

    def filled(self) -> None:
        """An answer holds a batch."""
        self.empty_proves = True
