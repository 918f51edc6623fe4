"""What workers say of themselves over /metrics: queues, cache hits, and that they are another process now."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import aiohttp
from aiohttp import web

from integration.stack import ENDPOINT, FAST, admin_pb2, router_pb2, running, until
from kvrouter_grpc.mock_worker import MockWorker
from kvrouter_grpc.types import EngineReport

POLL = {"metrics_interval_s": 0.05}


def words(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(300, 20_000) for _ in range(count)]


async def loads(stack):
    reply = await stack.admin.GetLoads(admin_pb2.GetLoadsRequest(endpoint=ENDPOINT))
    return {(load.worker_name, load.dp_rank): load for load in reply.loads}


async def test_every_rank_is_asked_for_its_queues_and_hits():
    ranks = replace(FAST, dp_size=2, speedup=1.0, itl_ms=20, max_num_seqs=1)
    async with running("a", worker=ranks, upstream=POLL) as stack:
        await until(lambda: stack.router.feedback.engine_report(stack.target("a", 1)), "both ranks report")
        pin = router_pb2.RoutingHints(worker_id=stack.target("a").worker_id, dp_rank=1)
        async with asyncio.TaskGroup() as group:
            for seed in (1, 2):
                group.create_task(stack.generate(words(seed, 64), 30, routing=pin))
            report = lambda: stack.router.feedback.engine_report(stack.target("a", 1))  # noqa: E731
            await until(lambda: report().running == 1 and report().waiting == 1, "one runs and one waits")
            assert stack.router.feedback.engine_report(stack.target("a", 0))[:2] == (0, 0)
            engine = (await loads(stack))["a", 1].engine
            assert (engine.running, engine.waiting) == (1, 1)
            assert 0 < engine.kv_usage < 1
        await stack.generate(words(1, 64), 1, routing=pin)  # three blocks of it are cached
        await until(lambda: report().prefix_hits == 48 and report().running == 0, "the hits are reported")
        assert report().prefix_queries == 3 * 64
        engine = (await loads(stack))["a", 1].engine
        assert (engine.prefix_queries, engine.prefix_hits) == (192, 48)


async def test_without_polling_nothing_is_reported():
    async with running("a", upstream={"metrics_interval_s": 0}) as stack:
        await stack.on("a", words(1, 64))
        assert stack.router.feedback.engine_report(stack.target("a")) is None
        assert not (await loads(stack))["a", 0].HasField("engine")


@dataclass
class Surface:
    """An HTTP surface that says what it is told to, beside the events of a real engine."""

    url: str = ""
    started_at: float = 1000.0
    status: int = 200
    polls: int = 0


@asynccontextmanager
async def surface() -> AsyncIterator[Surface]:
    told = Surface()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "mock"}]})
        if request.path != "/metrics":
            return web.Response(status=200 if request.path == "/health" else 404)
        told.polls += 1
        page = (
            f"process_start_time_seconds {told.started_at}\nvllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
        )
        return web.Response(text=page, status=told.status)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        told.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield told
    finally:
        await runner.cleanup()


async def prompted(engine: MockWorker, tokens: list[int]) -> None:
    async with aiohttp.ClientSession() as session:
        body = {"model": "mock", "prompt": tokens, "max_tokens": 1}
        async with session.post(f"{engine.url}/v1/completions", json=body) as response:
            assert response.status == 200


async def test_another_start_time_is_another_process_however_healthy_it_looks():
    async with surface() as told, MockWorker(FAST) as engine, running("a", upstream=POLL) as stack:
        spec = admin_pb2.WorkerSpec(name="x", url=told.url, events=engine.events_endpoints[0])
        await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec))
        await stack.ready("x")
        target = stack.target("x")
        stream = stack.router.index.stream(target)
        await until(lambda: stream.detail == "connected, and nothing heard yet", f"connected: {stream}")
        await prompted(engine, words(1, 64))
        await until(lambda: stack.router.index.blocks(target) == 4, "its blocks are known")
        told.status = 500  # a poll that fails tells nothing
        told.started_at = 2000.0
        seen = told.polls
        await until(lambda: told.polls > seen + 2, "polled again")
        assert (stream.restarts, stack.router.index.blocks(target)) == (0, 4)
        told.status = 200
        await until(lambda: stack.router.index.blocks(target) == 0, "what the process before held is forgotten")
        await until(lambda: stream.restarts == 1, "counted once")
        worker = stack.router.workers.named("x")
        await until(lambda: worker.facts.process_start_time == 2000.0, "it was asked again what it is")
        await prompted(engine, words(2, 64))
        await until(lambda: stack.router.index.blocks(target) == 4, "followed on")
        assert stream.restarts == 1
        await stack.admin.DeregisterWorker(admin_pb2.DeregisterWorkerRequest(name="x"))
        assert stack.router.feedback.engine_report(target) is None
        stack.router.feedback.engine_reported(target, EngineReport(1, 1))
        assert stack.router.feedback.engine_report(target) is None
