"""The prefill of one prompt: by a worker that the router names, or by the router itself."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp

from kvrouter_client import KvRouterClient, KvRouterError, Reservation, RoutingHints, StopConditions

from .engine import Engine, EngineError, Json

_log = logging.getLogger("kvrouter_prefill")

_REMOTE_DECODE: Json = {"do_remote_decode": True, "do_remote_prefill": False}


class Way(StrEnum):
    """How a prefill worker is reached."""

    RESERVATION = "reservation"  # the router names it and books the prompt; we talk to it, mark and free
    GENERATE = "generate"  # the router talks to it


class Reason(StrEnum):
    """Why a prompt is left to the decode engine."""

    ROUTER = "router"  # it could not be asked, or had no worker
    ENGINE = "engine"  # the prefill worker failed or refused
    TIMEOUT = "timeout"  # it took too long
    NO_TRANSFER_PARAMS = "no_transfer_params"  # the prefill worker has no KV connector
    TRANSFER = "transfer"  # the decode engine could not fetch what was computed


@dataclass(frozen=True, slots=True)
class Prefill:
    """What became of the prefill of one prompt.

    Attributes:
        kv_transfer_params: For the decode engine's request, as the prefill worker gave them; None when the decode
            engine has to compute the prompt itself.
        worker_name: The prefill worker that was asked; "" when none was.
        reason: Why there are no parameters; None when there are.
        detail: The same in words.
    """

    kv_transfer_params: Json | None
    worker_name: str = ""
    reason: Reason | None = None
    detail: str = ""

    @property
    def remote(self) -> bool:
        """Whether a prefill worker computed the prompt."""
        return self.kv_transfer_params is not None


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and what is sent with it, on both legs."""

    token_ids: list[int]
    request_id: str
    model: str = ""
    cache_salt: str = ""
    priority: int | None = None
    routing: RoutingHints | None = None


class PrefillPool:
    """The prefill endpoint of a router.

    Args:
        router: The router.
        endpoint: `namespace.component.endpoint` of the prefill workers.
        way: How they are reached.
        session: For their HTTP connections.
        timeout_s: Longest prefill, queueing included.
    """

    def __init__(
        self, router: KvRouterClient, endpoint: str, way: Way, session: aiohttp.ClientSession, timeout_s: float
    ) -> None:
        self._router = router
        self._endpoint = endpoint
        self._way = way
        self._session = session
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def prefill(self, ask: Ask) -> AsyncGenerator[Prefill, None]:
        """Have the prompt computed; the block is the time for which its blocks are kept on the prefill worker.

        Raises nothing of its own: whatever goes wrong, the prompt is left to the decode engine.
        """
        worker = ""
        async with AsyncExitStack() as booked:
            try:
                async with asyncio.timeout(self._timeout_s):
                    if self._way is Way.GENERATE:
                        worker, params = await self._by_router(ask)
                    else:
                        reservation = await booked.enter_async_context(self._reserve(ask))
                        worker = reservation.choice.worker_name
                        params = await self._by_worker(ask, reservation)
                prefill = _result(worker, params)
            except KvRouterError as error:
                prefill = _left(worker, Reason.ROUTER, str(error))
            except EngineError as error:
                prefill = _left(worker, Reason.ENGINE, str(error))
            except TimeoutError:
                prefill = _left(worker, Reason.TIMEOUT, f"no prefill within {self._timeout_s:g} s")
            if not prefill.remote:
                await booked.aclose()  # nothing is kept there: the next decision need not count it
            yield prefill

    def _reserve(self, ask: Ask) -> Reservation:
        return self._router.reserve(
            ask.token_ids,
            request_id=ask.request_id,
            endpoint=self._endpoint,
            model=ask.model,
            routing=ask.routing,
            cache_salt=ask.cache_salt,
        )

    async def _by_worker(self, ask: Ask, reservation: Reservation) -> Any:
        choice = reservation.choice
        body: Json = {
            "prompt": ask.token_ids,
            "max_tokens": 1,
            "ignore_eos": True,  # a request that ends by itself keeps no blocks
            "stream": False,  # a streamed answer has no transfer parameters
            "kv_transfer_params": _REMOTE_DECODE,
        }
        body |= _common_fields(ask)
        headers = {"X-Request-Id": ask.request_id, "X-data-parallel-rank": str(choice.dp_rank)}
        answer = await Engine(choice.url, self._session, self._timeout_s).whole(body, headers)
        await reservation.mark_prefill_complete()
        return answer.get("kv_transfer_params")

    async def _by_router(self, ask: Ask) -> tuple[str, Any]:
        worker, params = "", None
        stream = self._router.generate(
            ask.token_ids,
            endpoint=self._endpoint,
            request_id=ask.request_id,
            model=ask.model,
            stop_conditions=StopConditions(max_tokens=1, ignore_eos=True),
            routing=ask.routing,
            cache_salt=ask.cache_salt,
            priority=ask.priority,
            kv_transfer_params=_REMOTE_DECODE,
        )
        async with stream:
            async for chunk in stream:
                worker = chunk.routing.worker_name if chunk.routing else worker
                params = chunk.kv_transfer_params or params
        return worker, params


def _common_fields(ask: Ask) -> Json:
    """Fields of both legs' requests that are left out when they are not given."""
    fields: Mapping[str, Any] = {
        "model": ask.model or None,
        "cache_salt": ask.cache_salt or None,
        "priority": ask.priority,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _result(worker: str, params: Any) -> Prefill:
    if isinstance(params, dict) and params.get("do_remote_prefill"):
        return Prefill(params, worker)
    return _left(worker, Reason.NO_TRANSFER_PARAMS, "the prefill worker runs without a KV connector")


def _left(worker: str, reason: Reason, detail: str) -> Prefill:
    _log.warning("prompt left to the decode engine: %s (prefill worker %s): %s", reason, worker or "none", detail)
    return Prefill(None, worker, reason, detail)
