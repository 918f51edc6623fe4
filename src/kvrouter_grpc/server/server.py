"""The gRPC server: which services listen where, and what a connection may cost."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc, router_pb2
from kvrouter_grpc.config import ServerConfig
from kvrouter_grpc.config.section import split_host_port
from kvrouter_grpc.discovery.fleet import Fleet
from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server.admin_service import AdminService
from kvrouter_grpc.server.boundary import ErrorBoundary
from kvrouter_grpc.server.health import HealthService
from kvrouter_grpc.server.router_service import RouterService
from kvrouter_grpc.server.tokenizer import Tokenizer
from kvrouter_grpc.upstream.relay import Relay

ROUTER = router_pb2.DESCRIPTOR.services_by_name["KvRouter"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["KvRouterAdmin"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

QUEUED_APART = frozenset({f"/{ROUTER}/Generate", f"/{ROUTER}/BestWorkerId", f"/{HEALTH}/Check"})
"""What clients call most, and what decides whether the process lives."""


class Addresses(NamedTuple):
    """Where the services listen, `host:port`; the same unless the administration has its own port."""

    router: str
    admin: str


class GrpcServer:
    """Serves KvRouter, KvRouterAdmin, health and reflection.

    Args:
        config: Addresses and limits.
        routers: Endpoint to router.
        relay: Forwards requests to the workers.
        fleet: The workers.

    Attributes:
        health: The health service; its readiness is the caller's to set.

    Raises:
        ConfigError: The tokenizer cannot be loaded.
    """

    def __init__(self, config: ServerConfig, routers: Mapping[str, Router], relay: Relay, fleet: Fleet) -> None:
        self.health = HealthService(ROUTER)
        self._config = config
        self._tokenizer = None if config.tokenizer is None else Tokenizer(config.tokenizer)
        self._router_service = RouterService(config, routers, relay, self._tokenizer)
        self._admin_service = AdminService(routers, fleet, relay, self._router_service.explain)
        self._servers: list[grpc.aio.Server] = []

    async def start(self) -> Addresses:
        """Bind and serve.

        Raises:
            ConfigError: An address cannot be bound.
        """
        config = self._config
        if config.admin_listen is None:
            public = private = self._server(ROUTER, ADMIN)
        else:
            public, private = self._server(ROUTER), self._server(ADMIN)
        router_address = admin_address = _bind(public, "server.listen", config.listen)
        if config.admin_listen is not None:
            admin_address = _bind(private, "server.admin_listen", config.admin_listen)
        # Both are bound before either serves: a router that cannot be administered must not take requests.
        for server in self._servers:
            await server.start()
        return Addresses(router_address, admin_address)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, give those in flight `grace_s` seconds, then end them. May be called again."""
        self._router_service.drain()
        self.health.close()
        async with asyncio.TaskGroup() as group:
            for server in self._servers:
                group.create_task(server.stop(grace_s))
        if self._tokenizer is not None:
            self._tokenizer.close()

    def _server(self, *services: str) -> grpc.aio.Server:
        server = grpc.aio.server(options=server_options(self._config))
        boundary = ErrorBoundary(server, self._config.write_timeout_s, QUEUED_APART)
        if ROUTER in services:
            boundary.add(ROUTER, self._router_service.handlers())
        if ADMIN in services:
            admin_pb2_grpc.add_KvRouterAdminServicer_to_server(self._admin_service, cast("grpc.aio.Server", boundary))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, boundary)
        if self._config.reflection:
            names = [*services, HEALTH, reflection.SERVICE_NAME]
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
                reflection.aio.ReflectionServicer(names), boundary
            )
        self._servers.append(server)
        return server


def server_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Translate the configuration into gRPC's channel arguments."""
    options = {
        "grpc.max_concurrent_streams": config.max_concurrent_streams,
        "grpc.server_handshake_timeout_ms": config.handshake_timeout_ms,
        "grpc.max_connection_age_grace_ms": _ms(config.max_connection_age_grace_s),
        "grpc.max_receive_message_length": config.max_receive_message_bytes,
        "grpc.keepalive_time_ms": _ms(config.keepalive_time_s),
        "grpc.keepalive_timeout_ms": _ms(config.keepalive_timeout_s),
        # The timeout that really ends a silent connection; keepalive_timeout_ms alone leaves that to a ping
        # timer of a minute.
        "grpc.http2.ping_timeout_ms": _ms(config.keepalive_timeout_s),
        "grpc.http2.min_ping_interval_without_data_ms": _ms(config.min_client_ping_interval_s),
        # Without it a client that keeps an idle connection alive is taken for an attacker after two pings.
        "grpc.keepalive_permit_without_calls": 1,
        # Two routers on one port would share its connections unnoticed.
        "grpc.so_reuseport": 0,
    }
    if config.max_connection_idle_s is not None:
        options["grpc.max_connection_idle_ms"] = _ms(config.max_connection_idle_s)
    if config.max_connection_age_s is not None:
        options["grpc.max_connection_age_ms"] = _ms(config.max_connection_age_s)
    return list(options.items())


def _ms(seconds: float) -> int:
    return min(round(seconds * 1000), 2**31 - 1)


def _bind(server: grpc.aio.Server, setting: str, address: str) -> str:
    host, _ = split_host_port(address)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            [f"{setting}: cannot listen on {address}; is the port in use, or the host not of this machine?"]
        ) from error
    return f"{host}:{port}"
