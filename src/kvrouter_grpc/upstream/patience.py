"""Limits to how long a task waits, for tasks that wait thousands of times."""

import asyncio
import math
from collections.abc import Awaitable
from types import TracebackType
from typing import Self, TypeVar

_T = TypeVar("_T")


class Patience:
    """Limits each of many waits of one task with one timer.

    `asyncio.timeout` makes and cancels a timer for every wait, which for a stream costs as much as reading its
    messages. Here the timer is left alone: when it fires, it cancels a wait that has lasted too long, or else is set
    to the end of the present one.

        with Patience() as patience:
            async for message in messages:
                await patience.within(10.0, send(message))

    Use it in the task that made it.
    """

    __slots__ = ("_cancelling", "_deadline", "_expired", "_loop", "_task", "_timer")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "Patience belongs to a task"  # noqa: S101 - a slip of the programmer
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = task.get_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf
        self._expired = False

    async def within(self, limit_s: float, work: Awaitable[_T]) -> _T:
        """Await `work`, at most `limit_s` seconds.

        Raises:
            TimeoutError: It took longer, and was cancelled.
        """
        self._deadline = self._loop.time() + limit_s
        if self._timer is None or self._deadline < self._timer.when():
            self._set_timer()
        try:
            return await work
        except asyncio.CancelledError:
            if self._expired and self._task.uncancel() <= self._cancelling:
                raise TimeoutError from None
            raise
        finally:
            self._deadline = math.inf
            self._expired = False

    def close(self) -> None:
        """Take back the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _set_timer(self) -> None:
        self.close()
        self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._deadline <= self._loop.time():
            self._expired = True
            self._task.cancel()
        elif self._deadline < math.inf:
            self._set_timer()
