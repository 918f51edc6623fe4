from array import array
from collections.abc import Mapping, Sequence
from typing import Self, final

from typing_extensions import Buffer

@final
class RadixTree:
    """Which slot holds which KV blocks, and how much of a prompt's prefix.

    A *slot* is a small integer that stands for one place blocks can lie in: one worker, data-parallel rank and tier.
    A slot holds engine hashes, opaque names that the engine gave to its blocks; each names one block of the tree,
    identified by its chained sequence hash. Three rules make the answers exact:

    - Engine hashes are counted. A hash stored twice is held until it was removed twice, because engines store a
      hash once per physical block. (The count stops at 262,143.)
    - Two engine hashes of a slot may name the same block; it is held until both are gone. One that is stored again
      for another block is a conflict: the newest wins.
    - Gaps are allowed. When a block in mid-prefix is removed and stored again, the blocks behind it, which the slot
      never let go of, count again.

    The tree is path-compressed: a lookup costs one step per edge of its path, evicting from the tail only lowers a
    number, and memory is proportional to what is held. All hash buffers are C-contiguous and aligned; a call is
    atomic and never leaves the tree in an undefined state.

    Args:
        block_size: Tokens per block, 1..2**20.
        max_bytes: Most memory the tree may take; 0 for no limit.

    Raises:
        ValueError: A number or buffer out of its bounds (see each method).
        KeyError: The slot is not in use.
        MemoryError: No memory, or over `max_bytes`. The tree stays consistent; of the blocks of that call, some
            at the front may have been processed.
    """

    def __new__(cls, block_size: int, *, max_bytes: int = 0) -> Self: ...
    @property
    def block_size(self) -> int:
        """Tokens per block."""

    def add_slot(self) -> int:
        """Takes the lowest free slot id into use."""

    def remove_slot(self, slot: int) -> None:
        """Clears a slot and frees its id."""

    def clear(self, slot: int) -> int:
        """Drops all that a slot holds, in time proportional to that. Returns how many engine hashes it held."""

    def store(
        self,
        slot: int,
        parent: int | None,
        engine_hashes: Buffer,
        tokens: Buffer,
        seed: int,
        mm_hashes: Mapping[int, Sequence[int]] | None = None,
        parent_slot: int = -1,
    ) -> bool:
        """Stores consecutive blocks.

        Args:
            slot: Who holds them.
            parent: Engine hash of the block before the first one; None: they begin a prompt.
            engine_hashes: u64, one per block, at most 2**20.
            tokens: u32, `block_size` per block; more are ignored.
            seed: See `seed_for`; only used without a parent, with one the prompt's own seed goes on.
            mm_hashes: As in `hash_blocks`; block indices count from the first block of this call.
            parent_slot: The slot that knows the parent, if not `slot` (-1).

        Returns:
            False if the parent is unknown: nothing was changed.

        Raises:
            ValueError: Too few tokens, too many blocks, a number that is no u64, or a wrong buffer type.
        """

    def store_path(self, slot: int, seqs: Buffer, seed: int) -> None:
        """Stores a path from the root whose engine hashes are its own sequence hashes.

        Args:
            slot: Who holds it.
            seqs: Chained sequence hashes of a prompt, u64, as `hash_sequence` gives them.
            seed: The seed they were made with.
        """

    def store_known(self, slot: int, from_slot: int, engine_hashes: Buffer) -> int:
        """Stores those engine hashes that another slot knows (events of lower tiers carry no tokens).

        Returns:
            How many were known to `from_slot`; the others are ignored.
        """

    def remove(self, slot: int, engine_hashes: Buffer) -> int:
        """Takes one reference from each engine hash (u64). Returns how many were unknown; those are ignored."""

    def remove_path(self, slot: int, seqs: Buffer) -> None:
        """Takes back what `store_path` stored: one reference from each hash, the last one first.

        Unknown ones are ignored.
        """

    def doubt(self, slot: int) -> int:
        """Doubts all that the slot holds: events were lost, so some of it may be gone. It counts as held all the same.

        A block that is stored again is doubted no longer, and counts as stored once.

        Returns:
            How many engine hashes that are.
        """

    def drop_doubted(self, slot: int, most: int, *, prefixes: bool = False) -> int:
        """Drops doubted blocks. Those that are kept for their vouchers are doubted no longer.

        Args:
            slot: Whose.
            most: How many at most, 1 to 2**20: it takes time.
            prefixes: Whether a block that is not doubted vouches for all blocks above it: nothing is computed behind a
                prefix that is not held. So it is in the first tier of a full attention group.

        Returns:
            How many; 0 when no doubt is left.
        """

    def holds(self, slot: int, engine_hash: int) -> bool:
        """Whether the slot holds this engine hash."""

    def position(self, slot: int, engine_hash: int) -> tuple[int, int] | None:
        """(sequence hash, number of blocks before it) of an engine hash; None if the slot does not hold it."""

    def match(self, seqs: Buffer, out: array[int] | None = None) -> array[int]:
        """For every slot the length of the longest prefix all of whose blocks it holds.

        Args:
            seqs: Chained sequence hashes of the prompt, u64, at most 2**20. (Unchained ones give a meaningless
                answer, nothing worse.)
            out: An `array("I")` to write to, with at least one entry per slot id; surplus entries become 0.

        Returns:
            `out`, or a new array: index = slot, value = blocks. Ids that are not in use have 0.
        """

    def extend(self, seqs: Buffer, slot: int, start: int) -> int:
        """How many blocks of `seqs` the slot holds from position `start` on, whoever holds those before.

        This is how a lower tier goes on where the tier above it ends.
        """

    def blocks(self, slot: int) -> int:
        """How many distinct engine hashes the slot holds."""

    def stored(self, slot: int) -> int:
        """How many blocks were stored in the slot since it was added, one that was stored twice counted twice."""

    def stats(self) -> dict[str, int]:
        """Sizes and counters.

        Returns:
            `slots` in use, `blocks` (distinct engine hashes over all slots), `edges`, `runs`, `bytes` (all memory
            of the tree, with the allocator's overhead), and since the start `splits`, `merges`, `duplicates` (an
            engine hash stored again), `conflicts` (stored again for another block), `unknown_removes`.
        """

    def _check(self) -> None:
        """Raises AssertionError unless every link, size and count agrees with the others. For tests."""
