"""The work this router has booked on every target.

Load is counted at the decision, not scraped: a request is booked before the next decision is made, so a burst does not
herd onto the worker that looked idle a moment ago. Every booking is a lease that ends on every path; one that nobody
ends expires.
"""

import heapq
from array import array
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from kvrouter_grpc.core import TargetTable
from kvrouter_grpc.errors import DuplicateRequestError, UnknownReservationError
from kvrouter_grpc.routing.forecast import Prediction
from kvrouter_grpc.routing.prediction import Expectation
from kvrouter_grpc.types import Decision, Target


class TargetLoad(NamedTuple):
    """Work on one target at this moment: what was booked, and what is assumed to come from elsewhere."""

    active_requests: int = 0
    queued_prefill_tokens: int = 0  # uncached prompt tokens sent that have no first token yet
    active_blocks: int = 0  # distinct blocks pinned by requests in flight; a shared prefix counts once


class ForeignPart(NamedTuple):
    """The part of a target's load that is assumed to come from elsewhere; see `foreign.py`."""

    requests: int = 0
    waiting_requests: int = 0
    prefill_tokens: int = 0
    blocks: int = 0


class Output(NamedTuple):
    """How the answer of a request grows into blocks."""

    block_size: int
    room: int  # tokens that the last block of the prompt still takes
    expected_tokens: int  # 0 when not known

    @classmethod
    def after(cls, prompt_tokens: int, block_size: int, expected_tokens: int | None) -> Self:
        """The output that follows a prompt."""
        return cls(block_size, -prompt_tokens % block_size, expected_tokens or 0)

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens take beyond those of the prompt."""
        return -(-max(0, tokens - self.room) // self.block_size)

    def weight(self, tokens: int) -> float:
        """What a block counts when so many tokens are there: less the nearer the expected end, when that is known."""
        return max(0.0, 1 - tokens / self.expected_tokens) if self.expected_tokens else 1.0


class Booking(NamedTuple):
    """What a request adds to the load of its target."""

    seqs: "array[int]"  # sequence hashes of the blocks it pins, from the first of its prompt on
    prefill_tokens: int  # uncached tokens that must be computed before its first token
    share_blocks: bool = True  # blocks with equal hashes are pinned once
    output: Output | None = None  # None: what it generates is not counted


class Lease:
    """A booking that is in force until `release()`; also a context manager that releases at the end.

    Attributes:
        request_id: Name of the request, unique in its table.
        decision: The decision that was booked.
        expires_at: Clock reading at which the lease ends by itself; infinity for the lease of a live stream.
        prediction: What it lets the router predict of its target's cache, where that is predicted.
        expectation: What is expected of its target's cache, to be compared with what its engine finds.
        prefilling: Whether its prompt is still to be computed.
        released: Whether it has ended.
        counts_output: Whether `generated` has any effect.
    """

    __slots__ = (
        "_booking",
        "_output_blocks",
        "_output_parts",
        "_output_tokens",
        "_table",
        "_ticket",
        "counts_output",
        "decision",
        "expectation",
        "expires_at",
        "prediction",
        "prefilling",
        "released",
        "request_id",
    )

    def __init__(
        self, table: "LoadTable", request_id: str, decision: Decision, booking: Booking, ticket: int, expires_at: float
    ) -> None:
        self.request_id = request_id
        self.decision = decision
        self.expires_at = expires_at
        self.prediction: Prediction | None = None
        self.expectation: Expectation | None = None
        self._table = table
        self._booking = booking
        self._ticket = ticket
        self.prefilling = True
        self._output_tokens = self._output_blocks = self._output_parts = 0
        self.counts_output = booking.output is not None
        self.released = False

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer that `generated` has counted."""
        return self._output_tokens

    @property
    def expires_in_s(self) -> float:
        """Seconds until it ends by itself."""
        return self.expires_at - self._table.clock()

    def first_token(self) -> None:
        """The prompt is computed: it no longer waits. Idempotent."""
        if self.prefilling:
            self._prefilled()
            self._table.relieved()

    def _prefilled(self) -> None:
        self.prefilling = False
        self._table.targets.first_token(self._ticket, self._booking.prefill_tokens)

    def generated(self, tokens: int) -> None:
        """So many more tokens of the answer are there. Costs next to nothing but where a block begins."""
        output = self._booking.output
        if output is None or self.released:
            return
        self._output_tokens += tokens
        blocks = output.blocks(self._output_tokens)
        if blocks > self._output_blocks:
            self._output_blocks = blocks
            seqs, _, share, _ = self._booking
            weight = output.weight(self._output_tokens)
            parts = self._output_parts
            self._output_parts = self._table.targets.generated(self._ticket, seqs, share, blocks, weight, parts)

    def release(self) -> None:
        """Take everything back. Idempotent."""
        if self.released:
            return
        if self.prediction is not None:
            self.prediction.end(self._table.clock(), computed=not self.prefilling)
        if self.prefilling:
            self._prefilled()
        self.released = True
        seqs, _, share, _ = self._booking
        self._table.targets.release(self._ticket, seqs, share, self._output_parts)
        self._table.forget(self)
        self._table.relieved()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class LoadTable:
    """Leases by request id, over the rows of their targets.

    Args:
        targets: The rows. What is booked on a target that is removed goes with it; its leases release into nothing.
        clock: Monotonic seconds.
        expiry_s: Life of a lease that nobody releases.
    """

    def __init__(self, targets: TargetTable, clock: Callable[[], float], expiry_s: float) -> None:
        self.expired = 0  # leases that nobody released
        self.on_relief: Callable[[], None] | None = None  # called when a target has become less busy
        self.targets = targets
        self.clock = clock
        self._expiry_s = expiry_s
        self._leases: dict[str, Lease] = {}
        self._deadlines: list[tuple[float, int, Lease]] = []
        self._count = 0

    def __len__(self) -> int:
        """Leases in force."""
        return len(self._leases)

    def load(self, target: Target) -> TargetLoad:
        """The load of `target`; nothing when it is not known."""
        row = self.targets.row(target)
        return TargetLoad(*self.targets.load(row)) if row is not None else TargetLoad()

    def foreign(self, target: Target) -> ForeignPart:
        """The part of `load` that was not booked here."""
        row = self.targets.row(target)
        return ForeignPart(*self.targets.foreign(row)) if row is not None else ForeignPart()

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
            KeyError: The target is not known.
        """
        self.check_free(request_id)
        expires_at = self.clock() + (ttl_s if ttl_s is not None else self._expiry_s)
        row = self.targets.row(decision.target)
        if row is None:
            raise KeyError(decision.target)
        ticket = self.targets.book(row, booking.seqs, booking.prefill_tokens, booking.share_blocks)
        lease = Lease(self, request_id, decision, booking, ticket, expires_at)
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

    def relieved(self) -> None:
        """Called when a target has become less busy."""
        if self.on_relief is not None:
            self.on_relief()

    def expire(self) -> None:
        """Release every lease that is past its time. Called before each decision; costs little when none is due."""
        if not self._deadlines:
            return
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, lease = heapq.heappop(self._deadlines)
            if not lease.released:
                self.expired += 1
                lease.release()
