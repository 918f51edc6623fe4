"""One run of the workload: mock workers, a router over them, and clients that talk to it over gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrouter_grpc._gen import router_pb2, router_pb2_grpc
from kvrouter_grpc.app import App
from kvrouter_grpc.config import Config
from kvrouter_grpc.demo.workload import Conversation, Shape, conversations
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.types import Target, WorkerSpec

ENDPOINT = "demo.backend.generate"
BLOCK_SIZE = 16
READY_TIMEOUT_S = 15.0


@dataclass(slots=True)
class Turn:
    """One request as its client saw it."""

    conversation: str
    number: int
    worker: str
    prompt_tokens: int
    predicted_tokens: int  # what BestWorkerId, asked before, expected to be cached
    decided: router_pb2.BestWorkerIdResponse
    cached_tokens: int = 0  # what the engine reported
    output_tokens: int = 0
    ttft_s: float = 0.0
    text: str = ""
    done: bool = False


@dataclass(slots=True)
class Load:
    """What one worker is doing now."""

    name: str
    cached_blocks: int
    total_blocks: int
    active_requests: int
    queued_tokens: int
    served: int


@dataclass(slots=True)
class Run:
    """Everything seen in one run."""

    title: str
    mode: str
    shape: Shape
    turns: list[Turn] = field(default_factory=list)
    loads: Callable[[], list[Load]] = list
    started: float = 0.0
    seconds: float = 0.0

    @property
    def finished(self) -> list[Turn]:
        """Turns that are over."""
        return [turn for turn in self.turns if turn.done]

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens that the engines found in their caches."""
        turns = self.finished
        return sum(turn.cached_tokens for turn in turns) / max(1, sum(turn.prompt_tokens for turn in turns))

    @property
    def mean_ttft_s(self) -> float:
        """Mean time to the first token, in seconds."""
        turns = self.finished
        return sum(turn.ttft_s for turn in turns) / max(1, len(turns))

    @property
    def p99_ttft_s(self) -> float:
        """99th percentile of the time to the first token, in seconds."""
        times = sorted(turn.ttft_s for turn in self.finished)
        return times[max(0, int(len(times) * 0.99) - 1)] if times else 0.0


async def drive(run: Run, *, workers: int, seed: int) -> None:
    """Start everything, send the workload through, take everything down.

    Args:
        run: Filled as the run goes on.
        workers: Mock workers to start.
        seed: Of the workload and the router.
    """
    async with _fleet(workers) as engines, _router(run, engines, seed) as (app, channel):
        stub = router_pb2_grpc.KvRouterStub(channel)
        run.loads = lambda: _loads(app, run)
        run.started = time.monotonic()
        places = asyncio.Semaphore(run.shape.concurrency)

        async def talk(conversation: Conversation) -> None:
            async with places:
                for number in range(run.shape.turns):
                    await _turn(stub, run, conversation, number)

        async with asyncio.TaskGroup() as group:
            for conversation in conversations(run.shape, seed):
                group.create_task(talk(conversation))
        run.seconds = time.monotonic() - run.started


async def _turn(stub: "router_pb2_grpc.KvRouterAsyncStub", run: Run, conversation: Conversation, number: int) -> None:
    tokens = conversation.ask(number)
    decided = await stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=tokens, include_candidates=True))
    turn = Turn(conversation.name, number, decided.worker_name, len(tokens), decided.expected_cached_tokens, decided)
    run.turns.append(turn)
    sent = time.monotonic()
    answer: list[int] = []
    request = router_pb2.GenerateRequest(
        token_ids=tokens,
        stop_conditions=router_pb2.StopConditions(max_tokens=run.shape.answer_tokens, ignore_eos=True),
        sampling_options=router_pb2.SamplingOptions(temperature=0),
    )
    async for message in stub.Generate(request):
        if message.HasField("routing"):
            turn.worker = message.routing.worker_name
            turn.predicted_tokens = message.routing.expected_cached_tokens
        if message.token_ids and not answer:
            turn.ttft_s = time.monotonic() - sent
        answer += message.token_ids
        turn.text += message.text
        turn.output_tokens = len(answer)
        turn.cached_tokens = max(turn.cached_tokens, message.usage.cached_tokens)
    turn.done = True
    conversation.answered(answer)


def _loads(app: App, run: Run) -> list[Load]:
    router = app.routers[ENDPOINT]
    loads = []
    for worker in router.workers.workers():
        target = Target(worker.worker_id, 0)
        load = router.load(target)
        loads.append(
            Load(
                worker.spec.name,
                router.index.blocks(target),
                worker.spec.total_kv_blocks or 0,
                load.active_requests,
                load.queued_prefill_tokens,
                sum(turn.worker == worker.spec.name for turn in run.turns),
            )
        )
    return loads


@asynccontextmanager
async def _fleet(count: int) -> AsyncIterator[dict[str, MockWorker]]:
    async with AsyncExitStack() as stack:
        engines = {}
        for number in range(count):
            config = MockWorkerConfig(
                model="demo-model",
                block_size=BLOCK_SIZE,
                num_blocks=400,
                prefill_tokens_per_s=6_000,
                itl_ms=4,
                max_num_seqs=16,
                max_num_batched_tokens=2048,
            )
            engines[f"worker-{number}"] = await stack.enter_async_context(MockWorker(config))
        yield engines


@asynccontextmanager
async def _router(run: Run, engines: dict[str, MockWorker], seed: int) -> AsyncIterator[tuple[App, grpc.aio.Channel]]:
    config = Config.model_validate(
        {
            "endpoints": (ENDPOINT,),
            "workers": tuple(WorkerSpec(name, engine.url, ENDPOINT) for name, engine in engines.items()),
            "server": {"listen": "127.0.0.1:0", "drain_propagation_s": 0, "drain_timeout_s": 2},
            "router": {"mode": run.mode, "seed": seed},
        }
    )
    app = App(config)
    async with asyncio.TaskGroup() as group:
        group.create_task(app.run())
        try:
            await app.started.wait()
            async with grpc.aio.insecure_channel(app.address) as channel:
                await _ready(channel)
                yield app, channel
        finally:
            app.stop()


async def _ready(channel: grpc.aio.Channel) -> None:
    """Wait until the router says SERVING, as a load balancer would."""
    stub = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            reply = await stub.Check(health_pb2.HealthCheckRequest(service="kvrouter.v1.KvRouter"))
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return
            await asyncio.sleep(0.05)
