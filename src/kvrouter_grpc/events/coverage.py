"""What of a publisher's batches a picture is made of."""


class Coverage:
    """Batches taken and batches lost, since the picture was begun.

    Attributes:
        taken: Batches that it is made of.
        lost: Batches given up: blocks may be indexed that the engine has removed since.
        partial: Batches before the first one taken are unknown; nothing after it was lost for that reason.
        suspected: It foretold wrongly, though nothing is known to be lost.
        missed: Batches given up since the stream is followed, over all pictures.
        losses: Counts what may have made the picture wrong.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.lost = 0
        self.partial = False
        self.suspected = False
        self.missed = 0
        self.losses = 0

    def resume(self, taken: int, lost: int, *, partial: bool) -> None:
        """It goes on where another one stood."""
        self.taken, self.lost, self.partial = taken, lost, partial
        self.missed = lost
        self.losses += lost > 0

    def lose(self, count: int) -> None:
        """Batches are given up."""
        self.missed += count
        self.lost += count
        self.losses += 1

    def suspect(self) -> None:
        """The picture foretold wrongly."""
        self.suspected = True
        self.losses += 1

    def start_over(self) -> None:
        """Another picture is begun."""
        self.taken = self.lost = 0
        self.partial = self.suspected = False

    def fetched(self) -> None:
        """What was lost is there after all, and the picture about to be begun anew from it."""
        self.missed -= self.lost

    def emptied(self) -> None:
        """The engine dropped its whole cache: whatever was lost or unknown before is void."""
        self.lost = 0
        self.partial = self.suspected = False

    def renewed(self) -> None:
        """What the lost batches did has no effect any more, except that some blocks may have been cached unseen."""
        self.lost = 0
        self.suspected = False
        self.partial = True
