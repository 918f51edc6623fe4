"""Batches that wait for earlier ones, within bounds."""


class HeldBatches:
    """Payloads by sequence number, bounded in number and in bytes.

    Args:
        max_batches: Most batches.
        max_bytes: Most bytes of their payloads together; one batch may be larger.

    Attributes:
        count: How many there are.
        overflowed: Batches were given up for lack of room since the last `clear`.
    """

    def __init__(self, max_batches: int, max_bytes: int) -> None:
        self.count = 0
        self.overflowed = False
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._payloads: dict[int, bytes] = {}
        self._bytes = 0

    def __contains__(self, seq: int) -> bool:
        return seq in self._payloads

    def first(self) -> int:
        """The lowest number.

        Raises:
            ValueError: Nothing is held.
        """
        return min(self._payloads)

    def covers(self, start: int, stop: int) -> bool:
        """Whether every batch of `range(start, stop)` is held."""
        return all(seq in self._payloads for seq in range(start, stop))

    def gap_after(self, start: int) -> int:
        """The first number from `start` on that is not held."""
        while start in self._payloads:
            start += 1
        return start

    def add(self, seq: int, payload: bytes, *, keep: bool = False) -> bool:
        """Hold a batch; of two copies the later stays.

        The oldest arrivals make room for it: a replay brings those back before it brings the newest.

        Args:
            seq: Its number.
            payload: Its content.
            keep: It is about to be taken, so nothing has to make room.

        Returns:
            False when that very copy was held already.
        """
        before = self._payloads.pop(seq, None)
        if before is not None:
            self._bytes -= len(before)
        self._payloads[seq] = payload
        self._bytes += len(payload)
        self.count = len(self._payloads)
        while not keep and self.count > 1 and self._full:
            self.overflowed = True
            self.take(next(iter(self._payloads)))
        return before != payload

    def take(self, seq: int) -> bytes:
        """Hand out a batch that is held."""
        payload = self._payloads.pop(seq)
        self._bytes -= len(payload)
        self.count -= 1
        return payload

    def clear(self) -> None:
        """Hold nothing."""
        self._payloads.clear()
        self._bytes = self.count = 0
        self.overflowed = False

    @property
    def _full(self) -> bool:
        return self.count > self._max_batches or self._bytes > self._max_bytes
