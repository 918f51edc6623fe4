"""The answer of a Generate call, step by step."""

from types import TracebackType
from typing import Self

import grpc.aio

from ._gen import router_pb2
from .errors import rpc_errors
from .replies import GenerateChunk

_Call = grpc.aio.UnaryStreamCall[router_pb2.GenerateRequest, router_pb2.GenerateResponse]


class GenerateStream:
    """An asynchronous iterator of `GenerateChunk`.

    Closing it before its end cancels the call, and with it the request in the engine. That happens on leaving
    `async with`, on `aclose()`, when the task that waits for a chunk is cancelled, and when the stream is
    forgotten.

        async for chunk in router.generate(prompt):
            ...

        async with router.generate(prompt) as stream:  # the same, closed at a known moment even after `break`
            async for chunk in stream:
                ...
    """

    def __init__(self, call: _Call) -> None:
        self._call = call

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerateChunk:
        """The next step.

        Raises:
            KvRouterError: The call failed.
            StopAsyncIteration: The answer is complete, or the stream was closed.
        """
        if self._call.cancelled():
            raise StopAsyncIteration
        with rpc_errors():
            message = await self._call.read()
        if not isinstance(message, router_pb2.GenerateResponse):  # the end of the stream
            raise StopAsyncIteration
        return GenerateChunk.from_proto(message)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is not finished. Never fails; closing twice is harmless."""
        self._call.cancel()

    def __del__(self) -> None:
        # grpc.aio cancels a call that nobody refers to, but while it runs its own tasks do.
        if not self._call.done():
            self._call.cancel()
