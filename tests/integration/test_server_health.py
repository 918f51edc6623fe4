"""Health over real sockets, with watchers that do not read."""

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from integration.server_rig import serving, until
from kvrouter_grpc.server.server import ROUTER

Check = health_pb2.HealthCheckRequest
SERVING, NOT_SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)


async def check(rig, service=""):
    return (await health_pb2_grpc.HealthStub(rig.channel).Check(Check(service=service))).status


async def test_readiness_is_followed_and_liveness_is_not():
    async with serving() as rig:
        for ready, status in ((None, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
            if ready is not None:
                rig.server.health.set_ready(ready)
            assert [await check(rig, service) for service in ("", ROUTER)] == [status, status]
            assert await check(rig, "liveness") == SERVING


async def test_an_unknown_service_is_not_found():
    async with serving() as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(rig, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_all_services_are_listed():
    async with serving() as rig:
        rig.server.health.set_ready(True)
        reply = await health_pb2_grpc.HealthStub(rig.channel).List(health_pb2.HealthListRequest())
        assert {name: entry.status for name, entry in reply.statuses.items()} == {
            "": SERVING,
            ROUTER: SERVING,
            "liveness": SERVING,
        }


async def test_draining_is_for_good():
    async with serving() as rig:
        rig.server.health.set_ready(True)
        rig.server.health.drain()
        rig.server.health.set_ready(False)
        rig.server.health.set_ready(True)
        assert await check(rig) == NOT_SERVING
        assert await check(rig, "liveness") == SERVING


async def test_a_watcher_hears_every_change_and_the_end():
    async with serving() as rig:
        health = rig.server.health
        watch = aiter(health_pb2_grpc.HealthStub(rig.channel).Watch(Check(service=ROUTER)))
        assert (await anext(watch)).status == NOT_SERVING
        for ready in (True, False, True):
            health.set_ready(ready)
            assert (await anext(watch)).status == (SERVING if ready else NOT_SERVING)
        health.set_ready(True)  # no change, no message
        health.drain()
        assert (await anext(watch)).status == NOT_SERVING
        health.close()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_watcher_of_an_unknown_service_is_told_so():
    async with serving() as rig:
        watch = health_pb2_grpc.HealthStub(rig.channel).Watch(Check(service="nobody"))
        assert (await watch.read()).status == UNKNOWN
        watch.cancel()


async def test_open_watches_do_not_hold_up_the_stop():
    async with serving() as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        watches = [stub.Watch(Check()) for _ in range(20)]
        for watch in watches:
            await watch.read()
        before = time.monotonic()
        await rig.server.stop(30)
        assert time.monotonic() - before < 5
        async with asyncio.timeout(5):
            codes = [await watch.code() for watch in watches]
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}


async def test_a_watcher_that_went_away_leaves_nothing():
    async with serving() as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        await stub.Check(Check())  # whatever runs all the time has started
        before = len(asyncio.all_tasks())
        watch = stub.Watch(Check())
        await watch.read()
        watch.cancel()
        await until(lambda: len(asyncio.all_tasks()) <= before)
