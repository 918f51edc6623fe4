"""The router of one endpoint: decides where a request goes and books it there, in one synchronous step."""

import time
from array import array
from collections.abc import Callable, Iterable
from typing import cast

from kvrouter_grpc import advice
from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import Choice, Decider, DecisionLog, Recording, TokenIds, seed_for
from kvrouter_grpc.routing import explanation
from kvrouter_grpc.routing.admission import Admission
from kvrouter_grpc.routing.feedback import Feedback
from kvrouter_grpc.routing.filter import Filter
from kvrouter_grpc.routing.forecast import forecasts
from kvrouter_grpc.routing.gate import Gate, Thresholds
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.loads import Booking, Lease, LoadTable, Output, TargetLoad
from kvrouter_grpc.routing.mode import SESSION_MODES
from kvrouter_grpc.routing.overlap_scores import OverlapScores, overlap_scores
from kvrouter_grpc.routing.plan import Plan, Plans
from kvrouter_grpc.routing.roster import Roster, Seat
from kvrouter_grpc.routing.sessions import Sessions, session_of
from kvrouter_grpc.routing.snapshot import Snapshot
from kvrouter_grpc.routing.workers import Worker, WorkerRegistry
from kvrouter_grpc.types import (
    Decision,
    Explanation,
    Overlap,
    Prompt,
    Role,
    RouterOverride,
    RoutingHints,
    RoutingRequest,
    Target,
)


class Router:
    """Owns the index, the loads and the workers of one endpoint.

    Args:
        endpoint: `namespace.component.endpoint`.
        config: The policy.
        clock: Monotonic seconds.
        log: Takes a recording of every decision; None: none are kept.
        on_worker_change: Called with each worker that was added, changed or removed.

    Attributes:
        workers: Who there is, and how they are.
        index: What they hold.
        loads: What is booked on them.
        gate: Which of them are too busy.
        feedback: Takes in what their engines tell.
        admission: Where requests wait for them; None when they do not.
        log: The last decisions, if they are kept.
        asks_for_session: Whether it matters which session a request belongs to.
        snapshot: What a router before this one knew, until the workers claim it.
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
        self.snapshot: Snapshot | None = None
        self.workers = WorkerRegistry(self._worker_changed)
        self._on_worker_change = on_worker_change
        self.index = KvIndex(config.block_size, self._block_size_differs, clock=clock, **forecasts(config))
        targets = self.index.targets
        self.loads = LoadTable(targets, clock, config.request_expiry_s)
        self.gate = Gate(targets, Thresholds.of(config), config.queue_threshold)
        self.admission = Admission(config, clock, self) if config.queue_threshold is not None else None
        self.loads.on_relief = self.admission.drain if self.admission is not None else None
        self._roster = Roster(endpoint, self.workers, targets)
        sessions = Sessions(ttl) if (ttl := config.session_affinity_ttl_secs) is not None else None
        self.asks_for_session = config.mode in SESSION_MODES or sessions is not None
        direct = config.mode == "direct"
        self._filter = Filter(endpoint, targets, self._roster, self.gate, sessions, clock, only_pinned=direct)
        self._plans = Plans(config)
        self._decider = Decider(targets, config.seed, log)
        self.feedback = Feedback(self.index, self.loads, self._decider)

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
            self.feedback.forget(target)

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

    # --- decisions ------------------------------------------------------------------------------------------------

    def best_worker(self, request: RoutingRequest, *, remember: bool = True) -> Decision:
        """Decide where a request would go; changes nothing.

        Args:
            request: What is asked.
            remember: Let the log have it; False for what nobody acts upon.

        Raises:
            RouterError: Nobody can take it; the class and message say why.
        """
        return self._decision(self._decide(request, self._plans.of(request), remember=remember), request.prompt)

    def explain(self, request: RoutingRequest) -> Explanation:
        """Where a request would go, and why. Remembers nothing. Raises as `best_worker`."""
        request = request._replace(explain=True)
        choice = self._decide(request, self._plans.of(request), remember=False)
        return self.explained(cast("Recording", choice.recording))

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
        _, shortlist, seed = self._filter.lane(model)
        choice = self._decider.decide(tokens, seed, shortlist, self._plans.usual.policy, request_id)
        return self._roster.seat(choice.row), choice, self.index.targets.load(choice.row)

    def lease(self, request: RoutingRequest, ttl_s: float | None = None) -> Lease:
        """Decide and book in one step. Raises as `best_worker`.

        Args:
            request: What is asked; the booking has its id.
            ttl_s: Life of the booking in seconds if nobody releases it; None for the configured one.

        Raises:
            DuplicateRequestError: The id is in use.
        """
        self.loads.check_free(request.request_id)
        plan = self._plans.of(request)
        decision = self._decision(self._decide(request, plan, booked=True), request.prompt)
        seqs = self._decider.sequence()
        lease = self.loads.book(request.request_id, decision, self._booking(seqs, decision, plan, request.hints), ttl_s)
        self.feedback.booked(lease, seqs, request.prompt)
        self._filter.bind(request, decision.target)
        return lease

    def all_busy(self, request: RoutingRequest) -> bool:
        """Whether a request would have to wait: every worker that may take it is busy. Raises as `best_worker`."""
        return self._filter.all_busy(request)

    def _decide(self, request: RoutingRequest, plan: Plan, *, remember: bool = True, booked: bool = False) -> Choice:
        self.loads.expire()
        hints, explain = request.hints, request.explain
        tokens, lora_name, cache_salt, mm_hashes = request.prompt
        shortlist = self._filter.shortlist(request, explained=explain or (remember and self.log is not None))
        return self._decider.decide(
            tokens,
            seed_for(lora_name, cache_salt),
            shortlist,
            plan.policy,
            request.request_id,
            mm_hashes=mm_hashes,
            output_tokens=hints.expected_output_tokens or 0,
            session=session_of(hints) if hints.session_id else None,
            explain=explain,
            remember=remember,
            booked=booked,
        )

    def _decision(self, choice: Choice, prompt: Prompt) -> Decision:
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

    # --- bookings ---------------------------------------------------------------------------------------------------

    def check_free(self, request_id: str) -> None:
        """Make sure that no booking has this id. Raises DuplicateRequestError."""
        self.loads.check_free(request_id)

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

    def expire(self) -> None:
        """End what is past its time: reservations that nobody freed, predictions, what silent engines said."""
        now = self.loads.clock()
        self.loads.expire()
        self.index.expire(now)
        self.feedback.fade(now)
        self.loads.relieved()

    # --- the workers ------------------------------------------------------------------------------------------------

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
        plan = self._plans.usual
        weights = (plan.changed(override) if override is not None else plan).weights
        return overlap_scores(self.index, self._roster, prompt, weights)


_NO_BLOCKS = array("Q")
