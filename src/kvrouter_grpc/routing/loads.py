"""The work this router has booked on every target.

Load is counted at the decision, not scraped: a request is booked before the next decision is made, so a burst does not
herd onto the worker that looked idle a moment ago. Every booking is a lease that ends on every path; one that nobody
ends expires.
"""

import heapq
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvrouter_grpc.errors import DuplicateRequestError, UnknownReservationError
from kvrouter_grpc.types import Decision, Target


@dataclass(slots=True, eq=False)
class TargetLoad:
    """Work booked on one target."""

    active_requests: int = 0
    queued_prefill_tokens: int = 0  # uncached prompt tokens sent that have no first token yet
    shared_blocks: dict[int, int] = field(default_factory=dict)  # sequence hash -> requests in flight that pin it
    private_blocks: int = 0  # blocks pinned by requests that share none (`assume_kv_reuse` off)

    @property
    def active_blocks(self) -> int:
        """Distinct blocks pinned by requests in flight; a shared prefix counts once."""
        return len(self.shared_blocks) + self.private_blocks

    def in_flight_overlap(self, seqs: "array[int]") -> int:
        """Leading blocks of a prompt that requests in flight pin: they will be cached before it is computed.

        Every request pins its prompt from the start, so what is pinned is closed under prefixes and the length is
        found by bisection.
        """
        pinned = self.shared_blocks
        if not pinned or not seqs or seqs[0] not in pinned:
            return 0
        low, high = 1, len(seqs)
        while low < high:
            middle = (low + high + 1) // 2
            if seqs[middle - 1] in pinned:
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(frozen=True, slots=True)
class Booking:
    """What a request adds to the load of its target."""

    seqs: "array[int]"  # sequence hashes of the blocks it pins
    prefill_tokens: int  # uncached tokens that must be computed before its first token
    share_blocks: bool = True  # blocks with equal hashes are pinned once


class Lease:
    """A booking that is in force until `release()`; also a context manager that releases at the end.

    Attributes:
        request_id: Name of the request, unique in its table.
        decision: The decision that was booked.
        expires_at: Clock reading at which the lease ends by itself; infinity for the lease of a live stream.
    """

    __slots__ = ("_booking", "_load", "_prefilling", "_table", "decision", "expires_at", "request_id")

    def __init__(
        self,
        table: "LoadTable",
        request_id: str,
        decision: Decision,
        booking: Booking,
        load: TargetLoad,
        expires_at: float,
    ) -> None:
        self.request_id = request_id
        self.decision = decision
        self.expires_at = expires_at
        self._table = table
        self._booking = booking
        self._load: TargetLoad | None = load
        self._prefilling = True
        load.active_requests += 1
        load.queued_prefill_tokens += booking.prefill_tokens
        if booking.share_blocks:
            pinned = load.shared_blocks
            for seq in booking.seqs:
                pinned[seq] = pinned.get(seq, 0) + 1
        else:
            load.private_blocks += len(booking.seqs)

    @property
    def expires_in_s(self) -> float:
        """Seconds until it ends by itself."""
        return self.expires_at - self._table.clock()

    @property
    def released(self) -> bool:
        """Whether it has ended."""
        return self._load is None

    def first_token(self) -> None:
        """The prompt is computed: it no longer waits. Idempotent."""
        if self._load is not None and self._prefilling:
            self._prefilling = False
            self._load.queued_prefill_tokens -= self._booking.prefill_tokens

    def release(self) -> None:
        """Take everything back. Idempotent."""
        load = self._load
        if load is None:
            return
        self.first_token()
        self._load = None
        load.active_requests -= 1
        if self._booking.share_blocks:
            pinned = load.shared_blocks
            for seq in self._booking.seqs:
                left = pinned[seq] - 1
                if left:
                    pinned[seq] = left
                else:
                    del pinned[seq]
        else:
            load.private_blocks -= len(self._booking.seqs)
        self._table.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class LoadTable:
    """Loads by target and leases by request id.

    Args:
        clock: Monotonic seconds.
        expiry_s: Life of a lease that nobody releases.
    """

    def __init__(self, clock: Callable[[], float], expiry_s: float) -> None:
        self.expired = 0  # leases that nobody released
        self.clock = clock
        self._expiry_s = expiry_s
        self._loads: dict[Target, TargetLoad] = {}
        self._leases: dict[str, Lease] = {}
        self._deadlines: list[tuple[float, int, Lease]] = []
        self._count = 0

    def __len__(self) -> int:
        """Leases in force."""
        return len(self._leases)

    def add(self, target: Target) -> TargetLoad:
        """The load of `target`, made when it is new."""
        return self._loads.setdefault(target, TargetLoad())

    def remove(self, target: Target) -> None:
        """Forget a target. Leases on it stay valid and release into nothing."""
        self._loads.pop(target, None)

    def load(self, target: Target) -> TargetLoad:
        """The load of `target`; an empty one when it is not known."""
        return self._loads.get(target) or TargetLoad()

    def check_free(self, request_id: str) -> None:
        """Make sure that no lease has this id.

        Raises:
            DuplicateRequestError: One has.
        """
        if request_id in self._leases:
            raise DuplicateRequestError(
                f"request_id: {request_id!r} is in flight; choose another id or Free it first",
                metadata={"request_id": request_id},
            )

    def book(self, request_id: str, decision: Decision, booking: Booking, ttl_s: float | None = None) -> Lease:
        """Put a request on its target.

        Raises:
            DuplicateRequestError: The id is in use.
        """
        self.check_free(request_id)
        expires_at = self.clock() + (ttl_s if ttl_s is not None else self._expiry_s)
        lease = Lease(self, request_id, decision, booking, self.add(decision.target), expires_at)
        self._leases[request_id] = lease
        self._count += 1
        heapq.heappush(self._deadlines, (expires_at, self._count, lease))
        return lease

    def lease(self, request_id: str) -> Lease:
        """The lease with this id.

        Raises:
            UnknownReservationError: It was released, it expired, or it never was.
        """
        lease = self._leases.get(request_id)
        if lease is None:
            raise UnknownReservationError(
                f"request_id: no reservation {request_id!r} is open; it was freed, it expired, or it never was",
                metadata={"request_id": request_id},
            )
        return lease

    def forget(self, lease: Lease) -> None:
        """Called by a lease when it ends."""
        self._leases.pop(lease.request_id, None)
        # Ended leases leave the heap when they come up; when most of it is dead, it is built anew.
        if len(self._deadlines) > 64 + 2 * len(self._leases):
            self._deadlines = [entry for entry in self._deadlines if not entry[2].released]
            heapq.heapify(self._deadlines)

    def expire(self) -> None:
        """Release every lease that is past its time. Called before each decision; costs nothing when none is due."""
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, lease = heapq.heappop(self._deadlines)
            if not lease.released:
                self.expired += 1
                lease.release()
