"""A request booked on a worker that the caller talks to itself."""

import logging
from types import TracebackType
from typing import Self

import grpc

from ._gen import router_pb2, router_pb2_grpc
from .channel import DEFAULT_TIMEOUT_S
from .errors import KvRouterError, rpc_errors
from .replies import WorkerChoice

_log = logging.getLogger("kvrouter_client")

_FREE_TIMEOUT_S = DEFAULT_TIMEOUT_S
"""Deadline of the release, however short the caller's own is: it often follows a deadline that was too short."""


class Reservation:
    """Books a request on the best worker for as long as the block lasts.

        async with router.reserve(prompt) as reservation:
            response = await post(reservation.choice.url, prompt)   # talk to the worker
            await reservation.mark_prefill_complete()               # its first token is here
            await reservation.report_output(tokens)                 # now and then, so many are there

    Attributes:
        request_id: The name of the reservation; worth sending to the worker as `X-Request-Id`.
        choice: The worker, once the block is entered.
    """

    choice: WorkerChoice

    def __init__(
        self,
        stub: "router_pb2_grpc.KvRouterAsyncStub",
        request: router_pb2.BestWorkerIdRequest,
        timeout_s: float,
    ) -> None:
        self._stub = stub
        self._request = request
        self._timeout_s = timeout_s
        self.request_id = request.request_id

    async def __aenter__(self) -> Self:
        """Book.

        Raises:
            KvRouterError: Nothing was booked.
        """
        try:
            with rpc_errors():
                reply = await self._stub.BestWorkerId(self._request, timeout=self._timeout_s)
        except BaseException as error:
            # Whether the router booked is not known when its answer was lost or not waited for. A refusal is
            # an answer, and ALREADY_EXISTS may speak of somebody else's request: nothing to release there.
            if not isinstance(error, KvRouterError) or error.code in _ANSWER_LOST:
                await self._free()
            raise
        self.choice = WorkerChoice.from_proto(reply)
        return self

    async def mark_prefill_complete(self) -> None:
        """Say that the worker sent its first token: the prompt no longer counts as waiting there. Idempotent.

        Raises:
            KvRouterError: NOT_FOUND when the reservation expired.
        """
        request = router_pb2.MarkPrefillCompleteRequest(request_id=self.request_id, endpoint=self._request.endpoint)
        with rpc_errors():
            await self._stub.MarkPrefillComplete(request, timeout=self._timeout_s)

    async def report_output(self, tokens: int) -> None:
        """Say how many tokens of the answer there are: they count as load where the router tracks output blocks.

        Once per block is often enough. Says what `mark_prefill_complete` says, too. Idempotent.

        Args:
            tokens: All of them so far, at least 1.

        Raises:
            KvRouterError: NOT_FOUND when the reservation expired.
        """
        request = router_pb2.ReportOutputRequest(
            request_id=self.request_id, endpoint=self._request.endpoint, output_tokens=tokens
        )
        with rpc_errors():
            await self._stub.ReportOutput(request, timeout=self._timeout_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._free()

    async def _free(self) -> None:
        """Release. A failure is logged, not raised: the work is done, and the booking expires by itself."""
        request = router_pb2.FreeRequest(request_id=self.request_id, endpoint=self._request.endpoint)
        try:
            with rpc_errors():
                await self._stub.Free(request, timeout=_FREE_TIMEOUT_S)
        except KvRouterError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                _log.warning("reservation %s was not freed and will expire: %s", self.request_id, error)


_ANSWER_LOST = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    }
)
