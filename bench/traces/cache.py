"""An engine's prefix cache: blocks in use are counted, the others wait in the order of their last use to be evicted."""

from collections import OrderedDict
from typing import NamedTuple

from bench.traces.trace import Path, Segment, Trace


class Span(NamedTuple):
    """Some consecutive blocks of a segment."""

    segment: Segment
    start: int
    end: int


class Cache:
    """Blocks by segment, as vLLM's block pool keeps them.

    A request that ends lets go of its blocks from the last to the first, and what was let go of first is evicted
    first; so a segment shrinks from its end, and is gone before the one in front of it shrinks.

    Args:
        capacity: Blocks.

    Attributes:
        used: Blocks that hold something, also if nobody uses it.
        pinned: Blocks in use.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.pinned = 0
        self._held: dict[Segment, int] = {}
        self._users: dict[Segment, int] = {}
        self._idle: OrderedDict[Segment, None] = OrderedDict()  # the one to evict from first

    def match(self, path: Path) -> int:
        """Leading blocks of a prompt that are held."""
        blocks = 0
        held = self._held
        for segment in path:
            here = held.get(segment, 0)
            blocks += here
            if here < len(segment.ids):
                break
        return blocks

    def admit(self, path: Path, private: int) -> list[Span] | None:
        """Take a request in: its prompt's blocks, and `private` ones of its own that nobody can share.

        Returns:
            What was evicted for it; None if it does not fit beside what is in use, and nothing was changed.
        """
        users, held = self._users, self._held
        fresh = [segment for segment in path if segment not in users]
        pinned = self.pinned + private + sum(map(len, fresh))
        if pinned > self.capacity:
            return None
        self.pinned = pinned
        for segment in path:
            users[segment] = users.get(segment, 0) + 1
        for segment in fresh:
            self.used += len(segment.ids) - held.get(segment, 0)
            held[segment] = len(segment.ids)
            self._idle.pop(segment, None)
        self.used += private
        return self._evict() if self.used > self.capacity else []

    def keep(self, answer: Path) -> Path:
        """Give the names of prompt blocks to private ones: what was generated is cached as what was asked.

        Returns:
            Those it was done for, to be released with the prompt, and as private blocks no longer.
        """
        kept = tuple(segment for segment in answer if segment not in self._held)
        for segment in kept:
            self._held[segment] = len(segment.ids)
            self._users[segment] = 1
        return kept

    def release(self, path: Path, private: int) -> None:
        """Let go of what `admit` took. Private blocks are free, those of the prompt stay until they are evicted."""
        self.used -= private
        self.pinned -= private
        users = self._users
        for segment in reversed(path):
            users[segment] -= 1
            if users[segment] == 0:
                del users[segment]
                self._idle[segment] = None
                self.pinned -= len(segment.ids)

    @property
    def blocks(self) -> int:
        """Blocks of prompts that are held."""
        return sum(self._held.values())

    def _evict(self) -> list[Span]:
        evicted = []
        while self.used > self.capacity:
            segment = next(iter(self._idle))
            held = self._held[segment]
            left = max(0, held - (self.used - self.capacity))
            evicted.append(Span(segment, left, held))
            self.used -= held - left
            if left:
                self._held[segment] = left
            else:
                del self._held[segment]
                del self._idle[segment]
        return evicted


def pooled_hit_ratio(trace: Trace, capacity: int) -> float:
    """Share of prompt blocks that one cache of `capacity` blocks, used in the order of arrival, would serve."""
    cache, hits, blocks = Cache(capacity), 0, 0
    for request in trace.requests:
        hits += cache.match(request.path)
        blocks += sum(map(len, request.path))
        if cache.admit(request.path, 0) is not None:
            cache.release(request.path, 0)
    return hits / blocks if blocks else 0.0
