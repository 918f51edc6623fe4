"""The administration of a router."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc

from ._gen import admin_pb2, admin_pb2_grpc
from .channel import DEFAULT_TIMEOUT_S, open_channel
from .client import BatchItem, batch_item, put_seconds
from .errors import rpc_errors
from .explanation import Explanation
from .fleet import Fleet, WorkerSpec
from .loads import Loads, Thresholds


class KvRouterAdminClient:
    """Lists and changes the workers of one router, and asks for reasons. The service may have an address of its own.

        async with KvRouterAdminClient("router:50051") as admin:
            for worker in (await admin.list_workers()).workers:
                print(worker.spec.name, worker.state)

    Args:
        address: gRPC target.
        credentials: TLS credentials; None for plain text.
        timeout_s: Deadline of a call, retries included.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._channel = open_channel(address, credentials)
        self._stub: admin_pb2_grpc.KvRouterAdminAsyncStub = admin_pb2_grpc.KvRouterAdminStub(self._channel)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; calls that are still open are cancelled."""
        await self._channel.close()

    async def list_workers(self, endpoint: str = "") -> Fleet:
        """Every worker (of one endpoint) with its health and the state of its event streams.

        Raises:
            KvRouterError: The call failed, as in every method here.
        """
        request = admin_pb2.ListWorkersRequest(endpoint=endpoint)
        with rpc_errors():
            return Fleet.from_proto(await self._stub.ListWorkers(request, timeout=self._timeout_s))

    async def register_worker(self, spec: WorkerSpec, *, ttl_s: float | None = None) -> int:
        """Add a worker, or replace the registration of that name; returns its id.

        Args:
            spec: The worker.
            ttl_s: Seconds after which it goes unless it is renewed, 1 to 86400; it stays when None.
        """
        request = admin_pb2.RegisterWorkerRequest(spec=spec.to_proto())
        if ttl_s is not None:
            put_seconds(request.ttl, ttl_s)
        with rpc_errors():
            return (await self._stub.RegisterWorker(request, timeout=self._timeout_s)).worker_id

    async def renew_worker(self, name: str) -> float:
        """Extend a registration; returns the seconds until it expires."""
        request = admin_pb2.RenewWorkerRequest(name=name)
        with rpc_errors():
            reply = await self._stub.RenewWorker(request, timeout=self._timeout_s)
        return reply.ttl.ToTimedelta().total_seconds()

    async def deregister_worker(self, name: str) -> None:
        """Remove a worker at once. Its streams go on; its cache is forgotten."""
        with rpc_errors():
            await self._stub.DeregisterWorker(admin_pb2.DeregisterWorkerRequest(name=name), timeout=self._timeout_s)

    async def drain_worker(self, name: str, *, undo: bool = False) -> int:
        """Give a worker nothing new (or, with `undo`, take that back); returns the requests it still has."""
        request = admin_pb2.DrainWorkerRequest(name=name, undo=undo)
        with rpc_errors():
            return (await self._stub.DrainWorker(request, timeout=self._timeout_s)).active_requests

    async def get_loads(self, endpoint: str = "") -> Loads:
        """The work booked on every target, and what the index costs."""
        request = admin_pb2.GetLoadsRequest(endpoint=endpoint)
        with rpc_errors():
            return Loads.from_proto(await self._stub.GetLoads(request, timeout=self._timeout_s))

    async def get_thresholds(self, endpoint: str = "") -> dict[str, Thresholds]:
        """Endpoint to the loads above which its workers get nothing new."""
        request = admin_pb2.GetThresholdsRequest(endpoint=endpoint)
        with rpc_errors():
            reply = await self._stub.GetThresholds(request, timeout=self._timeout_s)
        return {each.endpoint: Thresholds.from_proto(each.thresholds) for each in reply.endpoints}

    async def set_thresholds(self, thresholds: Thresholds, endpoint: str = "") -> None:
        """Replace them for one endpoint, until the router ends."""
        request = admin_pb2.SetThresholdsRequest(endpoint=endpoint, thresholds=thresholds.to_proto())
        with rpc_errors():
            await self._stub.SetThresholds(request, timeout=self._timeout_s)

    async def explain(self, request: BatchItem) -> Explanation:
        """Where a request would go now, and why. Nothing is booked or remembered.

        Args:
            request: Its prompt, or the whole request where there is more to say.
        """
        (explanation,) = await self._explain(admin_pb2.ExplainRequest(request=batch_item(request)))
        return explanation

    async def decisions(
        self, request_id: str = "", *, recent: int | None = None, endpoint: str = ""
    ) -> tuple[Explanation, ...]:
        """Decisions that the router remembers, each explained, newest first.

        Args:
            request_id: Those for this request: one per attempt.
            recent: Without an id, so many of the last ones, 1 to 100; one when None.
            endpoint: Only of this one.

        Raises:
            KvRouterError: NOT_FOUND when none is remembered.
        """
        if request_id:
            return await self._explain(admin_pb2.ExplainRequest(request_id=request_id, endpoint=endpoint))
        return await self._explain(admin_pb2.ExplainRequest(recent=recent or 1, endpoint=endpoint))

    async def _explain(self, question: admin_pb2.ExplainRequest) -> tuple[Explanation, ...]:
        with rpc_errors():
            reply = await self._stub.Explain(question, timeout=self._timeout_s)
        return tuple(map(Explanation.from_proto, reply.decisions))

    async def stream_snapshot(self, endpoint: str = "") -> AsyncIterator[bytes]:
        """The index of an endpoint as a snapshot file, piece by piece, for `--router-snapshot-dir`. Has no deadline."""
        call = self._stub.StreamSnapshot(admin_pb2.StreamSnapshotRequest(endpoint=endpoint))
        try:
            with rpc_errors():
                async for piece in call:
                    yield piece.data
        finally:
            call.cancel()
