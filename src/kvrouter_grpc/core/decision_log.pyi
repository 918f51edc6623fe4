from kvrouter_grpc.core.recording import Recording

class DecisionLog:
    """The last decisions, in a ring: when it is full, the oldest goes.

    Args:
        size: Decisions to keep, at most 2**24; fewer while their rows take more than 64 MiB.
        hashes: Keep the sequence hashes of the prompts with them.
    """

    size: int
    hashes: bool
    count: int
    """Decisions since the start; the number of the next one."""
    oldest: int
    """The number of the oldest that is left."""
    bytes: int
    """Of the rows that are kept."""

    def __init__(self, size: int, *, hashes: bool = False) -> None: ...
    def __len__(self) -> int:
        """Decisions kept."""

    def since(self, number: int, most: int) -> tuple[int, list[Recording]]:
        """The decisions from a number on, as far as they are left.

        Args:
            number: Of the first that is wanted.
            most: To give at a time.

        Returns:
            The number of the first that is given, and the recordings, oldest first.
        """
