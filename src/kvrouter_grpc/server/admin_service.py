"""The service KvRouterAdmin: validate, call, convert."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import cast

from kvrouter_grpc._gen import admin_pb2, admin_pb2_grpc, router_pb2
from kvrouter_grpc.discovery.fleet import Fleet
from kvrouter_grpc.errors import OverloadedError
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server import duration
from kvrouter_grpc.server.boundary import Context
from kvrouter_grpc.server.endpoints import Endpoints
from kvrouter_grpc.server.overload import queue_status, read_thresholds, thresholds_message
from kvrouter_grpc.server.remembered import remembered
from kvrouter_grpc.server.reply import explanation_message
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.server.worker_messages import index_stats, read_spec, worker_loads, worker_status
from kvrouter_grpc.snapshots import source
from kvrouter_grpc.types import Explanation, WorkerSpec
from kvrouter_grpc.upstream.relay import Relay

MOST_SNAPSHOTS = 4
"""Streamed at a time: each takes time from decisions."""

CHUNK_BYTES = 1 << 20
"""Of a snapshot in one message: below the 4 MiB that gRPC clients take unless they are told otherwise."""


class AdminService(admin_pb2_grpc.KvRouterAdminServicer):
    """Serves KvRouterAdmin.

    Args:
        routers: Endpoint to router.
        fleet: The workers.
        relay: What forwards to them.
        explain: Says where a request would go, and why.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        fleet: Fleet,
        relay: Relay,
        explain: Callable[[router_pb2.BestWorkerIdRequest], Awaitable[Explanation]],
    ) -> None:
        self._endpoints = Endpoints(routers)
        self._fleet = fleet
        self._relay = relay
        self._explain = explain
        self._snapshots = 0  # under way

    async def ListWorkers(  # noqa: N802 - the names of the rpcs, here and below
        self, request: admin_pb2.ListWorkersRequest, _context: Context
    ) -> admin_pb2.ListWorkersResponse:
        """See the contract."""
        routers = self._endpoints.some(request.endpoint)
        return admin_pb2.ListWorkersResponse(
            workers=[worker_status(view) for router in routers for view in self._fleet.workers(router.endpoint)],
            ready=self._fleet.ready,
            findings=self._fleet.findings(),
        )

    async def RegisterWorker(  # noqa: N802
        self, request: admin_pb2.RegisterWorkerRequest, _context: Context
    ) -> admin_pb2.RegisterWorkerResponse:
        """See the contract."""
        violations = Violations()
        endpoint = self._endpoints.one(request.spec.endpoint).endpoint
        spec = read_spec(request.spec, endpoint, violations)
        ttl_s = duration.read("ttl", request.ttl, violations) if request.HasField("ttl") else None
        violations.raise_if_any()
        return admin_pb2.RegisterWorkerResponse(worker_id=self._fleet.register(cast("WorkerSpec", spec), ttl_s))

    async def RenewWorker(  # noqa: N802
        self, request: admin_pb2.RenewWorkerRequest, _context: Context
    ) -> admin_pb2.RenewWorkerResponse:
        """See the contract."""
        _check_name(request.name)
        response = admin_pb2.RenewWorkerResponse()
        duration.write(response.ttl, self._fleet.renew(request.name))
        return response

    async def DeregisterWorker(  # noqa: N802
        self, request: admin_pb2.DeregisterWorkerRequest, _context: Context
    ) -> admin_pb2.DeregisterWorkerResponse:
        """See the contract."""
        _check_name(request.name)
        self._fleet.deregister(request.name)
        return admin_pb2.DeregisterWorkerResponse()

    async def DrainWorker(  # noqa: N802
        self, request: admin_pb2.DrainWorkerRequest, _context: Context
    ) -> admin_pb2.DrainWorkerResponse:
        """See the contract."""
        _check_name(request.name)
        return admin_pb2.DrainWorkerResponse(active_requests=self._fleet.drain(request.name, request.undo))

    async def GetLoads(  # noqa: N802
        self, request: admin_pb2.GetLoadsRequest, _context: Context
    ) -> admin_pb2.GetLoadsResponse:
        """See the contract."""
        response = admin_pb2.GetLoadsResponse()
        for router in self._endpoints.some(request.endpoint):
            response.loads.extend(worker_loads(self._fleet.workers(router.endpoint), router))
            response.indexes.append(index_stats(router))
            for reason, count in sorted(self._relay.prefills(router.endpoint).items()):
                response.prefills.add(endpoint=router.endpoint, reason=reason, count=count)
            if (queue := queue_status(router)) is not None:
                response.queues.append(queue)
        return response

    async def GetThresholds(  # noqa: N802
        self, request: admin_pb2.GetThresholdsRequest, _context: Context
    ) -> admin_pb2.GetThresholdsResponse:
        """See the contract."""
        routers = self._endpoints.some(request.endpoint)
        return admin_pb2.GetThresholdsResponse(endpoints=map(thresholds_message, routers))

    async def SetThresholds(  # noqa: N802
        self, request: admin_pb2.SetThresholdsRequest, _context: Context
    ) -> admin_pb2.SetThresholdsResponse:
        """See the contract."""
        violations = Violations()
        router = self._endpoints.one(request.endpoint)
        thresholds = read_thresholds(request.thresholds, violations)
        violations.raise_if_any()
        router.set_thresholds(thresholds)
        return admin_pb2.SetThresholdsResponse()

    async def Explain(  # noqa: N802
        self, request: admin_pb2.ExplainRequest, _context: Context
    ) -> admin_pb2.ExplainResponse:
        """See the contract."""
        if request.WhichOneof("decision") == "request":
            explanations = [await self._explain(request.request)]
        else:
            explanations = remembered(self._endpoints.some(request.endpoint), request)
        return admin_pb2.ExplainResponse(decisions=map(explanation_message, explanations))

    async def StreamSnapshot(  # noqa: N802
        self, request: admin_pb2.StreamSnapshotRequest, _context: Context
    ) -> AsyncIterator[admin_pb2.StreamSnapshotResponse]:
        """See the contract."""
        router = self._endpoints.one(request.endpoint)
        if self._snapshots == MOST_SNAPSHOTS:
            raise OverloadedError(f"{MOST_SNAPSHOTS} snapshots are under way already; retry later")
        self._snapshots += 1
        try:
            async with aclosing(source.pieces(router)) as pieces:
                async for piece in pieces:
                    for start in range(0, len(piece), CHUNK_BYTES):
                        yield admin_pb2.StreamSnapshotResponse(data=piece[start : start + CHUNK_BYTES])
        finally:
            self._snapshots -= 1


def _check_name(name: str) -> None:
    violations = Violations()
    if not name:
        violations.add("name", "is empty; name the worker")
    violations.raise_if_any()
