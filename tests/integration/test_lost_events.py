"""Events that are lost for good on a connection that stays: the picture says so, and becomes true again by itself."""

import asyncio
import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from integration.stack import FAST, Stack, admin_pb2, running, until
from kvrouter_grpc.mock_worker import MockWorker
from kvrouter_grpc.mock_worker.block_hash import CacheScope
from kvrouter_grpc.mock_worker.blocks import BlockTable
from kvrouter_grpc.types import Prompt
from robustness.fault_proxy import CALM, FaultProxy, Faults

ROOM = 64
SMALL = replace(FAST, num_blocks=ROOM + 1, buffer_steps=4)
SYSTEM = list(range(300, 348))


@asynccontextmanager
async def behind_a_proxy() -> AsyncIterator[tuple[Stack, FaultProxy]]:
    """A worker with a small cache and a small ring, and the way to its events."""
    async with MockWorker(SMALL) as engine:
        (events,), (replay,) = engine.events_endpoints, engine.replay_endpoints
        with FaultProxy(events, replay) as proxy:
            spec = {"url": engine.url, "events": proxy.events, "replay": proxy.replay}
            async with running("a", specs={"a": spec}) as stack:
                stack.workers["a"] = engine
                yield stack, proxy


class Sessions:
    """Prompts below one system prompt, sent to the only worker."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.prompts: list[list[int]] = []
        self.stored = 0
        self.rng = random.Random(1)

    async def send(self, count: int) -> None:
        for _ in range(count):
            words = [self.rng.randrange(1000, 20_000) for _ in range(16 * self.rng.randint(1, 3) + 1)]
            self.prompts.append(SYSTEM + words)
            self.stored += len(words) // 16
            await self.stack.generate(self.prompts[-1], 1)

    def wrong(self) -> list[tuple[int, int]]:
        """(blocks the index claims, blocks the engine holds) of the prompts of which these differ."""
        index, worker, target = self.stack.router.index, self.stack.workers["a"], self.stack.target("a")
        found = []
        for tokens in self.prompts:
            (overlap,) = index.overlaps(index.sequence(Prompt(array("I", tokens))), [target])
            held = worker.block_manager().find_prefix(BlockTable([*tokens, 0], CacheScope()))
            if overlap.device != held:
                found.append((overlap.device, held))
        return found


async def test_a_ring_that_rolled_over_a_loss_on_a_live_connection() -> None:
    """Nothing restarts and nothing reconnects: within one turnover of the cache the index is the engine's again."""
    async with behind_a_proxy() as (stack, proxy):
        sessions, stream = Sessions(stack), stack.router.index.stream(stack.target("a"))
        await sessions.send(30)
        await stack.synced("a")
        assert sessions.wrong() == []
        proxy.disturb(Faults(drop=1.0), CALM)
        await sessions.send(12)  # three times what the ring holds
        proxy.calm()
        await sessions.send(1)
        await until(lambda: stream.state.value == "stale", "the ring has rolled over the loss")
        assert any(claimed > held for claimed, held in sessions.wrong())
        reply = await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())
        assert "batches are lost" in reply.findings[0]
        assert reply.workers[0].streams[0].freshness < 0.5
        restarts, sessions.stored = stream.restarts, 0
        while stream.state.value != "live":
            await sessions.send(1)
            await stack.synced("a")
            await asyncio.sleep(0)
        assert sessions.stored <= ROOM + 16
        assert (stream.restarts, stream.resyncs, stream.lost, stream.partial) == (restarts, 0, 0, True)
        assert sessions.wrong() == []
        await sessions.send(20)
        await stack.synced("a")
        assert sessions.wrong() == []
        assert (await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers[0].streams[0].freshness == 0.9
