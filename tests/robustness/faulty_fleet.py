"""Mock workers behind fault proxies, the router as a program of its own, traffic, and the question whether it is right."""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc, router_pb2, router_pb2_grpc
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.mock_worker.block_hash import CacheScope
from kvrouter_grpc.mock_worker.blocks import BlockTable
from kvrouter_grpc.routing.workers import worker_id_of
from programs import ENDPOINT, Program, environment, program, wait_until_ready
from robustness.fault_proxy import FaultProxy, Faults

WORKER = MockWorkerConfig(block_size=16, num_blocks=256, speedup=0.0, vocab_size=1024)
LONGEST = 120  # tokens that a turn adds to its conversation
CONTEXT = 1000
REMEMBERED = 200  # prompts that are asked for afterwards, per worker
PAUSE_S = 0.02  # between two requests of a client
CLIENTS = 4
CLOCK = Path(__file__).with_name("decision_clock.py")


@dataclass
class Wire:
    """One worker and the way to it."""

    name: str
    worker: MockWorker
    proxy: FaultProxy
    sent: list[list[int]] = field(default_factory=list)

    def held(self, tokens: list[int]) -> int:
        """Leading blocks of a prompt that the engine has in its cache, all of it included."""
        return self.worker.block_manager().find_prefix(BlockTable([*tokens, 0], CacheScope()))


class FaultyFleet:
    """Everything running.

    Args:
        wires: The workers.
        flags: Arguments of the router.
        seed: Of the traffic.

    Attributes:
        router: The program that runs now.
        requests: Sent so far.
        failures: Of these, that ended with an error.
    """

    router: Program

    def __init__(self, wires: list[Wire], flags: Sequence[str], seed: int) -> None:
        self.wires = wires
        self.requests = 0
        self.failures = 0
        self._flags = list(flags)
        self._rng = random.Random(seed)
        self._running = AsyncExitStack()

    async def start_router(self) -> None:
        """Start it and wait until it is ready."""
        self.router = await asyncio.to_thread(self._running.enter_context, program(self._flags))
        await asyncio.to_thread(wait_until_ready, self.address)
        channel = await self._running.enter_async_context(grpc.aio.insecure_channel(self.address))
        self.stub = router_pb2_grpc.KvRouterStub(channel)
        self.admin = admin_pb2_grpc.KvRouterAdminStub(channel)

    async def stop_router(self) -> None:
        """End it in good order; the workers go on."""
        await self._running.aclose()
        self._running = AsyncExitStack()

    @property
    def address(self) -> str:
        """Of the router."""
        address: str = self.router.said["address"]
        return address

    def disturb(self, live: Faults, answers: Faults | None = None) -> None:
        """Let faults happen on every wire."""
        for wire in self.wires:
            wire.proxy.disturb(live, answers)

    def calm(self) -> None:
        """No more faults."""
        for wire in self.wires:
            wire.proxy.calm()

    @asynccontextmanager
    async def traffic(self) -> AsyncIterator[None]:
        """Growing conversations on every worker for as long as the block lasts; all of them are answered then."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for wire in self.wires:
                for _ in range(CLIENTS):
                    tasks.create_task(self._talk(wire, stop))
            try:
                yield
            finally:
                stop.set()

    async def _talk(self, wire: Wire, stop: asyncio.Event) -> None:
        rng = self._rng
        pin = router_pb2.RoutingHints(worker_id=worker_id_of(wire.name), dp_rank=0)
        while not stop.is_set():
            base = rng.choice(wire.sent) if wire.sent and rng.random() < 0.7 else []
            tokens = base[: rng.randrange(len(base) + 1)][:CONTEXT]
            tokens = tokens + rng.choices(range(300, 1000), k=rng.randrange(1, LONGEST))
            limits = router_pb2.StopConditions(max_tokens=rng.randrange(1, 40), ignore_eos=True)
            request = router_pb2.GenerateRequest(token_ids=tokens, stop_conditions=limits, routing=pin)
            wire.sent.append(tokens)
            del wire.sent[:-REMEMBERED]
            self.requests += 1
            try:
                async for _ in self.stub.Generate(request):
                    pass
            except grpc.aio.AioRpcError:  # a worker that is killed
                self.failures += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), PAUSE_S)

    # --- what came of it ------------------------------------------------------------------------------------------

    async def wrong(self, wire: Wire) -> str:
        """The first prompt of which the router says something else than the engine; "" when there is none."""
        for tokens in wire.sent:
            for asked in (tokens, tokens[: len(tokens) // 2 + 1]):
                reply = await self.stub.GetOverlapScores(router_pb2.GetOverlapScoresRequest(token_ids=asked))
                scores = {score.worker_name: score.device_blocks for score in reply.workers}
                if scores.get(wire.name) != (held := wire.held(asked)):
                    return f"{wire.name}, {len(asked)} tokens: {scores.get(wire.name)} instead of {held}"
        return ""

    async def exact(self, within_s: float) -> float:
        """Wait until the index is what the engines hold.

        Returns:
            Seconds until it was, and was found to be.

        Raises:
            AssertionError: It was not in time; says what is wrong and what the router thinks of its streams.
        """
        began = time.monotonic()
        for wire in self.wires:
            while fault := await self.wrong(wire):
                if time.monotonic() - began > within_s:
                    raise AssertionError(f"not exact within {within_s:g} s: {fault}\n{await self.streams()}")
                await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def streams(self) -> dict[str, Any]:
        """The event stream of every worker as the router sees it."""
        reply = await self.admin.ListWorkers(admin_pb2.ListWorkersRequest())
        return {worker.spec.name: worker.streams[0] for worker in reply.workers}

    def rss(self) -> int:
        """Bytes of memory that the router has."""
        pages = Path(f"/proc/{self.router.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    def waited_s(self) -> float:
        """Seconds for which the router's main thread was ready to run and had no CPU, since its start."""
        _, waited_ns, _ = Path(f"/proc/{self.router.process.pid}/schedstat").read_text().split()
        return int(waited_ns) / 1e9


@asynccontextmanager
async def decisions(address: str) -> AsyncIterator[dict[str, Any]]:
    """Ask for decisions while the block lasts; the figures of `decision_clock.py` are there when it is over."""
    clock = await asyncio.create_subprocess_exec(
        sys.executable, str(CLOCK), address, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert clock.stdin is not None
    assert clock.stdout is not None
    found: dict[str, Any] = {}
    try:
        await clock.stdout.readline()
        yield found
        clock.stdin.close()
        found.update(json.loads(await clock.stdout.readline()))
    finally:
        if clock.returncode is None and not found:
            clock.kill()
        await clock.wait()


@asynccontextmanager
async def faulty_fleet(
    size: int, *arguments: str, worker: MockWorkerConfig = WORKER, seed: int = 0
) -> AsyncIterator[FaultyFleet]:
    """Workers called w0, w1, ..., each behind a proxy, and a router that knows them.

    Args:
        size: Number of workers.
        *arguments: Further arguments of the router.
        worker: What each is.
        seed: Of the faults and the traffic.
    """
    flags = ["serve", "--endpoint", ENDPOINT, "--listen", "127.0.0.1:0", "--router-seed", "1"]
    flags += ["--router-min-initial-workers", str(size), *arguments]
    async with AsyncExitStack() as stack:
        wires = []
        for number in range(size):
            engine = await stack.enter_async_context(MockWorker(worker))
            (events,), (replay,) = engine.events_endpoints, engine.replay_endpoints
            proxy = stack.enter_context(FaultProxy(events, replay, seed=seed * size + number))
            wires.append(Wire(f"w{number}", engine, proxy))
            flags += ["--worker", f"name=w{number},url={engine.url},events={proxy.events},replay={proxy.replay}"]
        fleet = FaultyFleet(wires, flags, seed)
        stack.push_async_callback(fleet.stop_router)
        await fleet.start_router()
        yield fleet
