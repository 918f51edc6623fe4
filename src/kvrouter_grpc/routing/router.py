"""The router of one endpoint: decides where a request goes and books it there, in one synchronous step."""

import random
import time
from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.errors import NotReadyError, UnknownModelError
from kvrouter_grpc.routing import candidates, pick
from kvrouter_grpc.routing.cost import COSTS, Ask, Cost, Row, Weights, cached_tokens, credit_blocks
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.loads import Booking, Lease, LoadTable, TargetLoad
from kvrouter_grpc.routing.workers import Worker, WorkerRegistry
from kvrouter_grpc.types import (
    Candidate,
    Decision,
    Overlap,
    Prompt,
    Role,
    RouterOverride,
    RoutingHints,
    Target,
)


@dataclass(frozen=True, slots=True)
class TargetOverlap:
    """What one target holds of a prompt, and what that is worth to the decision."""

    target: Target
    worker_name: str
    overlap: Overlap
    credit_blocks: float
    freshness: float


@dataclass(frozen=True, slots=True)
class OverlapScores:
    """What every target holds of a prompt, sorted by target."""

    block_size: int
    num_blocks: int
    targets: tuple[TargetOverlap, ...]


class Router:
    """Owns the index, the loads and the workers of one endpoint.

    Args:
        endpoint: `namespace.component.endpoint`.
        config: The policy.
        clock: Monotonic seconds.
        on_worker_change: Called with each worker that was added, changed or removed.
    """

    def __init__(
        self,
        endpoint: str,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_worker_change: Callable[[Worker], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.config = config
        self.workers = WorkerRegistry(on_worker_change)
        self.index = KvIndex(config.block_size, self._block_size_differs)
        self.loads = LoadTable(clock, config.request_expiry_s)
        self._weights = _weights(config)
        self._rng = random.Random(config.seed)
        self._turn = 0  # of round-robin; only what is booked takes a turn

    @property
    def role(self) -> Role:
        """What the endpoint's workers are for; `BOTH` unless all of them agree on something else."""
        roles = {worker.spec.role for worker in self.workers.workers()}
        return roles.pop() if len(roles) == 1 else Role.BOTH

    # --- targets --------------------------------------------------------------------------------------------------

    def add_targets(self, targets: Iterable[Target]) -> None:
        """Start to schedule these ranks."""
        for target in targets:
            self.index.add(target)
            self.loads.add(target)

    def remove_targets(self, targets: Iterable[Target]) -> None:
        """Forget these ranks: what they hold and what they are busy with."""
        for target in targets:
            self.index.remove(target)
            self.loads.remove(target)

    def check_block_size(self, worker: Worker, block_size: int, source: str) -> None:
        """Compare the worker's block size with the router's, which is learned from the first worker if it is open."""
        fault = None
        if not self.index.learn_block_size(block_size):
            fault = (
                f"{worker.spec.name} caches blocks of {block_size} tokens ({source}) but the router hashes blocks of "
                f"{self.index.block_size}: set --router-block-size {block_size}, or start the worker with "
                f"--block-size {self.index.block_size}"
            )
        self.workers.set_fault(worker, "block_size", fault)

    def _block_size_differs(self, target: Target, block_size: int) -> None:
        worker = self.workers.get(target.worker_id)
        if worker is not None:
            self.check_block_size(worker, block_size, "its KV events")

    # --- decisions ------------------------------------------------------------------------------------------------

    def best_worker(
        self,
        prompt: Prompt,
        hints: RoutingHints,
        *,
        model: str = "",
        explain: bool = False,
        exclude: Collection[Target] = (),
    ) -> Decision:
        """Decide where a request would go; changes nothing.

        Args:
            prompt: The prompt and what is folded into its hashes.
            hints: Pins, filters and overrides.
            model: Model or LoRA adapter that the worker must serve; "" for any.
            explain: Fill `Decision.candidates`.
            exclude: Targets that failed this request already.

        Raises:
            RouterError: Nobody can take it; the class and message say why.
        """
        return self._decide(prompt, hints, model, explain, exclude)[0]

    def lease(
        self,
        request_id: str,
        prompt: Prompt,
        hints: RoutingHints,
        *,
        model: str = "",
        ttl_s: float | None = None,
        explain: bool = False,
        exclude: Collection[Target] = (),
    ) -> Lease:
        """Decide and book in one step. Arguments and errors as `best_worker`.

        Args:
            request_id: Name of the booking.
            ttl_s: Its life in seconds if nobody releases it; None for the configured one.

        Raises:
            DuplicateRequestError: The id is in use.
        """
        self.loads.check_free(request_id)
        decision, booking = self._decide(prompt, hints, model, explain, exclude)
        self._turn += 1
        return self.loads.book(request_id, decision, booking, ttl_s)

    def mark_prefill_complete(self, request_id: str) -> None:
        """A reserved request has its first token. Raises UnknownReservationError."""
        self.loads.expire()
        self.loads.lease(request_id).first_token()

    def free(self, request_id: str) -> None:
        """A reserved request has ended. Raises UnknownReservationError."""
        self.loads.expire()
        self.loads.lease(request_id).release()

    def load(self, target: Target) -> TargetLoad:
        """Work booked on a target."""
        return self.loads.load(target)

    def model_for(self, model: str, lora_name: str) -> str:
        """The name under which the engine knows what is asked for.

        Raises:
            UnknownModelError: Neither is given and the workers serve several base models, or none serves the name.
        """
        workers = self.workers.workers()
        wanted = lora_name or model
        if wanted:
            candidates.check_model(workers, wanted)
            return wanted
        bases = {worker.facts.models[0] for worker in workers if worker.facts and worker.facts.models}
        bases |= {worker.spec.models[0] for worker in workers if worker.facts is None and worker.spec.models}
        if len(bases) > 1:
            raise UnknownModelError(f"model: the endpoint serves {', '.join(sorted(bases))}; name one")
        return bases.pop() if bases else ""

    def lora_of(self, model: str) -> str:
        """`model` if the workers serve it as a LoRA adapter, else ""."""
        known = any(worker.facts and model in worker.facts.loras for worker in self.workers.workers())
        return model if known else ""

    def overlap_scores(self, prompt: Prompt, override: RouterOverride | None = None) -> OverlapScores:
        """What every target holds of the prompt, whether or not it may be picked.

        Raises:
            NotReadyError: The block size is not known yet.
        """
        if not self.index.block_size:
            raise NotReadyError(
                "the block size is not known yet: no worker has told it; set --router-block-size or wait for a worker"
            )
        weights, _ = self._policy(override)
        pairs = sorted((target, worker.spec.name) for worker in self.workers.workers() for target in worker.targets)
        seqs = self.index.sequence(prompt)
        found = self.index.overlaps(seqs, [target for target, _ in pairs])
        return OverlapScores(
            self.index.block_size,
            len(seqs),
            tuple(
                TargetOverlap(target, name, overlap, credit_blocks(overlap, weights), self._freshness(target))
                for (target, name), overlap in zip(pairs, found, strict=True)
            ),
        )

    def _decide(
        self, prompt: Prompt, hints: RoutingHints, model: str, explain: bool, exclude: Collection[Target]
    ) -> tuple[Decision, Booking]:
        self.loads.expire()
        workers = self.workers.workers()
        candidates.check_pin(self.workers, hints)
        candidates.check_model(workers, model)
        eligible: list[tuple[Worker, Target]] = []
        drops: list[tuple[Worker, Target, str]] = []
        for worker in workers:
            for target in worker.targets:
                reason = candidates.why_not(worker, target, model, hints, exclude)
                if reason:
                    drops.append((worker, target, reason))
                else:
                    eligible.append((worker, target))
        if not eligible:
            raise candidates.none_eligible(self.endpoint, [(worker, why) for worker, _, why in drops], hints)

        weights, cost = self._policy(hints.override)
        temperature = self.config.temperature
        if hints.override is not None and hints.override.temperature is not None:
            temperature = hints.override.temperature
        seqs = self.index.sequence(prompt)
        ask = Ask(len(prompt.tokens), self.index.block_size or 1, hints.expected_output_tokens or 0)
        rows = self._rows(eligible, seqs, hints, cost.counts_in_flight or weights.assume_kv_reuse)
        terms = cost.score(rows, ask, weights)
        costs = [sum(values) for values in terms]
        chosen = self._pick(rows, costs, cost, temperature)

        worker, target = eligible[chosen]
        row = rows[chosen]
        in_flight = row.in_flight_blocks if cost.counts_in_flight else 0
        expected = cached_tokens(row.overlap, in_flight, ask) if self.index.block_size else 0
        decision = Decision(
            target=target,
            worker_name=worker.spec.name,
            url=worker.spec.url,
            overlap=row.overlap,
            block_size=self.index.block_size,
            prompt_tokens=ask.prompt_tokens,
            prompt_blocks=len(seqs),
            expected_cached_tokens=expected,
            cost=costs[chosen],
            freshness=row.freshness,
            candidates=_explain(eligible, rows, cost, terms, costs, drops) if explain else (),
        )
        booking = Booking(
            seqs if weights.track_active_blocks else _NO_BLOCKS,
            ask.prompt_tokens - expected if weights.track_prefill_tokens else 0,
            weights.assume_kv_reuse,
        )
        return decision, booking

    def _rows(
        self, eligible: list[tuple[Worker, Target]], seqs: "array[int]", hints: RoutingHints, shared: bool
    ) -> list[Row]:
        overlaps = self.index.overlaps(seqs, [target for _, target in eligible])
        rows = []
        for (worker, target), overlap in zip(eligible, overlaps, strict=True):
            load = self.loads.load(target)
            taints = sum(hints.preferred_taints.get(taint, 0.0) for taint in worker.spec.taints)
            rows.append(
                Row(
                    overlap,
                    load.in_flight_overlap(seqs) if shared else 0,
                    self._freshness(target),
                    load.queued_prefill_tokens,
                    load.active_blocks,
                    load.active_requests,
                    worker.spec.total_kv_blocks or 0,
                    taints,
                )
            )
        return rows

    def _pick(self, rows: list[Row], costs: list[float], cost: Cost, temperature: float) -> int:
        if self.config.mode == "round-robin":
            return self._turn % len(rows)
        if self.config.mode == "random":
            return self._rng.randrange(len(rows))
        if temperature > 0:
            return pick.softmax(costs, temperature, self._rng)
        requests = [row.active_requests for row in rows] if cost.fewest_requests_break_ties else None
        return pick.lowest(costs, requests, self._rng)

    def _freshness(self, target: Target) -> float:
        stream = self.index.stream_if_known(target)
        return stream.freshness if stream is not None else 0.0

    def _policy(self, override: RouterOverride | None) -> tuple[Weights, Cost]:
        weights, name = self._weights, str(self.config.cost)
        if override is not None:
            name = override.cost or name
            changed = {
                field: value
                for field in ("overlap_score_credit", "prefill_load_scale", "assume_kv_reuse", "track_prefill_tokens")
                if (value := getattr(override, field)) is not None
            }
            weights = replace(weights, **changed) if changed else weights
        return weights, COSTS[name]


_NO_BLOCKS = array("Q")


def _weights(config: RouterConfig) -> Weights:
    return Weights(
        new_work_weight=config.new_work_weight,
        overlap_score_credit=config.kv_overlap_score_credit,
        overlap_score_credit_decay=config.kv_overlap_score_credit_decay,
        prefill_load_scale=config.prefill_load_scale,
        decode_active_request_weight=config.decode_active_request_weight,
        host_cache_hit_weight=config.host_cache_hit_weight,
        disk_cache_hit_weight=config.disk_cache_hit_weight,
        track_active_blocks=config.track_active_blocks,
        track_prefill_tokens=config.track_prefill_tokens,
        assume_kv_reuse=config.assume_kv_reuse,
    )


def _explain(
    eligible: list[tuple[Worker, Target]],
    rows: list[Row],
    cost: Cost,
    terms: list[tuple[float, ...]],
    costs: list[float],
    drops: list[tuple[Worker, Target, str]],
) -> tuple[Candidate, ...]:
    """Every target, cheapest first, those that were not eligible last."""
    scored = [
        Candidate(target, worker.spec.name, row.overlap, value, dict(zip(cost.terms, values, strict=True)))
        for (worker, target), row, values, value in zip(eligible, rows, terms, costs, strict=True)
    ]
    scored.sort(key=lambda candidate: (candidate.cost or 0.0, candidate.target))
    dropped = [Candidate(target, worker.spec.name, Overlap(), None, {}, reason) for worker, target, reason in drops]
    return (*scored, *dropped)
