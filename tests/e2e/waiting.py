"""Waiting for something that another process does."""

import asyncio
import time
from collections.abc import Awaitable, Callable

TIMEOUT_S = 20.0
POLL_S = 0.01


async def until(true: Callable[[], Awaitable[bool]], what: str, timeout_s: float = TIMEOUT_S) -> float:
    """Wait until a condition holds.

    Returns:
        Seconds it took.

    Raises:
        AssertionError: It did not come to hold in time.
    """
    started = time.monotonic()
    while not await true():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(POLL_S)
    return time.monotonic() - started
