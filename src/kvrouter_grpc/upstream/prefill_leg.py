"""The prefill leg of disaggregated serving: one worker computes the prompt, the one that generates fetches its KV.

The prefill worker gets the prompt, is asked for one token and keeps the blocks until they are fetched. It answers with
`kv_transfer_params`, which say where they are; they are passed on as they came. A leg that fails in whatever way leaves
the prompt to the worker that generates, which can always compute it: a prefill pool makes requests faster or does
nothing, it never makes them fail.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import structlog

from kvrouter_grpc.config import LocalPrefill
from kvrouter_grpc.errors import (
    QueueTimeoutError,
    RouterError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from kvrouter_grpc.routing.loads import Lease
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.types import Decision, EngineRequest, Json, Prompt, RoutingRequest, Target, Usage
from kvrouter_grpc.upstream.vllm_http import VllmHttpClient
from kvrouter_grpc.upstream.waiting import booked

NOT_WORTHWHILE = "NOT_WORTHWHILE"
NOT_TRANSFERABLE = "NOT_TRANSFERABLE"
NO_TRANSFER_PARAMS = "NO_TRANSFER_PARAMS"
TRANSFER_FAILED = "TRANSFER_FAILED"

# One token, whatever it is: it is drawn again where the answer is generated. It must end by its length, since an engine
# keeps no blocks of a request that ended by itself.
_ONE_TOKEN: dict[str, Json] = {"max_tokens": 1, "ignore_eos": True, "temperature": 0}
_REMOTE_DECODE: dict[str, Json] = {"do_remote_decode": True, "do_remote_prefill": False}

log = structlog.get_logger(__name__)


class PrefillLeg:
    """Has the prompts of one endpoint computed by the workers of another.

    Attributes:
        outcomes: How often a prompt was computed by the pool ("") and how often where it is decoded, by reason.

    Args:
        pool: The router of the prefill workers.
        local: Which prompts are not worth it; None asks the pool for all.
        timeout_s: Longest leg, and longest wait for one in the pool's queue.
        client: Gives the client of a worker by its id.
        on_failure: Called with each prefill worker that failed.
    """

    def __init__(
        self,
        pool: Router,
        local: LocalPrefill | None,
        timeout_s: float,
        client: Callable[[int], VllmHttpClient],
        on_failure: Callable[[Target, UpstreamError], None],
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._pool = pool
        self._local = local
        self._timeout_s = timeout_s
        self._client = client
        self._on_failure = on_failure

    def begin(self, router: Router, routing: RoutingRequest, request: EngineRequest) -> "Handover | None":
        """Start to follow a request; None when its caller arranges the transfer.

        Args:
            router: Of the endpoint that generates.
            routing: What it is asked. A request that names its prefill worker is always sent there.
            request: What shall be sent to the worker that generates.

        Raises:
            RouterError: Nobody could generate.
        """
        return self._judged(router, routing, request, self.outcomes)

    def preview(self, router: Router, routing: RoutingRequest, request: EngineRequest) -> "Handover | None":
        """Say what `begin` and the prefill would come to; asks no worker, books and counts nothing. As `begin`."""
        handover = self._judged(router, routing, request, Counter())
        if handover is not None and handover.remote:
            try:
                handover.decision = self._pool.best_worker(_in_the_pool(routing))
            except RouterError as error:
                handover.leave(error.reason)
        return handover

    def _judged(
        self, router: Router, routing: RoutingRequest, request: EngineRequest, outcomes: "Counter[str]"
    ) -> "Handover | None":
        if request.kv_transfer_params is not None:
            return None
        handover = Handover(self, routing, request, outcomes)
        if not _transferable(request):
            handover.leave(NOT_TRANSFERABLE)
        elif self._local is not None and routing.hints.prefill_worker_id is None:
            decision = router.best_worker(routing, remember=False)
            if self._local.holds(decision.prompt_tokens - decision.expected_cached_tokens, decision.prompt_tokens):
                handover.leave(NOT_WORTHWHILE)
        return handover

    async def book(self, routing: RoutingRequest) -> Lease:
        """Pick a prefill worker and book the prompt there, when its turn in the pool's queue has come.

        Raises:
            RouterError: Nobody can take it.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await booked(self._pool, _in_the_pool(routing), math.inf)
        except TimeoutError:
            raise QueueTimeoutError(f"no prefill worker took the prompt within {self._timeout_s:g} s") from None

    async def ask(self, lease: Lease, prompt: Prompt, request: EngineRequest) -> dict[str, Json] | None:
        """Have the booked worker compute the prompt; gives its transfer parameters, None when it has none to give.

        Raises:
            RouterError: It failed, refused or took too long.
        """
        target, prediction = lease.decision.target, lease.prediction
        worker = self._pool.workers.get(target.worker_id)
        rank = target.dp_rank if worker is not None and worker.dp_size > 1 else None
        asked = replace(request, params=_ONE_TOKEN, kv_transfer_params=_REMOTE_DECODE)
        params: Json = None
        usage: Usage | None = None
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                aclosing(self._client(target.worker_id).generate(asked, rank)) as answer,
            ):
                async for chunks in answer:
                    self._pool.feedback.first_token(lease)
                    params, usage = chunks[-1].kv_transfer_params, chunks[-1].usage
                    if prediction is not None:
                        prediction.heard(chunks)
            if asked.tells_hits:
                self._pool.feedback.answered(lease, usage.cached_tokens if usage is not None else None)
            if prediction is not None:
                self._pool.feedback.improve(prediction, prompt, lease.decision)
        except UpstreamError as error:
            self._on_failure(target, error)
            raise
        except TimeoutError:
            late = UpstreamTimeoutError(f"no prefill from the worker within {self._timeout_s:g} s")
            self._on_failure(target, late)
            raise late from None
        return params if isinstance(params, dict) and params.get("do_remote_prefill") else None


class Handover:
    """The prefill of one request: asked for, then remote or left to the worker that generates.

    Attributes:
        remote: Whether the worker that generates has nothing to compute.
        reason: Why it has: one of the constants above, or the reason of the error that the leg ended with.
        decision: For the prefill worker; None when none was asked.
    """

    __slots__ = ("_leg", "_outcomes", "_request", "_routing", "_sent", "decision", "reason", "remote")

    def __init__(
        self, leg: PrefillLeg, routing: RoutingRequest, request: EngineRequest, outcomes: "Counter[str]"
    ) -> None:
        self.remote = True
        self.reason = ""
        self.decision: Decision | None = None
        self._leg = leg
        self._outcomes = outcomes
        self._routing = routing
        self._request = request
        self._sent: EngineRequest | None = None  # to the worker that generates, once the prompt is computed

    async def request(self) -> EngineRequest | None:
        """What to send to the worker that generates, after the prefill; cancelling it aborts the prefill.

        Returns:
            None when the prefill failed: that worker was picked for another kind of work, decide again.
        """
        if not self.remote:
            return self._request
        if self._sent is None:
            self._sent = await self._prefilled()
        return self._sent

    def leave(self, reason: str) -> None:
        """Leave the prompt to the worker that generates."""
        self.remote = False
        self.reason = reason
        self._outcomes[reason] += 1

    def take_back(self, error: UpstreamError) -> bool:
        """The worker that generates failed. What was computed for it may be gone with that: leave the prompt to it.

        Returns:
            Whether only the transfer may be at fault, so that the same worker may do with the prompt alone.
        """
        if not self.remote or not error.before_first_token:
            return False
        self._outcomes[""] -= 1
        self._fail(TRANSFER_FAILED, "the worker that generates failed with the computed prompt")
        return isinstance(error, UpstreamUnavailableError)

    async def _prefilled(self) -> EngineRequest | None:
        try:
            with await self._leg.book(self._routing) as lease:
                self.decision = lease.decision
                params = await self._leg.ask(lease, self._routing.prompt, self._request)
        except RouterError as error:
            self._fail(error.reason, error.message)
            return None
        if params is None:
            self._fail(NO_TRANSFER_PARAMS, "the prefill worker runs without a KV connector")
            return None
        self._outcomes[""] += 1
        return replace(self._request, kv_transfer_params=params)

    def _fail(self, reason: str, why: str) -> None:
        self.leave(reason)
        worker = self.decision.worker_name if self.decision is not None else ""
        log.warning("prefill left to the decode worker", prefill_worker=worker, reason=reason, why=why)


def _in_the_pool(routing: RoutingRequest) -> RoutingRequest:
    """What the prefill pool is asked for the same request."""
    hints = routing.hints
    worker_id, dp_rank = hints.prefill_worker_id, hints.prefill_dp_rank
    return routing._replace(hints=replace(hints, worker_id=worker_id, dp_rank=dp_rank, expected_output_tokens=None))


def _transferable(request: EngineRequest) -> bool:
    """Whether the engine can take the computed prompt over: it is fetched once, and its tokens are not looked at."""
    params = request.params
    return params.get("n", 1) == 1 and not params.get("use_beam_search") and params.get("prompt_logprobs") is None
