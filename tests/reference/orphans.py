"""The twin of `core/orphans.pxd`: stores that wait for their parent, as a list."""

from collections import Counter

from reference.kv_events import BlocksStored

MOST_ORPHANS = 1 << 16  # blocks; the bound on bytes has a test of its own


class OrphanLot:
    def __init__(self) -> None:
        self.events: list[BlocksStored] = []  # oldest first
        self.copies: Counter = Counter()  # (lane, engine hash) -> copies parked
        self.removed: Counter = Counter()  # (lane, engine hash) -> removals noted
        self.blocks = 0
        self.adopted = 0
        self.dropped = 0

    def link(self, event) -> None:
        self.events.append(event)
        self.blocks += len(event.hashes)

    def park(self, event) -> None:
        self.link(event)
        self.copies.update((event.lane, name) for name in event.hashes)
        while self.blocks > MOST_ORPHANS:
            oldest = self.events.pop(0)
            self.blocks -= len(oldest.hashes)
            self.dropped += len(oldest.hashes)
            for name in oldest.hashes:
                self.release(oldest.lane, name)

    def adopt(self, hashes) -> list[BlocksStored]:
        if not self.events:
            return []
        found = []
        for parent in hashes:
            found += [event for event in self.events if event.parent == parent]
            self.events = [event for event in self.events if event.parent != parent]
        self.blocks -= sum(len(event.hashes) for event in found)
        return found

    def release(self, lane, name) -> bool:
        """A copy is parked no longer; whether a removal was noted for it."""
        self.copies[lane, name] -= 1
        if not self.removed[lane, name]:
            return False
        self.removed[lane, name] -= 1
        return True

    def remove(self, lane, name) -> bool:
        if self.removed[lane, name] >= self.copies[lane, name]:
            return False
        self.removed[lane, name] += 1
        return True

    def clear(self) -> None:
        self.events.clear()
        self.copies.clear()
        self.removed.clear()
        self.blocks = 0
