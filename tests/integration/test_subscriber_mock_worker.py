"""Subscriber and index against the mock worker: what the router predicts is what the engine would hit, block by block."""

import asyncio
import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import zmq.asyncio

from integration.mock_client import complete, fast, http_session
from kvrouter_grpc.config import EventsConfig
from kvrouter_grpc.events.rota import Rota
from kvrouter_grpc.events.subscriber import EventSource, Subscriber
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.mock_worker.block_hash import CacheScope
from kvrouter_grpc.mock_worker.blocks import BlockTable
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.types import Prompt, StreamState, Target

TARGET = Target(1, 0)
CONFIG = EventsConfig(replay_timeout_s=1.0, reconnect_ms=20, reconnect_max_ms=50)


class Follower:
    """An index that follows one rank of a mock worker."""

    def __init__(self, worker: MockWorker, context: zmq.asyncio.Context, *, rank: int = 0, replay: bool = True) -> None:
        self.worker = worker
        self.rank = rank
        self.index = KvIndex(None, self.unexpected_block_size)
        self.index.add(TARGET)
        self.status = self.index.stream(TARGET)
        source = EventSource(
            worker.events_endpoints[rank], worker.replay_endpoints[rank] if replay else None, worker.config.topic
        )
        self.rota = Rota()
        self.subscriber = Subscriber(TARGET, source, self.index, CONFIG, context, rota=self.rota, rng=random.Random(1))

    def unexpected_block_size(self, _: Target, block_size: int) -> None:
        raise AssertionError(f"block size {block_size}")

    async def caught_up(self) -> None:
        """Everything the worker has published is applied and the stream is live."""
        try:
            async with asyncio.timeout(15):
                while not (  # noqa: ASYNC110 - polls what has no event of its own
                    self.status.state is StreamState.LIVE
                    and self.status.last_seq == self.worker.next_seq(self.rank) - 1
                ):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            pytest.fail(f"worker at {self.worker.next_seq(self.rank)}, {self.status}")

    def check(self, prompts: list[tuple[list[int], dict[str, str]]]) -> int:
        """Compare prediction and cache for every prompt; returns the blocks that were predicted."""
        manager = self.worker.block_manager(self.rank)
        total = 0
        for tokens, kwargs in prompts:
            scope = CacheScope(
                lora_id=1 if "lora_name" in kwargs else None,
                lora_name=kwargs.get("lora_name"),
                lora_path="/adapters/adapter" if "lora_name" in kwargs else "",
                cache_salt=kwargs.get("cache_salt"),
            )
            held = manager.find_prefix(BlockTable([*tokens, 0], scope))  # its last token never counts
            seqs = self.index.sequence(Prompt(array("I", tokens), **kwargs))
            (overlap,) = self.index.overlaps(seqs, [TARGET])
            assert overlap.device == held, f"{len(tokens)} tokens, {kwargs}: predicted {overlap.device}, held {held}"
            total += held
        return total


@asynccontextmanager
async def following(worker: MockWorker, **kwargs: Any) -> AsyncIterator[Follower]:
    context = zmq.asyncio.Context()
    try:
        async with asyncio.TaskGroup() as group:
            follower = Follower(worker, context, **kwargs)
            tasks = [group.create_task(follower.rota.run()), group.create_task(follower.subscriber.run())]
            yield follower
            for task in tasks:
                task.cancel()
    finally:
        context.term()


class Workload:
    """Prompts that share prefixes at every depth, some with a salt or an adapter."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seen: list[tuple[list[int], dict[str, str]]] = []

    def prompt(self) -> tuple[list[int], dict[str, str]]:
        rng = self.rng
        if self.seen and rng.random() < 0.7:
            tokens, kwargs = rng.choice(self.seen)
            tokens = tokens[: rng.randrange(len(tokens) + 1)]
        else:
            tokens, kwargs = [], rng.choice([{}, {}, {"cache_salt": "s1"}, {"lora_name": "adapter"}])
        tokens = tokens + [rng.randrange(5, 1000) for _ in range(rng.randrange(1, 120))]
        self.seen.append((tokens, kwargs))
        return tokens, kwargs

    async def run(self, http: aiohttp.ClientSession, worker: MockWorker, requests: int) -> None:
        for _ in range(requests // 4):
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    tokens, kwargs = self.prompt()
                    group.create_task(self.request(http, worker, tokens, kwargs))

    async def request(
        self, http: aiohttp.ClientSession, worker: MockWorker, tokens: list[int], kwargs: dict[str, str]
    ) -> None:
        salt = {"cache_salt": kwargs["cache_salt"]} if "cache_salt" in kwargs else {}
        status, _ = await complete(
            http,
            worker,
            prompt=tokens,
            model=kwargs.get("lora_name", worker.config.model),
            max_tokens=self.rng.randrange(1, 40),
            **salt,
        )
        assert status == 200

    def probes(self) -> list[tuple[list[int], dict[str, str]]]:
        """Prompts that were sent, cut, and under another salt."""
        probes = list(self.seen)
        for tokens, _ in self.seen[::3]:
            probes += [
                (tokens, {}),
                (tokens, {"cache_salt": "s2"}),
                (tokens[: len(tokens) // 2], {"lora_name": "adapter"}),
            ]
        return probes


def engine(**changes: Any) -> MockWorkerConfig:
    return fast(**{"num_blocks": 200, "loras": ("adapter=/adapters/adapter",), **changes})


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with http_session() as session:
        yield session


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"event_format": "array", "replay_frames": 3},
        {"event_format": "batch-map", "hash_format": "bytes"},
        {"block_size": 32},
    ],
    ids=str,
)
async def test_prediction_equals_cache_under_eviction(http: aiohttp.ClientSession, changes: dict) -> None:
    load = Workload(1)
    async with MockWorker(engine(**changes)) as worker, following(worker) as follower:
        for _ in range(3):
            await load.run(http, worker, 40)
            await follower.caught_up()
            assert follower.check(load.probes()) > 50
        assert follower.status.skipped == 0
        assert follower.status.decode_failures == 0


async def test_a_late_subscriber_knows_as_much(http: aiohttp.ClientSession) -> None:
    load = Workload(2)
    async with MockWorker(engine()) as worker:
        await load.run(http, worker, 60)
        async with following(worker) as follower:
            await follower.caught_up()
            assert follower.check(load.probes()) > 50
            assert not follower.status.partial


async def test_lost_batches_are_made_good(http: aiohttp.ClientSession) -> None:
    load = Workload(3)
    async with MockWorker(engine()) as worker, following(worker) as follower:
        for lost in (1, 5, 30):
            await load.run(http, worker, 20)
            worker.drop_events(lost)
            await load.run(http, worker, 40)
            await follower.caught_up()
            assert follower.check(load.probes()) > 50
        assert follower.status.missed == 0
        assert follower.status.gaps >= 1


async def test_restarts_leave_nothing_behind(http: aiohttp.ClientSession) -> None:
    load = Workload(4)
    async with MockWorker(engine()) as worker, following(worker) as follower:
        for _ in range(2):
            await load.run(http, worker, 40)
            await follower.caught_up()
            await worker.restart()
            await follower.caught_up()
            assert follower.check(load.probes()) == 0
            assert follower.index.blocks(TARGET) == 0
        await load.run(http, worker, 40)
        await follower.caught_up()
        assert follower.check(load.probes()) > 50


async def test_a_cache_reset_empties_the_index(http: aiohttp.ClientSession) -> None:
    load = Workload(5)
    async with MockWorker(engine()) as worker, following(worker) as follower:
        await load.run(http, worker, 40)
        async with http.post(f"{worker.url}/reset_prefix_cache") as response:
            assert response.status == 200
        await load.run(http, worker, 4)
        await follower.caught_up()
        assert follower.check(load.probes()) > 0


async def test_ranks_are_followed_apart(http: aiohttp.ClientSession) -> None:
    async with (
        MockWorker(engine(dp_size=2)) as worker,
        following(worker, rank=0) as first,
        following(worker, rank=1) as second,
    ):
        tokens = list(range(100, 180))
        status, _ = await complete(
            http,
            worker,
            headers={"X-data-parallel-rank": "1"},
            prompt=tokens,
            model=worker.config.model,
            max_tokens=1,
        )
        assert status == 200
        await first.caught_up()
        await second.caught_up()
        assert first.check([(tokens, {})]) == 0
        assert second.check([(tokens, {})]) == 5
