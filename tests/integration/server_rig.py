"""The gRPC server on a free port, in front of real routers, relay and fleet, with mock workers behind them."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import zmq.asyncio
from google.rpc import error_details_pb2, status_pb2

from kvrouter_grpc._gen import admin_pb2_grpc, router_pb2, router_pb2_grpc
from kvrouter_grpc.config import EventsConfig, RouterConfig, ServerConfig, UpstreamConfig
from kvrouter_grpc.discovery.fleet import Fleet
from kvrouter_grpc.discovery.view import WorkerView
from kvrouter_grpc.mock_worker import MockWorker, MockWorkerConfig
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server.server import Addresses, GrpcServer
from kvrouter_grpc.types import Role, StreamState, Target, WorkerSpec, WorkerState
from kvrouter_grpc.upstream.relay import Relay
from kvrouter_grpc.upstream.session import engine_session

ENDPOINT = "dynamo.backend.generate"
BLOCK = 16
FAST = MockWorkerConfig(block_size=BLOCK, speedup=0)


@dataclass(frozen=True)
class Worker:
    """A mock worker as the fleet is told of it."""

    config: MockWorkerConfig = FAST
    name: str = ""  # w0, w1, ... when empty
    endpoint: str = ENDPOINT
    role: Role = Role.BOTH
    taints: frozenset[str] = frozenset()


@dataclass
class Rig:
    """What a test holds in its hands."""

    server: GrpcServer
    addresses: Addresses
    routers: dict[str, Router]
    fleet: Fleet
    relay: Relay
    engines: dict[str, MockWorker]
    channel: grpc.aio.Channel
    stub: Any = field(init=False)
    admin: Any = field(init=False)

    def __post_init__(self):
        self.stub = router_pb2_grpc.KvRouterStub(self.channel)
        self.admin = admin_pb2_grpc.KvRouterAdminStub(self.channel)

    @property
    def router(self) -> Router:
        """The only router."""
        (router,) = self.routers.values()
        return router

    def target(self, name: str, rank: int = 0) -> Target:
        """One rank of a worker."""
        for router in self.routers.values():
            worker = router.workers.named(name)
            if worker is not None:
                return Target(worker.worker_id, rank)
        raise AssertionError(name)

    async def cache(self, name: str, tokens: list[int]) -> None:
        """Run a prompt on a worker and wait until its events told the router."""
        worker_id = self.target(name).worker_id
        request = router_pb2.GenerateRequest(
            token_ids=tokens,
            routing=router_pb2.RoutingHints(worker_id=worker_id),
            stop_conditions=router_pb2.StopConditions(max_tokens=1),
        )
        await collect(self.stub.Generate(request))
        scores = router_pb2.GetOverlapScoresRequest(token_ids=tokens)
        deadline = time.monotonic() + 10
        while True:
            reply = await self.stub.GetOverlapScores(scores)
            if any(w.worker_id == worker_id and w.device_blocks == reply.num_blocks for w in reply.workers):
                return
            assert time.monotonic() < deadline, f"{name} told nothing"

    def in_flight(self) -> int:
        """Leases in force, over all endpoints."""
        return sum(len(router.loads) for router in self.routers.values())

    def running(self) -> int:
        """Requests that the engines have."""
        return sum(
            engine.scheduler.num_running + engine.scheduler.num_waiting
            for worker in self.engines.values()
            if worker.alive
            for engine in worker._life.engines
        )


@asynccontextmanager
async def serving(
    *workers: Worker, endpoints: tuple[str, ...] = (ENDPOINT,), policy: dict[str, Any] | None = None, **server: Any
) -> AsyncIterator[Rig]:
    """A server whose workers are all ready. `server` are settings of ServerConfig."""
    async with AsyncExitStack() as stack:
        engines = {}
        specs = []
        for number, worker in enumerate(workers):
            name = worker.name or f"w{number}"
            engines[name] = engine = await stack.enter_async_context(MockWorker(worker.config))
            specs.append(WorkerSpec(name, engine.url, worker.endpoint, role=worker.role, taints=worker.taints))
        session = await stack.enter_async_context(engine_session())
        context = zmq.asyncio.Context()
        stack.callback(context.destroy, 0)
        config = RouterConfig(**({"seed": 1, "block_size": BLOCK} | (policy or {})))
        routers = {endpoint: Router(endpoint, config) for endpoint in endpoints}
        upstream = UpstreamConfig(health_interval_s=0.1)
        fleet = Fleet(routers, session, context, events=EventsConfig(), upstream=upstream, rng=random.Random(1))
        for spec in specs:
            fleet.configure(spec)
        relay = Relay(fleet.client, upstream, fleet.suspect)
        grpc_server = GrpcServer(ServerConfig(**({"listen": "127.0.0.1:0"} | server)), routers, relay, fleet)
        addresses = await grpc_server.start()
        group = await stack.enter_async_context(asyncio.TaskGroup())
        task = group.create_task(fleet.run())
        stack.callback(task.cancel)
        stack.push_async_callback(grpc_server.stop, 0)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(addresses.router))
        await until(lambda: all(settled(view) for view in fleet.workers()))
        yield Rig(grpc_server, addresses, routers, fleet, relay, engines, channel)


def settled(view: WorkerView) -> bool:
    """Whether a worker may be picked and its events are followed."""
    states = {stream.status.state for stream in view.streams}
    return view.state is WorkerState.READY and states <= {StreamState.LIVE, StreamState.OFF}


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


@dataclass(frozen=True)
class Refusal:
    """A failed call, taken apart."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    fields: dict[str, str]
    retry_s: float | None


async def refusal(call: Awaitable[Any]) -> Refusal:
    """Await a call (or `collect` of a stream) that must fail and take its status apart."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return taken_apart(error)
    raise AssertionError(f"the call succeeded: {answer}")


def taken_apart(error: grpc.aio.AioRpcError) -> Refusal:
    """The status of a failed call with its details."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        if detail.Unpack(retry):
            retry_s = retry.retry_delay.ToTimedelta().total_seconds()
    if details:
        assert status.code == error.code().value[0]
        assert status.message == error.details()
        assert info.domain == "kvrouter.dev"
    fields = {violation.field: violation.description for violation in request.field_violations}
    return Refusal(error.code(), error.details() or "", info.reason, dict(info.metadata), fields, retry_s)


async def collect(call: Any) -> list[Any]:
    """All messages of a stream."""
    return [message async for message in call]
