from array import array
from collections.abc import Hashable, Sequence

from typing_extensions import Buffer

from kvrouter_grpc.core.radix_tree import RadixTree

class TargetTable:
    """What every target holds and is busy with, a row each. `Decider` reads it.

    Everything booked is taken back with the ticket that `book` gave; a ticket whose target was removed, even if another
    one has the row by now, takes nothing.
    """

    version: int
    """Changes when a row is added or removed."""
    index: RadixTree | None
    """The tree whose slots the rows name; None until `attach`."""

    def add(self, target: Hashable) -> int:
        """The row of a target, made when it is new: nothing held, nothing booked, freshness 0.

        Raises:
            ValueError: There are 2**20 targets already.
        """

    def remove(self, target: Hashable) -> None:
        """Forgets a target and all that is booked on it; nothing happens when it is not known."""

    def row(self, target: Hashable) -> int | None:
        """The row of a target, None when it is not known."""

    def __len__(self) -> int:
        """Targets."""

    def attach(self, index: RadixTree) -> None:
        """Sets the index. Raises ValueError when there is one already."""

    def set_slot(self, row: int, tier: int, slot: int) -> None:
        """Where the index keeps the target's blocks.

        Args:
            row: The target.
            tier: 0 device, 1 host, 2 disk, 3 remote.
            slot: Of the index.

        Raises:
            ValueError: No such tier, or there is no index yet.
            KeyError: The row or the slot is not in use.
        """

    def set_groups(
        self, row: int, groups: Sequence[tuple[int, tuple[int | None, int | None, int | None, int | None]]], step: int
    ) -> None:
        """What the target's KV cache groups hold, when it has several or their blocks span several of the index.

        Args:
            row: The target.
            groups: Of each the blocks that have to be there before a cut (0: all), and its slots by tier. None at all:
                the target has one group again, that of `set_slot`.
            step: A cut is a multiple of this many blocks.

        Raises:
            ValueError: More than 64 groups, or a step out of 1..2**20.
            KeyError: The row or a slot is not in use.
        """

    def overlaps(self, rows: Sequence[int], seqs: Buffer, shared: bool = False) -> list[tuple[int, int, int, int]]:
        """What targets hold of a prompt, in blocks by tier, each tier going on where the one before ends.

        Args:
            rows: The targets.
            seqs: Sequence hashes of the prompt, u64.
            shared: What one target has in the remote tier, all of its pool have.

        Raises:
            KeyError: A row is not in use.
        """

    def set_freshness(self, row: int, freshness: float) -> None:
        """How far the index is to be trusted about the target, 0..1."""

    def describe(
        self,
        row: int,
        *,
        total_blocks: int = 0,
        identity: int = 0,
        pool: int = 0,
        on_cpu: bool = False,
        batch_tokens: int = 0,
    ) -> None:
        """Says what a target is.

        Args:
            row: The target.
            total_blocks: Blocks that its device cache has room for; 0 when not known.
            identity: u64 by which sessions find it, the same in every router.
            pool: u64, the same for all that can use the same blocks: those that serve one model.
            on_cpu: Whether it is of the slower kind that mode device-aware-weighted gives less.
            batch_tokens: Tokens that its engine computes in one step; 0 when not known, then 10,000,000 are taken.
        """

    def load(self, row: int) -> tuple[int, int, int]:
        """(requests in flight, prompt tokens that wait for a first token, distinct blocks pinned), foreign ones too."""

    def within(self, rows: array[int], blocks: float, prefill_tokens: float, prefill_batches: float) -> array[int]:
        """Those of some rows whose load, foreign load included, is not above any of the limits; infinity is none.

        Args:
            rows: `array("I")`.
            blocks: Blocks pinned, as a fraction of those there are; where that is not known they are not limited.
            prefill_tokens: Prompt tokens that wait for a first token.
            prefill_batches: The same, as a multiple of the tokens that the engine computes in one step.

        Returns:
            `rows` itself when that is all of them, else a new `array("I")` in their order.

        Raises:
            KeyError: A row is not in use.
        """

    def waiting(self, row: int) -> int:
        """Requests without a first token, foreign ones too."""

    def total_blocks(self, row: int) -> int:
        """Blocks that the target's device cache has room for; 0 when not known."""

    def foreign(self, row: int) -> tuple[int, int, int, int]:
        """What was given to `set_foreign` last."""

    def set_foreign(self, row: int, requests: int, waiting: int, prefill_tokens: int, blocks: int) -> None:
        """Replaces the load that is assumed to come from elsewhere. It counts in decisions like what was booked.

        Args:
            row: The target.
            requests: In flight.
            waiting: Of those, without a first token.
            prefill_tokens: That those must compute.
            blocks: Pinned.

        Raises:
            ValueError: More wait than there are, or there are more than 2**24.
            OverflowError: A number is not in 0..2**32-1.
        """

    def pinned(self, row: int, seqs: Buffer) -> int:
        """Leading blocks of a prompt (its sequence hashes, u64) that requests in flight on the target pin."""

    def book(self, row: int, seqs: Buffer, prefill_tokens: int, share: bool) -> int:
        """Adds a request to the load of a target.

        Args:
            row: The target.
            seqs: Sequence hashes (u64) of the blocks it pins, from the first block of its prompt on.
            prefill_tokens: Tokens that it must compute before the first one comes.
            share: Whether blocks that others pin are the same blocks; else they are its own.

        Returns:
            The ticket to take it back with.

        Raises:
            MemoryError: There is none; of the booking, at most some blocks at the front stay pinned.
        """

    def first_token(self, ticket: int, prefill_tokens: int) -> None:
        """Takes back the tokens that waited; exactly once per ticket, with the number that was booked."""

    def generated(self, ticket: int, seqs: Buffer, share: bool, blocks: int, weight: float, parts: int) -> int:
        """Counts the output of a request as blocks, and lets what only this request pins fade as it nears its end.

        Output blocks, and the blocks at the end of the prompt that no other request shares, count `weight` each.
        What is shared is looked at here, and stands until the next call.

        Args:
            ticket: The booking.
            seqs: As booked.
            share: As booked.
            blocks: Of output so far.
            weight: What a block counts, 0..1.
            parts: What the call before returned, at first 0.

        Returns:
            The change of the load, in parts of a block, for the next call or `release`.

        Raises:
            ValueError: The weight is not in 0..1, or there are more than 2**20 blocks.
        """

    def release(self, ticket: int, seqs: Buffer, share: bool, parts: int = 0) -> None:
        """Takes back the request and its blocks; once per ticket, with what was booked and last returned."""

    def stats(self) -> dict[str, int]:
        """`rows` in use, `bookings` in force, `pinned_blocks` (shared ones, over all rows) and `bytes`."""
