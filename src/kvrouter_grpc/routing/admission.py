"""Who is let through to the workers of an endpoint, and when: the queue, and what it waits for.

Everything happens in calls: whoever changes a load calls `drain`, and those who wait are told through a function of
theirs. So a request is booked in the very step that made room for it, before anybody else can take that room.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.errors import (
    DuplicateRequestError,
    OverloadedError,
    QueueFullError,
    QueueTimeoutError,
    WorkersBusyError,
)
from kvrouter_grpc.routing.loads import Lease
from kvrouter_grpc.routing.queue import AdmissionQueue, Waiting
from kvrouter_grpc.types import Decision, RoutingRequest

MOST_BLOCKED = 256
"""Lanes that one `drain` asks in vain before it leaves the others to the next: callers make up as many as they like."""


class Desk(Protocol):
    """Decides and books: the router, as far as those who wait need it."""

    def all_busy(self, request: RoutingRequest) -> bool:
        """Whether every worker that may take a request is busy."""

    def best_worker(self, request: RoutingRequest, *, remember: bool) -> Decision:
        """Where it would go now."""

    def check_free(self, request_id: str) -> None:
        """Make sure that no booking has this id."""

    def lease(self, request: RoutingRequest, ttl_s: float | None) -> Lease:
        """Decide and book."""


@dataclass(slots=True, eq=False, kw_only=True)
class Applicant(Waiting):
    """A request that waits to be booked.

    Attributes:
        request: What is asked; its id is unique among those that wait.
        ttl_s: Life of the booking, as of `Router.lease`.
        settle: Called once, with its lease or with why there is none.
    """

    request: RoutingRequest
    ttl_s: float | None
    settle: Callable[[Lease | Exception], None]


class Admission:
    """The queue of one endpoint at work.

    Attributes:
        queue: Those who wait. After each `drain` none of them could go.
        timeout_s: Longest wait.
        outcomes: How many requests that waited were `admitted`, `refused` for lack of room, `timed_out`, or `gone`
            because their callers were.

    Args:
        config: Order and bounds.
        clock: Monotonic seconds.
        desk: Where they are booked.
    """

    def __init__(self, config: RouterConfig, clock: Callable[[], float], desk: Desk) -> None:
        self.queue = AdmissionQueue[Applicant](config.queue_policy, config.queue_size, config.class_sizes)
        self.timeout_s = config.queue_timeout_s
        self.outcomes = Counter({"admitted": 0, "refused": 0, "timed_out": 0, "gone": 0})
        self._clock = clock
        self._desk = desk
        self._ids: set[str] = set()
        self._draining = False

    @property
    def estimated_wait_s(self) -> float:
        """Seconds until what waits now will have gone."""
        return self.queue.estimated_wait_s(self._clock())

    def admit(
        self, request: RoutingRequest, settle: Callable[[Lease | Exception], None], ttl_s: float | None = None
    ) -> Lease | Applicant:
        """Book as `Router.lease` does; or let the request wait, where all workers that could take it are busy.

        What it finds cached is looked up when it leaves the queue, like everything else of the decision.

        Args:
            request: What is asked.
            settle: Called once, at any time from now on, when an applicant is returned: with its lease, or with why
                there is none.
            ttl_s: Life of the booking.

        Returns:
            The lease, or what `give_up` and `time_out` are called with.

        Raises:
            RouterError: As `Router.lease`.
            WorkersBusyError: It would have to wait, and its hints say that it may not.
        """
        self._check_free(request.request_id)
        self.drain()
        if not self._desk.all_busy(request):
            return self._desk.lease(request, ttl_s)
        if not request.hints.may_wait:
            raise WorkersBusyError(
                "every worker that could take the request is busy, and it does not wait (do_not_queue, or it is one of "
                "a batch)",
                retry_after_s=self.estimated_wait_s,
            )
        self._desk.check_free(request.request_id)
        applicant = self._applicant(request, settle, ttl_s)
        self._take_in(applicant)
        return applicant

    def give_up(self, applicant: Applicant) -> None:
        """Forget a request whose caller has gone; nothing happens when it was settled."""
        if applicant in self.queue:
            self.queue.remove(applicant)
            self._forget(applicant, "gone")

    def time_out(self, applicant: Applicant) -> None:
        """Settle a request that has waited too long; nothing happens when it was settled."""
        if applicant in self.queue:
            self.queue.remove(applicant)
            self._forget(applicant, "timed_out")
            waited_s = self._clock() - applicant.arrived_at
            applicant.settle(
                QueueTimeoutError(
                    f"every worker that could take the request was busy for {waited_s:.1f} s, and it does not wait "
                    "longer; retry later, add workers, or raise --router-queue-timeout-s",
                    retry_after_s=self.estimated_wait_s,
                )
            )

    def drain(self) -> None:
        """Book every request that can go, each in its turn."""
        if not self.queue or self._draining:
            return
        self._draining = True  # what is booked or released here calls back
        try:
            blocked: set[Hashable] = set()
            while len(blocked) < MOST_BLOCKED and (applicant := self.queue.next(blocked)) is not None:
                if not self._try(applicant):
                    blocked.add(applicant.lane)
        finally:
            self._draining = False

    def _check_free(self, request_id: str) -> None:
        if request_id in self._ids:
            raise DuplicateRequestError(
                f"request_id: {request_id!r} waits in the queue; choose another id",
                metadata={"request_id": request_id},
            )

    def _applicant(
        self, request: RoutingRequest, settle: Callable[[Lease | Exception], None], ttl_s: float | None
    ) -> Applicant:
        hints = request.hints
        decision = self._desk.best_worker(request, remember=False)
        return Applicant(
            (
                request.model,
                hints.worker_id,
                hints.dp_rank,
                hints.allowed_worker_ids,
                hints.required_taints,
                request.exclude,
            ),
            hints.tenant,
            hints.strict_priority,
            hints.priority_jump_s,
            decision.prompt_tokens,
            max(1, decision.prompt_tokens - decision.expected_cached_tokens),
            self._clock(),
            request=request,
            ttl_s=ttl_s,
            settle=settle,
        )

    def _take_in(self, applicant: Applicant) -> None:
        """Let a request wait. It is settled at once when there is no room for it, else by a `drain`."""
        self._ids.add(applicant.request.request_id)
        for dropped in self.queue.push(applicant):
            self._forget(dropped, "refused")
            wait_s = self.estimated_wait_s
            dropped.settle(
                QueueFullError(
                    f"the queue is full; retry in {wait_s:.1f} s, or add workers (--router-queue-size and "
                    "--router-queue-class-sizes bound it)",
                    retry_after_s=wait_s,
                )
            )

    def _try(self, applicant: Applicant) -> bool:
        """Settle a request, unless its targets are busy."""
        outcome: Lease | Exception
        try:
            if self._desk.all_busy(applicant.request):
                return False
        except OverloadedError:
            # It was taken in when somebody was below the thresholds: it waits for that again.
            return False
        except Exception as error:  # noqa: BLE001 - whoever made room has no part in it
            self.queue.remove(applicant)
            outcome = error
        else:
            self.queue.take(applicant, self._clock())
            outcome = self._booked(applicant)
        self._forget(applicant, "admitted")
        applicant.settle(outcome)
        return True

    def _booked(self, applicant: Applicant) -> Lease | Exception:
        try:
            lease = self._desk.lease(applicant.request, applicant.ttl_s)
        except Exception as error:  # noqa: BLE001 - as above
            return error
        lease.decision.queued_s = self._clock() - applicant.arrived_at
        return lease

    def _forget(self, applicant: Applicant, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._ids.discard(applicant.request.request_id)
