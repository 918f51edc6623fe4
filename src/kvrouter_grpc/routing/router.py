"""The router of one endpoint: decides where a request goes and books it there, in one synchronous step."""

import time
from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

from kvrouter_grpc import advice
from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import Choice, Decider, DecisionLog, Recording, TokenIds, hash_bytes, seed_for
from kvrouter_grpc.errors import NotReadyError, RouterError, WorkersBusyError
from kvrouter_grpc.routing import candidates, explanation
from kvrouter_grpc.routing.admission import Admission, Applicant
from kvrouter_grpc.routing.cost import credit_blocks
from kvrouter_grpc.routing.forecast import Prediction, forecasts
from kvrouter_grpc.routing.foreign import ForeignLoad
from kvrouter_grpc.routing.gate import Gate, Thresholds
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.loads import Booking, Lease, LoadTable, Output, TargetLoad
from kvrouter_grpc.routing.mode import SESSION_MODES
from kvrouter_grpc.routing.plan import Plan
from kvrouter_grpc.routing.roster import FREE, LeftOut, Occasion, Roster, Seat
from kvrouter_grpc.routing.sessions import Sessions
from kvrouter_grpc.routing.snapshot import Snapshot
from kvrouter_grpc.routing.stream import freshness
from kvrouter_grpc.routing.workers import Worker, WorkerRegistry
from kvrouter_grpc.types import (
    Decision,
    EngineReport,
    Explanation,
    Overlap,
    Prompt,
    Role,
    RouterOverride,
    RoutingHints,
    Target,
)

NEW_BLOCKS = 2
"""Full blocks still to be computed from which on an event is due: an engine that finds a prompt as a whole computes its
last block again, and need not tell."""


OVERLOADED = "overloaded: above a threshold of the endpoint"


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
        log: Takes a recording of every decision; None: none are kept.
        on_worker_change: Called with each worker that was added, changed or removed.

    Attributes:
        log: The last decisions, if they are kept.
        asks_for_session: Whether it matters which session a request belongs to.
        gate: Which workers are too busy.
        admission: Where requests wait for them; None when they do not.
    """

    def __init__(
        self,
        endpoint: str,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        log: DecisionLog | None = None,
        on_worker_change: Callable[[Worker], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.config = config
        self.log = log
        self.workers = WorkerRegistry(self._worker_changed)
        self._on_worker_change = on_worker_change
        self.index = KvIndex(config.block_size, self._block_size_differs, clock=clock, **forecasts(config))
        self.loads = LoadTable(self.index.targets, clock, config.request_expiry_s)
        self.gate = Gate(self.index.targets, Thresholds.of(config), config.queue_threshold)
        self.admission = Admission(config, clock) if config.queue_threshold is not None else None
        self.loads.on_relief = self.admission.drain if self.admission is not None else None
        self._roster = Roster(self.workers, self.index.targets)
        self._decider = Decider(self.index.targets, config.seed)
        self._plan = Plan.of(config)
        self.asks_for_session = config.mode in SESSION_MODES or config.session_affinity_ttl_secs is not None
        self._sessions = Sessions(ttl) if (ttl := config.session_affinity_ttl_secs) is not None else None
        self._foreign = ForeignLoad(self.index.targets)
        self._reports: dict[Target, EngineReport] = {}
        self._decode_plan = self._plan.decoding()
        self.snapshot: Snapshot | None = None  # what a router before this one knew, until the workers claim it
        self._turn = 0  # of round-robin; only what is booked takes a turn

    @property
    def role(self) -> Role:
        """What the endpoint's workers are for; `BOTH` unless all of them agree on something else."""
        return self._roster.role

    # --- targets --------------------------------------------------------------------------------------------------

    def add_targets(self, targets: Iterable[Target]) -> None:
        """Start to schedule these ranks."""
        for target in targets:
            self.index.add(target)

    def remove_targets(self, targets: Iterable[Target]) -> None:
        """Forget these ranks: what they hold and what they are busy with."""
        for target in targets:
            self.index.remove(target)
            self._reports.pop(target, None)
            self._foreign.forget(target)

    def _worker_changed(self, worker: Worker) -> None:
        self.loads.relieved()
        if self._on_worker_change is not None:
            self._on_worker_change(worker)

    def restore(self, target: Target, started_at: float | None) -> bool:
        """Let a rank that was just added hold what the snapshot says, if there is one; see `Snapshot.restore`."""
        return self.snapshot is not None and self.snapshot.restore(self.index, target, started_at)

    def check_block_size(self, worker: Worker, block_size: int, source: str) -> None:
        """Compare the worker's block size with the router's, which is learned from the first worker if it is open."""
        fault = None
        if not self.index.learn_block_size(block_size):
            fault = advice.block_sizes_differ(worker.spec.name, block_size, source, self.index.block_size)
        self.workers.set_fault(worker, "block_size", fault)

    def _block_size_differs(self, target: Target, block_size: int) -> None:
        worker = self.workers.get(target.worker_id)
        if worker is not None:
            self.check_block_size(worker, block_size, "its KV events")

    # --- what engines say of themselves -----------------------------------------------------------------------------

    def engine_reported(self, target: Target, report: EngineReport) -> None:
        """Take what a rank says of its work. Reports of a target that was removed are ignored."""
        hits = self.index.hits(target)
        if hits is not None:
            self._reports[target] = report
            hits.reported(report)
            self._foreign.reported(target, report, self._decider.usual_new_tokens, self.loads.clock())
            self.loads.relieved()

    def engine_report(self, target: Target) -> EngineReport | None:
        """The last report of a rank, if there was one."""
        return self._reports.get(target)

    def engine_restarted(self, target: Target) -> None:
        """Forget what the rank held: its process is another one now."""
        self.index.clear(target)
        self._reports.pop(target, None)
        self._foreign.forget(target)

    # --- decisions ------------------------------------------------------------------------------------------------

    def best_worker(
        self,
        prompt: Prompt,
        hints: RoutingHints,
        *,
        model: str = "",
        explain: bool = False,
        exclude: Collection[Target] = (),
        prefilled: bool = False,
        request_id: str = "",
        remember: bool = True,
    ) -> Decision:
        """Decide where a request would go; changes nothing.

        Args:
            prompt: The prompt and what is folded into its hashes.
            hints: Pins, filters and overrides.
            model: Model or LoRA adapter that the worker must serve; "" for any.
            explain: Fill `Decision.candidates`.
            exclude: Targets that failed this request already.
            prefilled: Another worker computes the prompt: only decoding counts.
            request_id: By which the decision is remembered.
            remember: Let the log have it; False for what nobody acts upon.

        Raises:
            RouterError: Nobody can take it; the class and message say why.
        """
        plan = self._plan_for(hints, prefilled=prefilled)
        log = self.log if remember else None
        return self._decide(prompt, hints, plan, model, explain, exclude, prefilled, request_id, log)

    def explain(self, prompt: Prompt, hints: RoutingHints, *, model: str = "", prefilled: bool = False) -> Explanation:
        """Where a request would go, and why. Remembers nothing. Arguments and errors as `best_worker`."""
        plan = self._plan_for(hints, prefilled=prefilled)
        choice = self._choose(prompt, hints, plan, model, True, (), prefilled, "", None)
        return explanation.explain(self.endpoint, cast("Recording", choice.recording))

    def explained(self, recording: Recording) -> Explanation:
        """A decision that is remembered, explained."""
        return explanation.explain(self.endpoint, recording)

    def choose(self, tokens: TokenIds, model: str, request_id: str = "") -> tuple[Seat, Choice, tuple[int, int, int]]:
        """As `best_worker`, for a prompt for which nothing else is asked; the short way for callers at a high rate.

        Returns:
            The target, the decision, and the load of the target: active requests, queued prefill tokens and active
            blocks.

        Raises:
            RouterError: As `best_worker` and `model_for`.
        """
        self.loads.expire()
        rows, seed, occasion = self._roster.lane(model)
        if not rows:
            raise self._nobody(model, FREE, ())
        if self.gate.limits:
            able, rows = rows, self._not_overloaded(rows, FREE)
            if rows is not able and self.log is not None:
                occasion = self._without(occasion, able, rows, OVERLOADED)
        if self._plan.mode == "direct":
            raise candidates.not_pinned()
        choice = self._decider.decide(
            tokens,
            seed,
            None,
            self._plan.policy,
            rows,
            None,
            0,
            self._turn,
            False,
            None,
            False,
            self.log,
            occasion,
            request_id,
        )
        return self._roster.seat(choice.row), choice, self.index.targets.load(choice.row)

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
        prefilled: bool = False,
    ) -> Lease:
        """Decide and book in one step. Arguments and errors as `best_worker`.

        Args:
            request_id: Name of the booking.
            ttl_s: Its life in seconds if nobody releases it; None for the configured one.
            prefilled: Another worker computes the prompt: only decoding counts, for the choice and for the load.

        Raises:
            DuplicateRequestError: The id is in use.
        """
        self.loads.check_free(request_id)
        plan = self._plan_for(hints, prefilled=prefilled)
        decision = self._decide(
            prompt, hints, plan, model, explain, exclude, prefilled, request_id, self.log, learn=True
        )
        seqs = self._decider.sequence()
        lease = self.loads.book(request_id, decision, self._booking(seqs, decision, plan, hints), ttl_s)
        lease.prediction = self.index.predict(decision.target, seqs, prompt, self.loads.clock())
        hits = self.index.hits(decision.target)
        if hits is not None:
            lease.expectation = hits.expect(decision, self.loads.clock())
        self._turn += 1
        if self._sessions is not None and hints.session_id:
            self._sessions.bind(_session_key(hints), decision.target, self.loads.clock())
        return lease

    def admit(
        self,
        request_id: str,
        prompt: Prompt,
        hints: RoutingHints,
        settle: Callable[[Lease | Exception], None],
        *,
        model: str = "",
        ttl_s: float | None = None,
        explain: bool = False,
        prefilled: bool = False,
    ) -> Lease | Applicant:
        """Book as `lease` does; or, where all workers that could take it are busy, let the request wait for them.

        What it finds cached is looked up when it leaves the queue, like everything else of the decision.

        Args:
            settle: Called once, at any time from now on, when an applicant is returned: with its lease, or with why
                there is none.

        Returns:
            The lease, or what `admission.give_up` and `admission.time_out` are called with.

        Raises:
            RouterError: As `lease`.
            WorkersBusyError: It would have to wait, and `hints` say that it may not.
        """
        book = partial(
            self.lease, request_id, prompt, hints, model=model, ttl_s=ttl_s, explain=explain, prefilled=prefilled
        )
        admission = self.admission
        if admission is None:
            return book()
        admission.check_free(request_id)
        admission.drain()
        all_busy = partial(self._all_busy, model, hints)
        if not all_busy():
            return book()
        if not hints.may_wait:
            raise WorkersBusyError(
                "every worker that could take the request is busy, and it does not wait (do_not_queue, or it is one of "
                "a batch)",
                retry_after_s=admission.estimated_wait_s,
            )
        self.loads.check_free(request_id)
        decision = self.best_worker(prompt, hints, model=model, prefilled=prefilled, remember=False)
        applicant = Applicant(
            (model, hints.worker_id, hints.dp_rank, hints.allowed_worker_ids, hints.required_taints),
            hints.tenant,
            hints.strict_priority,
            hints.priority_jump_s,
            decision.prompt_tokens,
            max(1, decision.prompt_tokens - decision.expected_cached_tokens),
            self.loads.clock(),
            request_id=request_id,
            all_busy=all_busy,
            book=book,
            settle=settle,
        )
        admission.apply(applicant)
        return applicant

    def _all_busy(self, model: str, hints: RoutingHints) -> bool:
        return self.gate.all_busy(self._eligible(model, hints, ()))

    def _booking(self, seqs: "array[int]", decision: Decision, plan: Plan, hints: RoutingHints) -> Booking:
        weights = plan.weights
        output = None
        if self.config.track_output_blocks and weights.track_active_blocks and decision.block_size:
            output = Output.after(decision.prompt_tokens, decision.block_size, hints.expected_output_tokens)
        return Booking(
            seqs if weights.track_active_blocks else _NO_BLOCKS,
            decision.new_tokens if weights.track_prefill_tokens else 0,
            weights.assume_kv_reuse,
            output,
        )

    def improve(self, prediction: Prediction, prompt: Prompt, decision: Decision) -> None:
        """Correct predictions by what was heard of a request that is about to be released."""
        cached_tokens, answer = prediction.cached_tokens, prediction.answer
        if cached_tokens is not None and cached_tokens < decision.expected_cached_tokens:
            prediction.correct(cached_tokens // decision.block_size)
        if answer:
            # Nothing was generated from the last token, so its keys and values were never computed.
            tokens = array("I", (*prompt.tokens.tolist(), *answer[:-1]))
            prediction.lengthen(self.index.sequence(prompt._replace(tokens=tokens)))

    def expire(self) -> None:
        """End what is past its time: reservations that nobody freed, predictions, what silent engines said."""
        now = self.loads.clock()
        self.loads.expire()
        self.index.expire(now)
        self._foreign.fade(self._decider.usual_new_tokens, now)
        self.loads.relieved()

    def first_token(self, lease: Lease) -> None:
        """The prompt of a request that was sent is computed: its blocks are announced or overdue soon. Idempotent."""
        if not lease.prefilling:
            return
        lease.first_token()
        target, expected = lease.decision.target, lease.expectation
        stream, hits = self.index.stream_if_known(target), self.index.hits(target)
        if stream is None or hits is None or expected is None or expected.epoch != hits.epoch:
            return
        hits.computed(expected)
        if expected.new_blocks >= NEW_BLOCKS and stream.last_event_at < expected.booked_at:
            stream.prompts.computed(expected.booked_at, self.loads.clock())

    def answered(self, lease: Lease, cached_tokens: int | None) -> None:
        """A booked request was answered completely; compare what its engine found with what was expected.

        Args:
            lease: Its booking.
            cached_tokens: As its engine reported, None when it did not.
        """
        target, expected = lease.decision.target, lease.expectation
        stream, hits = self.index.stream_if_known(target), self.index.hits(target)
        if stream is None or hits is None or expected is None:
            return
        hits.finished(expected, cached_tokens)
        if stream.prompts and cached_tokens is not None and cached_tokens > expected.likely:
            stream.prompts.excuse(expected.booked_at)

    def resync_due(self, target: Target) -> bool:
        """Whether the picture of `target` foretells so badly that it should be begun anew, now; says yes once."""
        hits = self.index.hits(target)
        return hits is not None and hits.resync_due(self.loads.clock())

    def mark_prefill_complete(self, request_id: str) -> None:
        """A reserved request has its first token. Raises UnknownReservationError."""
        self.loads.expire()
        self.loads.lease(request_id).first_token()  # on the caller's word alone, no event is due

    def report_output(self, request_id: str, tokens: int) -> None:
        """The answer to a reserved request has so many tokens by now. Raises UnknownReservationError."""
        self.loads.expire()
        lease = self.loads.lease(request_id)
        lease.first_token()
        lease.generated(max(0, tokens - lease.output_tokens))

    def free(self, request_id: str) -> None:
        """A reserved request has ended. Raises UnknownReservationError."""
        self.loads.expire()
        lease = self.loads.lease(request_id)
        lease.first_token()  # whoever frees a request without having said so had it computed
        lease.release()

    def set_thresholds(self, thresholds: Thresholds) -> None:
        """Replace the loads above which targets get nothing new."""
        self.gate.thresholds = thresholds
        self.loads.relieved()

    def load(self, target: Target) -> TargetLoad:
        """Work booked on a target."""
        return self.loads.load(target)

    def model_for(self, model: str, lora_name: str) -> str:
        """The name under which the engine knows what is asked for.

        Raises:
            UnknownModelError: Neither is given and the workers serve several base models, or none serves the name.
        """
        return self._roster.model_for(model, lora_name)

    def lora_of(self, model: str) -> str:
        """`model` if the workers serve it as a LoRA adapter, else ""."""
        return model if self._roster.is_lora(model) else ""

    def overlap_scores(self, prompt: Prompt, override: RouterOverride | None = None) -> OverlapScores:
        """What every target holds of the prompt, whether or not it may be picked.

        Raises:
            NotReadyError: The block size is not known yet.
        """
        if not self.index.block_size:
            raise NotReadyError(
                "the block size is not known yet: no worker has told it; set --router-block-size or wait for a worker"
            )
        weights = (self._plan.changed(override) if override is not None else self._plan).weights
        pairs = sorted((target, worker.spec.name) for worker in self._roster.workers for target in worker.targets)
        seqs = self.index.sequence(prompt)
        found = self.index.overlaps(seqs, [target for target, _ in pairs], shared=weights.shared_cache)
        return OverlapScores(
            self.index.block_size,
            len(seqs),
            tuple(
                TargetOverlap(target, name, overlap, credit_blocks(overlap, weights), self._freshness(target))
                for (target, name), overlap in zip(pairs, found, strict=True)
            ),
        )

    def _freshness(self, target: Target) -> float:
        return freshness(self.index.evidence(target)).value

    def _plan_for(self, hints: RoutingHints, *, prefilled: bool = False) -> Plan:
        if hints.override is None:
            return self._decode_plan if prefilled else self._plan
        plan = self._plan.changed(hints.override)
        return plan.decoding() if prefilled else plan

    def _decide(
        self,
        prompt: Prompt,
        hints: RoutingHints,
        plan: Plan,
        model: str,
        explain: bool,
        exclude: Collection[Target],
        prefilled: bool,
        request_id: str,
        log: DecisionLog | None,
        *,
        learn: bool = False,
    ) -> Decision:
        choice = self._choose(prompt, hints, plan, model, explain, exclude, prefilled, request_id, log, learn=learn)
        seat = self._roster.seat(choice.row)
        block_size = self.index.block_size
        return Decision(
            seat.target,
            seat.worker.spec.name,
            seat.worker.spec.url,
            Overlap._make(choice.tiers),
            block_size,
            len(prompt.tokens),
            choice.blocks,
            choice.cached_tokens if block_size else 0,
            choice.cost,
            choice.freshness,
            explanation.candidates(choice.recording) if choice.recording is not None else (),
            choice.new_tokens,
        )

    def _choose(
        self,
        prompt: Prompt,
        hints: RoutingHints,
        plan: Plan,
        model: str,
        explain: bool,
        exclude: Collection[Target],
        prefilled: bool,
        request_id: str,
        log: DecisionLog | None,
        *,
        learn: bool = False,
    ) -> Choice:
        self.loads.expire()
        rows = self._eligible(model, hints, exclude)
        if plan.mode == "direct" and hints.worker_id is None:
            raise candidates.not_pinned()
        session = _session_key(hints) if hints.session_id else None
        asked = rows if session is None or self._sessions is None else self._bound(session, rows)
        occasion = None
        if explain or log is not None:
            occasion = self._occasion(rows, asked, model, hints, exclude, prefilled)
        return self._decider.decide(
            prompt.tokens,
            seed_for(prompt.lora_name, prompt.cache_salt),
            prompt.mm_hashes,
            plan.policy,
            asked,
            self._preferences(asked, hints) if hints.preferred_taints else None,
            hints.expected_output_tokens or 0,
            self._turn,
            explain,
            session,
            learn,
            log,
            occasion,
            request_id,
        )

    def _eligible(self, model: str, hints: RoutingHints, exclude: Collection[Target]) -> "array[int]":
        rows = self._roster.eligible(model, hints, exclude)
        if not rows:
            raise self._nobody(model, hints, exclude)
        return self._not_overloaded(rows, hints) if self.gate.limits else rows

    def _not_overloaded(self, rows: "array[int]", hints: RoutingHints) -> "array[int]":
        below = self.gate.below(rows)
        if not below:
            raise candidates.overloaded(self.endpoint, self._roster.seat(rows[0]).worker, hints)
        return below

    def _nobody(self, model: str, hints: RoutingHints, exclude: Collection[Target]) -> RouterError:
        return candidates.none_eligible(self.endpoint, list(self._roster.drops(model, hints, exclude)), hints)

    def _bound(self, session: int, rows: "array[int]") -> "array[int]":
        """The row of the target that a session is bound to; all of `rows` when it is free, or that one is not there."""
        target = self._sessions.find(session, self.loads.clock()) if self._sessions is not None else None
        row = self.index.targets.row(target) if target is not None else None
        return array("I", [row]) if row is not None and row in rows else rows

    def _occasion(
        self,
        rows: "array[int]",
        asked: "array[int]",
        model: str,
        hints: RoutingHints,
        exclude: Collection[Target],
        prefilled: bool,
    ) -> Occasion:
        occasion = self._roster.occasion(model, hints, exclude)
        if hints.override is not None or prefilled:
            occasion = occasion._replace(override=hints.override, prefilled=prefilled)
        if self.gate.limits:
            occasion = self._without(occasion, self._roster.eligible(model, hints, exclude), rows, OVERLOADED)
        if asked is not rows:
            bound = self._roster.seat(asked[0]).worker.spec.name
            occasion = self._without(occasion, rows, asked, f"its session is bound to {bound}")
        return occasion

    def _without(self, occasion: Occasion, able: "array[int]", kept: "array[int]", reason: str) -> Occasion:
        """The occasion when of those that are able only some are kept."""
        if len(kept) == len(able):
            return occasion
        others = [self._roster.seat(row) for row in sorted(set(able).difference(kept))]
        left_out = tuple(LeftOut(seat.target, seat.worker.spec.name, reason) for seat in others)
        return occasion._replace(left_out=occasion.left_out + left_out)

    def _preferences(self, rows: "array[int]", hints: RoutingHints) -> "array[float]":
        preferred = hints.preferred_taints
        return array(
            "d", [sum(preferred.get(taint, 0.0) for taint in self._roster.seat(row).worker.spec.taints) for row in rows]
        )


_NO_BLOCKS = array("Q")


def _session_key(hints: RoutingHints) -> int:
    return hash_bytes(hints.session_id.encode(), 0)
