"""The answer of a decode engine, whose prompt somebody else may have computed."""

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

from .engine import Json
from .prefill import Prefill


class Answer:
    """An asynchronous iterator over the events of the decode engine's stream, as vLLM sends them.

    Leaving `async with`, `aclose()` and cancelling the task that waits for an event end it at once: both engines drop
    the request and the router's booking is freed.

    Attributes:
        request_id: Name of the request on both engines (`X-Request-Id`) and of the reservation.
        prefill: Who computed the prompt; None before the first event.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.prefill: Prefill | None = None
        self.events: AsyncGenerator[Json, None]  # set by whoever makes it

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Json:
        """The next event.

        Raises:
            EngineError: The decode engine refused or failed.
            StopAsyncIteration: The answer is complete.
        """
        return await anext(self.events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End it. Closing twice is harmless."""
        await self.events.aclose()
