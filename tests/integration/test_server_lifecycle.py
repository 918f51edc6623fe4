"""Binding, options, reflection, stopping."""

import asyncio
import dataclasses
import time

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from integration.server_rig import FAST, Worker, collect, serving, taken_apart, until
from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc, router_pb2, router_pb2_grpc
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.server.admin_service import AdminService
from kvrouter_grpc.server.health import HealthService
from kvrouter_grpc.server.router_service import RouterService
from kvrouter_grpc.server.server import server_options

ROUTER = router_pb2.DESCRIPTOR.services_by_name["KvRouter"]
PROMPT = list(range(1000, 1040))
SLOW = dataclasses.replace(FAST, speedup=1.0, itl_ms=5.0)


def ask(max_tokens, **fields):
    stop = router_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return router_pb2.GenerateRequest(token_ids=PROMPT, stop_conditions=stop, **fields)


async def services(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = await collect(stub.ServerReflectionInfo(iter([request])))
    return {service.name for service in reply.list_services_response.service}


async def test_reflection_gives_the_contract():
    async with serving() as rig:
        assert await services(rig.channel) == {
            "kvrouter.v1.KvRouter",
            "kvrouter.v1.KvRouterAdmin",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        stub = reflection_pb2_grpc.ServerReflectionStub(rig.channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvrouter.v1.KvRouter")
        (reply,) = await collect(stub.ServerReflectionInfo(iter([request])))
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(file)
            for file in reply.file_descriptor_response.file_descriptor_proto
        ]
        names = [method.name for file in files for service in file.service for method in service.method]
        assert names == [method.name for method in ROUTER.methods]


def test_every_rpc_of_the_router_is_served():
    handlers = RouterService(ServerConfig(), {}, relay=None).handlers()
    assert list(handlers) == [method.name for method in ROUTER.methods]
    for method in ROUTER.methods:
        handler = handlers[method.name]
        kinds = (handler.request_streaming, handler.response_streaming)
        assert kinds == (method.client_streaming, method.server_streaming)


@pytest.mark.parametrize(
    ("contract", "servicer"),
    [
        (admin_pb2.DESCRIPTOR.services_by_name["KvRouterAdmin"], AdminService),
        (health_pb2.DESCRIPTOR.services_by_name["Health"], HealthService),
    ],
)
def test_every_rpc_of_the_contract_is_served(contract, servicer):
    assert {method.name for method in contract.methods} <= vars(servicer).keys()


async def test_reflection_can_be_off():
    async with serving(reflection=False) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(rig.channel)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_administration_on_its_own_port_is_on_no_other():
    async with serving(Worker(), admin_listen="127.0.0.1:0") as rig:
        assert rig.addresses.router != rig.addresses.admin
        async with grpc.aio.insecure_channel(rig.addresses.admin) as private:
            listed = await admin_pb2_grpc.KvRouterAdminStub(private).ListWorkers(admin_pb2.ListWorkersRequest())
            assert len(listed.workers) == 1
            check = health_pb2.HealthCheckRequest(service="liveness")
            assert (await health_pb2_grpc.HealthStub(private).Check(check)).status == 1
            assert "kvrouter.v1.KvRouter" not in await services(private)
            best = router_pb2_grpc.KvRouterStub(private).BestWorkerId(router_pb2.BestWorkerIdRequest())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await best
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.admin.ListWorkers(admin_pb2.ListWorkersRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("setting", ["listen", "admin_listen"])
async def test_a_port_in_use_is_a_clear_fault_and_nothing_serves(setting):
    async with serving() as rig:
        with pytest.raises(ConfigError) as caught:
            async with serving(**{setting: rig.addresses.router}):
                raise AssertionError("it started")
        (fault,) = caught.value.faults
        assert fault.startswith(f"server.{setting}: cannot listen on {rig.addresses.router}; is the port in use")


async def test_a_tokenizer_that_is_none_is_a_clear_fault(tmp_path):
    with pytest.raises(ConfigError) as caught:
        async with serving(tokenizer=tmp_path):
            raise AssertionError("it started")
    assert caught.value.faults == [f"server.tokenizer: nothing that transformers reads as a tokenizer is at {tmp_path}"]


async def test_streams_in_flight_finish_within_the_grace():
    async with serving(Worker(SLOW)) as rig:
        call = aiter(rig.stub.Generate(ask(60)))
        messages = [await anext(call)]
        group = asyncio.get_running_loop().create_task(rig.server.stop(30))
        messages += await collect(call)
        await group
        assert messages[-1].finish_reason == router_pb2.FINISH_REASON_LENGTH
        assert rig.in_flight() == 0


async def test_streams_that_take_longer_are_ended_and_freed():
    async with serving(Worker(SLOW)) as rig:
        call = aiter(rig.stub.Generate(ask(5000)))
        await anext(call)
        before = time.monotonic()
        await rig.server.stop(0.3)
        assert 0.25 < time.monotonic() - before < 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: rig.in_flight() == rig.running() == 0, 1.0)


async def test_nothing_new_is_taken_after_the_stop():
    async with serving(Worker()) as rig:
        await rig.server.stop(0)
        await rig.server.stop(0)  # again is fine
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.BestWorkerId(router_pb2.BestWorkerIdRequest(token_ids=PROMPT))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert taken_apart(caught.value).reason == ""  # from gRPC itself: nobody is there


def test_every_limit_reaches_grpc():
    config = ServerConfig(
        max_concurrent_streams=7,
        handshake_timeout_ms=1234,
        max_connection_idle_s=60,
        max_connection_age_s=120,
        max_connection_age_grace_s=240,
        keepalive_time_s=15,
        keepalive_timeout_s=5,
        min_client_ping_interval_s=2,
        max_receive_message_bytes=16 << 20,
    )
    assert dict(server_options(config)) == {
        "grpc.max_concurrent_streams": 7,
        "grpc.server_handshake_timeout_ms": 1234,
        "grpc.max_connection_idle_ms": 60_000,
        "grpc.max_connection_age_ms": 120_000,
        "grpc.max_connection_age_grace_ms": 240_000,
        "grpc.keepalive_time_ms": 15_000,
        "grpc.keepalive_timeout_ms": 5_000,
        "grpc.http2.ping_timeout_ms": 5_000,
        "grpc.http2.min_ping_interval_without_data_ms": 2_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.max_receive_message_length": 16 << 20,
        "grpc.so_reuseport": 0,
    }


def test_limits_that_are_off_are_left_to_grpc():
    options = dict(server_options(ServerConfig(max_connection_idle_s=None, max_connection_age_s=None)))
    assert not {"grpc.max_connection_idle_ms", "grpc.max_connection_age_ms"} & options.keys()
    # The longest durations that the configuration allows fit into gRPC's integers.
    options = dict(server_options(ServerConfig(max_connection_age_s=604_800, max_connection_age_grace_s=604_800)))
    assert options["grpc.max_connection_age_ms"] == 604_800_000
