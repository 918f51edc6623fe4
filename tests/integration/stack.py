"""The real router in this process, over mock workers, with a gRPC channel to it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc, router_pb2, router_pb2_grpc
from kvrouter_grpc.app import App
from kvrouter_grpc.config import Config
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.workers import worker_id_of
from kvrouter_grpc.types import Target, WorkerSpec

ENDPOINT = "test.backend.generate"
FAST = MockWorkerConfig(block_size=16, num_blocks=512, speedup=0)
DEADLINE_S = 15.0


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait until the condition holds."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - what is waited for is state, not an event
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"it never came true: {what or condition}") from None


async def in_service(channel: grpc.aio.Channel) -> None:
    """Wait until load balancers are told that the router takes requests."""
    async with asyncio.timeout(DEADLINE_S):
        async for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return


@dataclass
class Stack:
    """Everything running."""

    app: App
    workers: dict[str, MockWorker]
    channel: grpc.aio.Channel
    stub: "router_pb2_grpc.KvRouterAsyncStub"
    admin: "admin_pb2_grpc.KvRouterAdminAsyncStub"
    answers: list[list[int]] = field(default_factory=list)

    @property
    def router(self) -> Router:
        """The router of the only endpoint."""
        return self.app.routers[ENDPOINT]

    def target(self, name: str, rank: int = 0) -> Target:
        """A worker's rank."""
        return Target(worker_id_of(name), rank)

    async def generate(
        self, tokens: list[int], max_tokens: int = 4, **fields: Any
    ) -> list[router_pb2.GenerateResponse]:
        """Send a request and give all messages of its answer."""
        request = router_pb2.GenerateRequest(
            token_ids=tokens,
            stop_conditions=router_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
            **fields,
        )
        return [message async for message in self.stub.Generate(request)]

    async def on(self, name: str, tokens: list[int], max_tokens: int = 4, rank: int = 0) -> list[int]:
        """Send a request to one worker, wait until its events are applied, give the tokens it generated."""
        worker = self.workers[name]
        pin = router_pb2.RoutingHints(worker_id=worker_id_of(name), dp_rank=rank)
        messages = await self.generate(tokens, max_tokens, routing=pin)
        await self.synced(name, rank)
        assert worker.alive
        return [token for message in messages for token in message.token_ids]

    async def synced(self, name: str, rank: int = 0) -> None:
        """Wait until every event that the worker has published is applied."""
        worker, stream = self.workers[name], self.router.index.stream(self.target(name, rank))
        await until(lambda: stream.last_seq == worker.next_seq(rank) - 1, f"{name} is synced, {stream}")

    async def ready(self, *names: str) -> None:
        """Wait until these workers (all when none are named) may be picked."""
        for name in names or self.workers:
            worker = self.router.workers.named(name)
            assert worker is not None
            await until(lambda worker=worker: worker.state.value == "ready", f"{name} is ready")

    def load(self, name: str, rank: int = 0) -> tuple[int, int, int]:
        """(requests, queued prefill tokens, pinned blocks) of a worker."""
        load = self.router.load(self.target(name, rank))
        return load.active_requests, load.queued_prefill_tokens, load.active_blocks


@asynccontextmanager
async def running(
    *names: str,
    worker: MockWorkerConfig = FAST,
    workers: dict[str, MockWorkerConfig] | None = None,
    specs: dict[str, dict[str, Any]] | None = None,
    wait: bool = True,
    **sections: Any,
) -> AsyncIterator[Stack]:
    """A router over mock workers called `names`.

    Args:
        names: Of the workers.
        worker: What each is.
        workers: Further workers and what they are.
        specs: Further fields of their `WorkerSpec`s, by name.
        wait: Wait until all are ready.
        sections: Of the router's configuration.
    """
    configs = dict.fromkeys(names, worker) | (workers or {})
    async with AsyncExitStack() as stack:
        engines = {name: await stack.enter_async_context(MockWorker(config)) for name, config in configs.items()}
        yield await stack.enter_async_context(serving(engines, specs=specs, wait=wait, **sections))


@asynccontextmanager
async def serving(
    engines: dict[str, MockWorker],
    *,
    specs: dict[str, dict[str, Any]] | None = None,
    wait: bool = True,
    **sections: Any,
) -> AsyncIterator[Stack]:
    """A router over mock workers that run already; for the rest see `running`."""
    async with AsyncExitStack() as stack:
        given = tuple(
            replace(WorkerSpec(name, engine.url, ENDPOINT), **(specs or {}).get(name, {}))
            for name, engine in engines.items()
        )
        config = Config.model_validate(
            {
                "endpoints": (ENDPOINT,),
                "workers": given,
                "server": {"listen": "127.0.0.1:0", "drain_propagation_s": 0, "drain_timeout_s": 1}
                | sections.pop("server", {}),
                "router": {"seed": 1} | sections.pop("router", {}),
                "upstream": {"health_interval_s": 0.05} | sections.pop("upstream", {}),
                **sections,
            }
        )
        app = App(config)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        tasks.create_task(app.run())
        stack.callback(app.stop)
        await app.started.wait()
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(app.address))
        running_stack = Stack(
            app, engines, channel, router_pb2_grpc.KvRouterStub(channel), admin_pb2_grpc.KvRouterAdminStub(channel)
        )
        if wait:
            await running_stack.ready()
            for name, engine in engines.items():
                for rank in range(engine.config.dp_size if engine.config.kv_events else 0):
                    stream = running_stack.router.index.stream(running_stack.target(name, rank))
                    await until(lambda stream=stream: stream.settled, f"{name}: {stream}")
            if engines:
                await in_service(channel)
        yield running_stack


__all__ = ["ENDPOINT", "FAST", "Stack", "admin_pb2", "in_service", "router_pb2", "running", "serving", "until"]
