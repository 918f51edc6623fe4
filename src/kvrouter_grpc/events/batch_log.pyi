from typing import Final, final

REMEMBERED: Final[int]
"""Batches whose content is remembered."""

HIGHEST_SEQ: Final[int]
"""Highest number a batch may have: the engines' numbers are signed."""

SAME: Final[int]
OTHER: Final[int]
LOST: Final[int]
UNKNOWN: Final[int]

@final
class BatchLog:
    """The number of the next batch of a stream, and what the last ones taken contained.

    Attributes:
        next_seq: Number of the batch to be taken next; u64.
    """

    next_seq: int

    def __new__(cls) -> BatchLog: ...
    def follow(self, seq: int, payload: bytes) -> bool:
        """Take a batch if it is the next one: note its content and count on. False: it is another one."""

    def note(self, seq: int, payload: bytes) -> None:
        """Remember what a batch contained."""

    def note_lost(self, seq: int) -> None:
        """Remember that a batch was given up."""

    def note_hash(self, seq: int, content: int) -> None:
        """Remember a batch by the hash that `forget` gave."""

    @property
    def last_content(self) -> int:
        """Hash of the batch before the next one; 0 when it was given up, or there was none."""

    def forget(self, seq: int) -> int:
        """Forget the content of a batch; its hash, 0 when nothing was noted of it."""

    def compare(self, seq: int, payload: bytes) -> int:
        """Whether a batch of this number contained the `SAME` or something `OTHER`, was `LOST`, or is `UNKNOWN`."""

    def clear(self) -> None:
        """Know nothing, and begin again at 0."""
