from collections.abc import Callable, Mapping
from typing import TypeAlias, final

from kvrouter_grpc.core.radix_tree import RadixTree

CacheGroup: TypeAlias = tuple[str, int, int, int, tuple[int | None, int | None, int | None, int | None]]

class BatchError(Exception):
    """The engine's fault: a payload that is no event batch. The text names the part and never quotes the payload."""

@final
class Applied:
    """What one message did."""

    @property
    def stored(self) -> int:
        """Blocks in its store events, indexed or not."""

    @property
    def removed(self) -> int:
        """Blocks in its removal events."""

    @property
    def skipped(self) -> int:
        """Events of unknown kind or broken shape, left out one by one."""

    @property
    def cleared(self) -> bool:
        """Whether the engine dropped its whole cache."""

@final
class KvFeed:
    """Applies the messages of one target's event stream to the tree.

    A message is read as a whole before anything of it is applied, so an unreadable one changes nothing; an event that
    cannot be read is left out, and so are unknown kinds and fields. Both generations of vLLM's events are understood,
    as arrays and as maps.

    Stores whose parent is unknown wait, up to 65,536 blocks and 64 MiB, for the parent to appear; the oldest are given
    up first. Bounds: 65,536 events per message, 2**20 blocks per event and tokens per block, 64 groups.

    Every KV cache group of a hybrid model has slots of its own. Blocks that span several blocks of the tree are held as
    all of those. A group that keeps only part of a prompt may name its blocks by hash alone: they are found where
    another group or tier told their tokens. What is smaller than a block of its group, the tail of a prompt, is left
    out.

    Args:
        learn: Called with the block size of a group's first blocks, and again whenever blocks of another size come, and
            whether the model has several groups. It returns the tree that they belong in, None for none: then they are
            left out. For several groups it is first asked with the largest size that divides those of all.
        place: Called with a group and a tier, as its number in `Tier`, when that is first used. It returns a new slot
            of the tree.
        arrange: Called with `cache_groups()` after a message that changed them.
    """

    def __new__(
        cls,
        learn: Callable[[int, bool], RadixTree | None],
        place: Callable[[int, int], int],
        arrange: Callable[[list[CacheGroup]], None],
    ) -> KvFeed: ...
    def cache_groups(self) -> list[CacheGroup]:
        """What is known of the KV cache groups, by their index.

        Returns:
            Of each its kind (`prefix`, `window`, `state`; `nothing`: its blocks are never shared; `other`: not known;
            "" when none of its stores was seen), its window in tokens, its block size in tokens (0: none are indexed),
            the blocks of the tree that one of its blocks spans, and its slots by tier.
        """

    def apply(self, payload: bytes) -> Applied:
        """Apply one message. Messages must come in order.

        Raises:
            BatchError: The payload is no event batch.
            MemoryError: There was none; what was applied until then stays.
        """

    def adopt(
        self, tree: RadixTree, index: int, kind: str, window: int, block_size: int, slots: Mapping[int, int]
    ) -> None:
        """Go on with a KV cache group as if events had told of it, and with what its slots hold already.

        Args:
            tree: The tree.
            index: Of the group, and the next three as in `cache_groups`.
            kind: What it is.
            window: In tokens.
            block_size: In tokens.
            slots: Of the tree, by tier.

        Raises:
            ValueError: There can be no such group.
            KeyError: A slot is not in use.
        """

    def clear(self) -> None:
        """Forget all that the target holds, orphans included."""

    def close(self) -> None:
        """End the feed: its slots are about to be removed, and what is left of a message being applied is void."""

    @property
    def orphans(self) -> int:
        """Blocks that wait for their parent."""

    @property
    def adopted(self) -> int:
        """Orphaned blocks whose parent appeared."""

    @property
    def dropped(self) -> int:
        """Orphaned blocks given up for lack of room."""

    @property
    def bytes(self) -> int:
        """Memory that the orphans and groups take."""
