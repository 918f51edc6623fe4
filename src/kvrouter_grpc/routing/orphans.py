"""Stored blocks whose parent is not known yet."""

from collections import Counter, OrderedDict
from collections.abc import Iterable

from kvrouter_grpc.types import BlocksStored

MAX_ORPHAN_BLOCKS = 65_536
"""Blocks parked per target. A full cache of one rank is of this order; more would be a leak, not a gap."""


class OrphanLot:
    """Parks stores of one target until the block they continue from appears.

    A parent goes missing when its own store was lost. Rooting the children would be a false match, dropping them
    would lose them and all that follows: so they wait here, bounded, oldest out first.
    """

    __slots__ = ("_blocks", "_by_parent", "_hashes", "_removed", "dropped", "limit")

    def __init__(self, limit: int = MAX_ORPHAN_BLOCKS) -> None:
        self.limit = limit
        self.dropped = 0  # blocks given up for lack of room
        self._by_parent: OrderedDict[int, list[BlocksStored]] = OrderedDict()
        self._hashes: Counter[int] = Counter()  # engine hash -> physical copies parked
        self._removed: Counter[int] = Counter()  # engine hash -> removals seen while parked
        self._blocks = 0

    def __len__(self) -> int:
        """Blocks parked."""
        return self._blocks

    @property
    def waiting(self) -> bool:
        """Whether a store may concern what is, or was, parked: blocks to adopt, or removals to hand out."""
        return bool(self._by_parent or self._removed)

    def park(self, event: BlocksStored) -> None:
        """Keep `event` until its parent appears.

        Raises:
            ValueError: The event has no parent: it is a root and needs none.
        """
        if event.parent is None:
            raise ValueError("a root block is no orphan")
        self._by_parent.setdefault(event.parent, []).append(event)
        self._hashes.update(event.hashes)
        self._blocks += len(event.hashes)
        while self._blocks > self.limit:
            _, oldest = self._by_parent.popitem(last=False)
            self._forget(oldest)
            for lost in oldest:
                self.dropped += len(lost.hashes)
                for engine_hash in lost.hashes:
                    self._removed.pop(engine_hash, None)

    def adopt(self, hashes: Iterable[int]) -> list[BlocksStored]:
        """Hand out, and forget, the stores that continue from one of `hashes`, which are known now."""
        found: list[BlocksStored] = []
        for parent in hashes:
            events = self._by_parent.pop(parent, None)
            if events is not None:
                self._forget(events)
                found += events
        return found

    def remove(self, engine_hash: int) -> bool:
        """Note that a parked block was removed; False when it is not parked here."""
        if self._removed[engine_hash] >= self._hashes[engine_hash]:
            return False
        self._removed[engine_hash] += 1
        return True

    def take_removals(self, hashes: Iterable[int]) -> list[int]:
        """The removals noted for `hashes` while they were parked; each is handed out once."""
        taken: list[int] = []
        for engine_hash in hashes:
            if engine_hash in self._removed:
                taken.append(engine_hash)
                self._removed[engine_hash] -= 1
                if not self._removed[engine_hash]:
                    del self._removed[engine_hash]
        return taken

    def clear(self) -> None:
        """Forget everything: the rank's cache is gone."""
        self._by_parent.clear()
        self._hashes.clear()
        self._removed.clear()
        self._blocks = 0

    def _forget(self, events: list[BlocksStored]) -> None:
        for event in events:
            self._blocks -= len(event.hashes)
            for engine_hash in event.hashes:
                self._hashes[engine_hash] -= 1
                if not self._hashes[engine_hash]:
                    del self._hashes[engine_hash]
