"""Routers over mock workers for the tests of the typed client, and what is left of its requests."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import aiohttp
import pytest

from kvrouter_client import (
    KvRouterAdminClient,
    KvRouterClient,
)
from programs import Fleet, fleet

BLOCK = 16
SLOW = ("--itl-ms", "20")
DEADLINE_S = 10.0

T = TypeVar("T")


@pytest.fixture(scope="module")
def fast() -> Iterator[Fleet]:
    """Two workers that compute as fast as they can."""
    with fleet(2) as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> Iterator[Fleet]:
    """Two workers that take their time, so that a stream is still open when the test looks."""
    with fleet(2, workers=SLOW) as running:
        yield running


@pytest.fixture
async def router(fast: Fleet) -> AsyncIterator[KvRouterClient]:
    async with KvRouterClient(fast.address) as client:
        yield client


@pytest.fixture
async def admin(fast: Fleet) -> AsyncIterator[KvRouterAdminClient]:
    async with KvRouterAdminClient(fast.address) as client:
        yield client


def prompt(seed: int, blocks: int = 6, rest: int = 4) -> list[int]:
    """Tokens that no other seed shares a block with."""
    return [1000 + seed * 100 + i % 97 for i in range(blocks * BLOCK + rest)]


async def eventually(ask: Callable[[], Awaitable[T]], fits: Callable[[T], bool]) -> T:
    """Ask again until the answer fits."""
    end = time.monotonic() + DEADLINE_S
    while not fits(answer := await ask()):
        assert time.monotonic() < end, f"still not so after {DEADLINE_S} s: {answer}"
        await asyncio.sleep(0.01)
    return answer


async def requests_in_flight(address: str) -> int:
    async with KvRouterAdminClient(address) as admin:
        return sum(each.load.active_requests for each in (await admin.get_loads()).loads)


async def requests_running(running: Fleet) -> int:
    """What the engines themselves say."""
    total = 0
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        for worker in running.workers.values():
            async with http.get(f"{worker.said['url']}/metrics") as reply:
                text = await reply.text()
            counts = re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (\S+)$", text, re.MULTILINE)
            total += sum(int(float(count)) for count in counts)
    return total


async def assert_nothing_is_left(running: Fleet) -> None:
    """Neither the router nor an engine still has a request."""
    await eventually(lambda: requests_in_flight(running.address), lambda count: count == 0)
    await eventually(lambda: requests_running(running), lambda count: count == 0)
