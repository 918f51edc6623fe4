"""`grpc.health.v1`, without locks: a watcher that does not read holds up nobody but itself."""

import asyncio
from collections.abc import AsyncGenerator, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrouter_grpc.server.boundary import Context

LIVENESS = "liveness"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it comes without types
    """Readiness under "" and the names of the services, liveness under `liveness`.

    `liveness` is SERVING for as long as the process can answer at all: a router that waits for workers must
    not be restarted for that.

    Args:
        services: Full names of the services that follow readiness.
    """

    def __init__(self, *services: str) -> None:
        self._services = ("", *services)
        self._ready = False
        self._draining = False
        self._closed = False
        self._changed = asyncio.Event()  # replaced with every change, so that each watcher wakes once per change

    @property
    def ready(self) -> bool:
        """Whether the services are reported as SERVING."""
        return self._ready and not self._draining

    def set_ready(self, ready: bool) -> None:
        """Follow the router's readiness; has no effect any more once it drains."""
        if ready != self._ready:
            self._ready = ready
            self._wake()

    def drain(self) -> None:
        """Report NOT_SERVING from now on, so that clients and load balancers go elsewhere."""
        self._draining = True
        self._wake()

    def close(self) -> None:
        """End every Watch: they are open for ever, and a graceful stop would wait for them."""
        self._closed = True
        self._wake()

    async def Check(  # noqa: N802 - the name of the rpc
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Answer with the state of one service; NOT_FOUND for one that is not known."""
        status = self._statuses().get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no health is kept for this service")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self, _request: health_pb2.HealthListRequest, _context: Context
    ) -> health_pb2.HealthListResponse:
        """Answer with the state of every service."""
        response = health_pb2.HealthListResponse()
        for service, status in self._statuses().items():
            response.statuses[service].status = status
        return response

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Send the state of one service now and after each change; a slow reader gets the newest."""
        sent = None
        while not self._closed:
            changed = self._changed
            status = self._statuses().get(request.service, _SERVICE_UNKNOWN)
            if status != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            else:
                await changed.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the router is shutting down")

    def _statuses(self) -> Mapping[str, health_pb2.HealthCheckResponse.ServingStatus]:
        readiness = _SERVING if self.ready else _NOT_SERVING
        return dict.fromkeys(self._services, readiness) | {LIVENESS: _SERVING}

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
