from collections.abc import Callable
from typing import final

from kvrouter_grpc.core.radix_tree import RadixTree

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
    up first. KV cache groups that hold no prefixes (sliding windows, state spaces) are left out, and so are their
    removals. Bounds: 65,536 events per message, 2**20 blocks per event and tokens per block, 64 groups.

    Args:
        learn: Called with the block size of the first blocks with tokens, and again whenever blocks of another size
            come. It returns the tree that they belong in, None for none: then they are left out.
        place: Called with a tier, as its number in `Tier`, when it is first used. It returns a new slot of the tree.
    """

    def __new__(cls, learn: Callable[[int], RadixTree | None], place: Callable[[int], int]) -> KvFeed: ...
    def apply(self, payload: bytes) -> Applied:
        """Apply one message. Messages must come in order.

        Raises:
            BatchError: The payload is no event batch.
            MemoryError: There was none; what was applied until then stays.
        """

    other_groups: int
    """KV cache groups seen that hold no prefixes, a bit set."""

    def adopt(self, tree: RadixTree, tier: int, slot: int) -> None:
        """Go on with what a slot holds already, as if events had stored it."""

    def clear(self) -> None:
        """Forget all that the target holds, orphans included."""

    def close(self) -> None:
        """End the feed: its slots are about to be removed, and what is left of a message being applied is void."""

    @property
    def orphans(self) -> int:
        """Blocks that wait for their parent."""

    @property
    def dropped(self) -> int:
        """Orphaned blocks given up for lack of room."""

    @property
    def bytes(self) -> int:
        """Memory that the orphans take."""
