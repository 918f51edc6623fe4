"""How the picture of a rank becomes true again after events were lost for good, without losing what is true of it.

Lost events may have removed blocks, which then seem to be cached for ever, and may have stored some, which nobody sees.
To forget everything and to begin with what the engine's ring still holds would cure the first and make the second far
worse: a system prompt that was stored once, long ago, would be missing, and all that is stored below it could not be
placed. So the picture stays, doubted (`core/doubt.pxd`), and the engine's further events tell what of it is true. It
evicts what was not used for the longest time; when as many blocks have been stored as there is room for, all that was
not used meanwhile has gone. What was used has shown itself: a prompt stores what is new of it below what was cached.
The rest is dropped, and the picture claims nothing any more that is not there.

What it may lack is what was cached unseen: blocks that the lost events stored, and blocks that were only read
meanwhile, by prompts that added not one block. To lack them costs little, and ends when they are evicted.
"""

from collections.abc import Iterable
from typing import NamedTuple

from kvrouter_grpc.core import RadixTree

MOST_DROPPED = 4096
"""Blocks dropped at a time, about half a millisecond."""


class SlotFacts(NamedTuple):
    """What the rule has to know of a slot."""

    slot: int
    room: int  # blocks of the index that fit into it; 0: not known
    prefixes: bool  # whether nothing is stored in it behind a prefix that it does not hold


class Renewal:
    """The way of one rank's slots back to truth. Begins when it is made.

    Args:
        tree: The slots' tree.
        slots: Everything that the rank holds.
    """

    def __init__(self, tree: RadixTree, slots: Iterable[SlotFacts]) -> None:
        self._tree = tree
        self._doubted: dict[SlotFacts, int] = {}  # up to which count of stored blocks
        for facts in slots:
            held = tree.doubt(facts.slot)
            if held:
                self._doubted[facts] = tree.stored(facts.slot) + max(held, facts.room)

    def done(self) -> bool:
        """Whether nothing is doubted any more. Does a slice of what there is to do for it."""
        for facts, due in list(self._doubted.items()):
            if self._tree.stored(facts.slot) < due:
                continue
            if not self._tree.drop_doubted(facts.slot, MOST_DROPPED, prefixes=facts.prefixes):
                del self._doubted[facts]
            break
        return not self._doubted
