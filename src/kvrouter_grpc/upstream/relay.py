"""A request on its way: booked, sent, streamed back, and sent elsewhere when a worker fails before its first token."""

import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from kvrouter_grpc.config import UpstreamConfig
from kvrouter_grpc.errors import NoWorkersError, OverloadedError, UpstreamError
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.types import Decision, EngineChunk, EngineRequest, RoutingRequest, Target, Usage
from kvrouter_grpc.upstream.prefill_leg import Handover, PrefillLeg
from kvrouter_grpc.upstream.vllm_http import VllmHttpClient
from kvrouter_grpc.upstream.waiting import booked

MOST_VICTIMS = 2
"""Engines that may fail with one request in their hands: it may be what they fail of, and there are others to serve."""


@dataclass(slots=True)
class RelayStep:
    """What arrived together from the engine. The first step of a stream also carries the decision.

    Attributes:
        prefill: Who computed the prompt, where the endpoint has a prefill pool.
    """

    chunks: list[EngineChunk]
    decision: Decision | None = None
    attempts: int = 1
    prefill: Handover | None = None


class Relay:
    """Forwards requests to the workers that a router picks.

    Args:
        client: Gives the client of a worker by its id; raises KeyError when the worker has gone.
        config: Retries and limits.
        on_failure: Called with each target that failed, so that its health is looked at at once.
        legs: Endpoint to what has its prompts computed elsewhere.
    """

    def __init__(
        self,
        client: Callable[[int], VllmHttpClient],
        config: UpstreamConfig,
        on_failure: Callable[[Target, UpstreamError], None],
        legs: Mapping[str, PrefillLeg] | None = None,
    ) -> None:
        self._client = client
        self._config = config
        self._on_failure = on_failure
        self._legs = legs or {}

    def prefills(self, endpoint: str) -> Mapping[str, int]:
        """How often the endpoint's prefill pool computed a prompt (""), and how often why not."""
        leg = self._legs.get(endpoint)
        return {} if leg is None else leg.outcomes

    def preview(self, router: Router, routing: RoutingRequest, request: EngineRequest) -> RelayStep:
        """Say where `generate` would go: a step without chunks or attempts. Sends and books nothing. As `generate`.

        Raises:
            RouterError: Of the decision.
        """
        leg = self._legs.get(router.endpoint)
        prefill = leg.preview(router, routing, request) if leg is not None else None
        prefilled = request.prefilled if prefill is None else prefill.remote
        decision = router.best_worker(routing._replace(prefilled=prefilled))
        return RelayStep([], decision, 0, prefill)

    async def generate(
        self, router: Router, routing: RoutingRequest, request: EngineRequest
    ) -> AsyncGenerator[RelayStep, None]:
        """Route, send and stream. Closing the generator aborts the request in the engine and releases its load.

        Waits in the endpoint's queue while all workers are busy; a request that comes back from a worker has had its
        turn.

        Args:
            router: Decides.
            routing: What it is asked.
            request: What the worker gets.

        Raises:
            RouterError: Of the decision, or of the engine. Before the first token the last failure of up to
                `retries` further workers, of which no more than `MOST_VICTIMS` had begun with the request; a pinned
                one is never sent elsewhere.
        """
        tried: set[Target] = set()
        attempts = victims = 0
        queued_s: float | None = None  # once it has had its turn
        failure: UpstreamError | None = None
        leg = self._legs.get(router.endpoint)
        prefill = leg.begin(router, routing, request) if leg is not None else None
        while True:
            try:
                # Booked before the prefill leg: of requests that come together, the next one sees this one.
                prefilled = request.prefilled if prefill is None else prefill.remote
                routing = routing._replace(prefilled=prefilled, exclude=frozenset(tried))
                if queued_s is None:
                    lease = await booked(router, routing, math.inf)
                    queued_s = lease.decision.queued_s
                else:
                    lease = router.lease(routing, math.inf)
                    lease.decision.queued_s = queued_s
            except (NoWorkersError, OverloadedError):
                if failure is not None:
                    raise failure from None
                raise
            target = lease.decision.target
            delivered = False
            prediction = lease.prediction
            usage: Usage | None = None
            with lease:
                sent = request if prefill is None else await prefill.request()
                if sent is None:
                    continue
                attempts += 1
                if not sent.tells_hits:
                    lease.expectation = None
                try:
                    async with aclosing(self._send(router, sent, target)) as answer:
                        async for chunks in answer:
                            if prediction is not None:
                                prediction.heard(chunks)
                            if lease.prefilling and any(chunk.token_ids or chunk.text for chunk in chunks):
                                router.feedback.first_token(lease)
                            usage = chunks[-1].usage or usage
                            if lease.counts_output:
                                lease.generated(sum(len(chunk.token_ids) for chunk in chunks))
                            if delivered:
                                yield RelayStep(chunks)
                            else:
                                delivered = True
                                yield RelayStep(chunks, lease.decision, attempts, prefill)
                    router.feedback.answered(lease, usage.cached_tokens if usage is not None else None)
                    return
                except UpstreamError as error:
                    self._on_failure(target, error)
                    failure = error
                    if prefill is not None and not delivered and prefill.take_back(error):
                        continue
                    victims += error.had_request
                    final = delivered or not error.before_first_token or routing.hints.worker_id is not None
                    if final or victims >= MOST_VICTIMS or len(tried) >= self._config.retries:
                        raise
                    tried.add(target)
                finally:
                    if prediction is not None:
                        if sent is not request:
                            prediction.cached_tokens = None  # an engine tells what the prefill worker had cached
                        router.feedback.improve(prediction, routing.prompt, lease.decision)

    def _send(self, router: Router, request: EngineRequest, target: Target) -> AsyncGenerator[list[EngineChunk], None]:
        worker = router.workers.get(target.worker_id)
        rank = target.dp_rank if worker is not None and worker.dp_size > 1 else None
        return self._client(target.worker_id).generate(request, rank)
