"""After whatever happened: of 200 random prompts, what the router predicts is what the engine then finds."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from e2e.conftest import Launch
from e2e.engines import FIRST_WORD, VOCABULARY, Engine, EngineOptions, Zygote
from e2e.router import Router
from e2e.waiting import until
from kvrouter_client import KvRouterError, StreamState
from robustness.fault_proxy import CALM, FaultProxy, Faults

pytestmark = pytest.mark.vllm

PROBES = 200
CLIENTS = 6
LONGEST = 18  # blocks of a prompt
WHILE_S = 1.5
FROZEN_S = 4.0
STEP = 32  # tokens that a slow engine computes at once: a batch of events per block
SLOW = EngineOptions(block_size=STEP, blocks=256, lora=False, tokens_per_step=STEP)
CUT_OFF = 9_000  # batches
RING = 100
ROLLED = 10
LOSSY = Faults(drop=1 / 16)
"""What vLLM up to 0.32 loses of a long answer, whose socket holds a thousand messages; here it does so in every run."""

RESTORED_S = 60.0

Start = Callable[[EngineOptions], Engine]


class Traffic:
    """Growing conversations, and the question what is left of them in the caches.

    Attributes:
        spoken: What was said, by the engine that answered.
    """

    def __init__(self, router: Router, engines: list[Engine], seed: str) -> None:
        self.router = router
        self.engines = engines
        self.size = engines[0].block_size
        self.spoken: dict[str, list[list[int]]] = {engine.name: [] for engine in engines}
        self.failures = 0
        self._random = random.Random(seed)

    def fresh(self, length: int) -> list[int]:
        """Words that nobody has said."""
        return self._random.choices(range(FIRST_WORD, VOCABULARY), k=length)

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Requests to whichever engine the router picks, for as long as the block lasts."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(self._talk(stop))
            try:
                yield
            finally:
                stop.set()

    async def _talk(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            everything = [said for histories in self.spoken.values() for said in histories[-20:]]
            base = self._random.choice(everything) if everything and self._random.random() < 0.6 else []
            asked = base[: self._random.randrange(len(base) + 1)][: (LONGEST - 4) * self.size]
            asked = asked + self.fresh(self._random.randrange(1, 3 * self.size))
            try:
                reply = await self.router.generate(asked, self._random.randrange(1, self.size))
            except KvRouterError:  # the engine was killed under it, or there is none
                self.failures += 1
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.05)
            else:
                self.spoken[reply.routing.worker_name].append(asked + reply.token_ids)

    async def prove(self, engine: Engine) -> None:
        """Ask an engine for prompts it may hold in part, one after the other, and compare.

        Every probe ends with a block that has to be computed, so the engine says something after each, and how many
        batches that are is known.
        """
        router, size = self.router, self.size
        await router.settle(engine)
        pin = await router.pin(engine)
        last = (await router.event_stream(engine)).last_seq
        last = -1 if last is None else last
        hits = 0
        for number in range(PROBES):
            base = self._random.choice(self.spoken[engine.name][-30:])
            whole = min(len(base) // size, LONGEST)
            asked = base[: self._random.randrange(whole + 1) * size]
            asked += self.fresh(size * self._random.choice([0, 1, 2]) if asked else size)
            reply = await router.generate(asked, routing=pin)
            found = reply.usage.cached_tokens or 0
            foretold = reply.routing.expected_cached_tokens
            assert foretold == found, f"probe {number}, {len(asked)} tokens: {foretold} foretold, {found} found"
            hits += found > 0
            self.spoken[engine.name].append(asked)
            last += -(-(len(asked) - found) // engine.options.tokens_per_step)

            async def told(last: int = last) -> bool:
                said = (await router.event_stream(engine)).last_seq
                return said is not None and said >= last

            await until(told, f"batch {last} of {engine.name}")
        await router.settle(engine)
        assert (await router.event_stream(engine)).last_seq == last
        assert hits > PROBES // 4, "the probes must be of what was cached"


@pytest.fixture
def traffic(fleet: list[Engine], router: Router, request: pytest.FixtureRequest) -> Traffic:
    """Traffic over the fleet."""
    return Traffic(router, fleet, request.node.nodeid)


async def test_killed_and_restarted_under_load(fleet: list[Engine], traffic: Traffic) -> None:
    victim, other = fleet
    async with traffic.going_on():
        await asyncio.sleep(WHILE_S)
        try:
            await asyncio.to_thread(victim.kill)
            await asyncio.sleep(WHILE_S)
        finally:
            await victim.restart()
        traffic.spoken[victim.name].clear()
        await until(lambda: spoken(traffic, victim), "the restarted engine is used again")
        await asyncio.sleep(WHILE_S)
    assert (await traffic.router.event_stream(victim)).restarts == 1
    for engine in (victim, other):
        await traffic.prove(engine)


async def test_stopped_and_continued_under_load(fleet: list[Engine], traffic: Traffic) -> None:
    """SIGSTOP: nobody answers, no connection closes. It is the same process afterwards, with the same cache."""
    victim, other = fleet
    async with traffic.going_on():
        await asyncio.sleep(WHILE_S)
        await asyncio.to_thread(victim.freeze)
        try:
            await asyncio.sleep(FROZEN_S)
        finally:
            await asyncio.to_thread(victim.thaw)
        said = len(traffic.spoken[victim.name])
        await until(lambda: spoken(traffic, victim, said), "the engine is used again")
        await asyncio.sleep(WHILE_S)
    assert (await traffic.router.event_stream(victim)).restarts == 0
    for engine in (victim, other):
        await traffic.prove(engine)


async def test_a_cache_dropped_amid_traffic(fleet: list[Engine], traffic: Traffic) -> None:
    """vLLM drops its cache only while no request holds a block, and says so with its next step."""
    engine = fleet[0]
    async with traffic.going_on():
        await asyncio.sleep(WHILE_S)
    await engine.drop_cache()
    async with traffic.going_on():
        await asyncio.sleep(WHILE_S)
    for each in fleet:
        await traffic.prove(each)


@pytest.mark.parametrize("snapshots", [False, True], ids=["cold", "from-a-snapshot"])
async def test_a_router_that_was_away(
    fleet: list[Engine], launch: Launch, tmp_path: Path, request: pytest.FixtureRequest, snapshots: bool
) -> None:
    flags = ["--router-snapshot-dir", str(tmp_path)] if snapshots else []
    async with launch(fleet, flags) as first:
        await first.settle()
        traffic = Traffic(first, fleet, request.node.nodeid)
        async with traffic.going_on():
            await asyncio.sleep(WHILE_S)
        await first.settle()
    assert bool(await asyncio.to_thread(os.listdir, tmp_path)) == snapshots, "one is written at the end"
    for engine in fleet:
        for _ in range(5):
            alone = traffic.fresh(5 * engine.block_size)
            await engine.generate(alone)
            traffic.spoken[engine.name].append(alone)
    async with launch(fleet, flags) as second:
        traffic.router = second
        await second.settle()
        for engine in fleet:
            stream = await second.event_stream(engine)
            assert stream.last_seq is not None
            assert (stream.batches <= stream.last_seq // 2) == snapshots, "a snapshot makes up for most of the replay"
            await traffic.prove(engine)


@pytest.fixture
async def start(zygote: Callable[[str], Zygote], logs: Path) -> AsyncIterator[Start]:
    """Starts an engine for one test."""
    engines: list[Engine] = []
    mother = zygote("0.32.0")

    def start(options: EngineOptions) -> Engine:
        engine = Engine(mother, "slow", options, logs / "engine-slow.log")
        engines.append(engine)
        engine.start()
        engine.wait_ready()
        return engine

    yield start
    for engine in engines:
        engine.kill()


async def work(engine: Engine, traffic: Traffic, batches: int) -> None:
    """Let an engine publish so many batches, past the router."""
    asked = [traffic.fresh(LONGEST * STEP) for _ in range(-(-batches // LONGEST))]
    several = asyncio.Semaphore(CLIENTS)

    async def one(tokens: list[int]) -> None:
        async with several:
            await engine.generate(tokens)

    async with asyncio.TaskGroup() as tasks:
        for tokens in asked:
            tasks.create_task(one(tokens))
    traffic.spoken[engine.name] += asked


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        pytest.param(SLOW, CUT_OFF, id="9000-batches"),
        pytest.param(SLOW.having(blocks=64, ring=RING), ROLLED * RING, id="a-ring-rolled-ten-times"),
    ],
)
async def test_a_subscriber_that_was_cut_off(
    start: Start, launch: Launch, request: pytest.FixtureRequest, options: EngineOptions, batches: int
) -> None:
    """The engine works on meanwhile. What its ring no longer has nobody can tell, but what is told is true."""
    engine = await asyncio.to_thread(start, options)
    with FaultProxy(engine.events, engine.replay) as proxy:
        async with launch([engine], ["--events-reconnect-max-ms", "1000"], proxies={engine.name: proxy}) as router:
            traffic = Traffic(router, [engine], request.node.nodeid)
            async with traffic.going_on():
                await asyncio.sleep(WHILE_S)
            await traffic.prove(engine)

            await asyncio.to_thread(proxy.cut)
            await work(engine, traffic, batches)
            last = await engine.last_seq()
            proxy.disturb(CALM, LOSSY)
            await asyncio.to_thread(proxy.restore)

            async def exact() -> bool:
                stream = await router.event_stream(engine)
                return stream.state is StreamState.LIVE and stream.last_seq == last

            await until(exact, "the stream is live again", RESTORED_S)
            stream = await router.event_stream(engine)
            assert (stream.partial, stream.missed) == (batches > options.ring, 0)
            assert proxy.replays_beyond_pace() < 2.1
            await traffic.prove(engine)


async def spoken(traffic: Traffic, engine: Engine, before: int = 0) -> bool:
    """Whether an engine has answered since."""
    return len(traffic.spoken[engine.name]) > before
