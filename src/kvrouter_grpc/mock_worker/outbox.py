"""Hands sequences with news from the engine to the one coroutine that writes them out."""

import asyncio
from collections import deque

from kvrouter_grpc.mock_worker.sequence import Sequence


class Outbox:
    """Holds each sequence at most once, so a slow reader gets several tokens in one chunk, as from vLLM."""

    def __init__(self) -> None:
        self._ready: deque[Sequence] = deque()
        self._news = asyncio.Event()

    def put(self, sequence: Sequence) -> None:
        """Note that a sequence has something to take."""
        if sequence not in self._ready:
            self._ready.append(sequence)
            self._news.set()

    async def get(self) -> Sequence:
        """The next sequence with something to take."""
        while not self._ready:
            self._news.clear()
            await self._news.wait()
        return self._ready.popleft()
