"""What readiness makes of workers that are not as they should be: each fault over real sockets, and its effect."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from integration.stack import FAST, Stack, admin_pb2, router_pb2, running, until
from integration.test_check import complete
from kvrouter_grpc.advice import Effect
from kvrouter_grpc.discovery import readiness
from kvrouter_grpc.events import subscriber
from kvrouter_grpc.mock_worker import MockWorkerConfig

PROMPT = list(range(100, 140))
GONE = "tcp://127.0.0.1:9"


async def serving(stack: Stack) -> bool:
    """What a load balancer is told."""
    reply = await health_pb2_grpc.HealthStub(stack.channel).Check(health_pb2.HealthCheckRequest())
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def eventually(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def faults(stack: Stack, name: str = "a") -> dict[str, Effect]:
    worker = stack.router.workers.named(name)
    return {fault.fault: fault.effect for fault in worker.faults.values()}


async def told(stack: Stack, name: str = "a") -> tuple[list[str], list[str], list[str]]:
    """`degraded` of ListWorkers and of GetLoads, and the findings."""
    listed = await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())
    loads = await stack.admin.GetLoads(admin_pb2.GetLoadsRequest())
    (status,) = [worker for worker in listed.workers if worker.spec.name == name]
    (load,) = [load for load in loads.loads if load.worker_name == name]
    return list(status.degraded), list(load.degraded), list(listed.findings)


@asynccontextmanager
async def http_as_events(**sections: Any) -> AsyncIterator[Stack]:
    """A worker whose entry gives an HTTP port as that of its events."""
    async with running("other", wait=False) as other:
        address = other.workers["other"].url.replace("http", "tcp")
        async with running("a", specs={"a": {"events": address}}, wait=False, **sections) as stack:
            yield stack


def worker(config: MockWorkerConfig, **spec: Any) -> Callable[[], Any]:
    return lambda: running("a", worker=config, specs={"a": spec}, wait=False)


@pytest.mark.parametrize(
    ("start", "fault"),
    [
        (worker(replace(FAST, block_size=32), block_size=16), "configured_block_size"),
        (http_as_events, "not_zeromq"),
        (worker(FAST, events="udp://127.0.0.1:5557"), "no_address"),
    ],
    ids=["block-size", "no-zeromq", "no-address"],
)
async def test_a_wrong_setting_stops_a_rollout(start: Callable[[], Any], fault: str) -> None:
    async with start() as stack:
        await until(lambda: fault in faults(stack), f"{fault} is found")
        worker = stack.router.workers.named("a")
        await until(lambda: worker.facts is not None)
        assert faults(stack)[fault] in (Effect.EXCLUDES, Effect.HOLDS)
        assert not await serving(stack)
        findings = (await stack.admin.ListWorkers(admin_pb2.ListWorkersRequest())).findings
        assert findings[0].startswith("a is misconfigured: " if faults(stack)[fault] is Effect.EXCLUDES else "a: ")


async def test_a_wrong_topic_stops_a_rollout_although_the_router_could_serve() -> None:
    async with running("a", wait=False) as first:
        await complete(first.workers["a"], PROMPT)
        engine = first.workers["a"]
        spec = {"url": engine.url, "topic": "kv@pod-7"}
        async with running("a", specs={"a": spec}, wait=False) as stack:
            await until(lambda: "wrong_topic" in faults(stack), "the replay shows it")
            degraded, in_loads, findings = await told(stack)
            assert degraded == in_loads
            assert findings == [f"a: {degraded[0]}"]
            assert not await serving(stack)


@pytest.mark.parametrize(
    ("config", "spec", "fault"),
    [
        (replace(FAST, prefix_caching=False), {}, "no_prefix_caching"),
        (replace(FAST, kv_events=False), {}, "events_off"),
        (replace(FAST, kv_event_sources=False), {}, "events_nowhere"),
        (FAST, {"events": GONE}, "events_unreached"),
    ],
    ids=["no-prefix-caching", "events-off", "events-nowhere", "unreached"],
)
async def test_what_only_hides_a_cache_degrades(
    config: MockWorkerConfig, spec: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "SETTLE_S", 0.1)
    monkeypatch.setattr(subscriber, "UNREACHED_S", 0.1)
    async with running("a", worker=config, specs={"a": spec}, wait=False) as stack:
        await until(lambda: fault in faults(stack), f"{fault} is found")
        await eventually(lambda: serving(stack))
        assert faults(stack) == {fault: Effect.DEGRADES}
        degraded, in_loads, findings = await told(stack)
        assert degraded == in_loads
        assert findings == [f"a: {degraded[0]}"]
        reply = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT))
        assert reply.worker_name == "a"


async def test_an_engine_without_prefix_caching_is_never_predicted_to_hold_anything() -> None:
    async with running("a", worker=replace(FAST, prefix_caching=False), wait=False) as stack:
        await stack.ready()
        for _ in range(2):
            messages = await stack.generate(PROMPT)
            assert messages[0].routing.expected_cached_tokens == 0


async def test_later_a_wrong_setting_costs_only_its_workers_share() -> None:
    async with running("a") as stack:
        await eventually(lambda: serving(stack))
        spec = admin_pb2.WorkerSpec(
            name="b",
            url=stack.workers["a"].url,
            endpoint=stack.router.endpoint,
            events=stack.workers["a"].url.replace("http", "tcp"),
        )
        await stack.admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(spec=spec))
        await stack.ready("b")
        await until(lambda: faults(stack, "b") == {"not_zeromq": Effect.HOLDS})
        assert await serving(stack)
        names = {
            (await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT))).worker_name
            for _ in range(40)
        }
        assert names == {"a", "b"}


async def test_the_first_readiness_waits_for_what_is_cached_already() -> None:
    async with running("a") as first:
        await first.on("a", PROMPT * 3)
        engine = first.workers["a"]
        async with running("a", specs={"a": {"url": engine.url}}, wait=False) as stack:
            await eventually(lambda: serving(stack))
            reply = await stack.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT * 3))
            assert reply.overlap_blocks == 7


async def test_what_was_wrong_and_is_right_again_is_told_no_more() -> None:
    async with running("a", worker=replace(FAST, prefix_caching=False), wait=False) as stack:
        await until(lambda: "no_prefix_caching" in faults(stack))
        engine = stack.workers["a"]
        engine.config = FAST
        await engine.restart()
        await until(lambda: faults(stack) == {}, "it has come back with prefix caching")
        await stack.ready()
        await stack.on("a", PROMPT)
        assert stack.router.index.blocks(stack.target("a")) > 0
