from array import array
from typing import TypeAlias

from kvrouter_grpc.core.choice import Choice
from kvrouter_grpc.core.policy import Policy

Facts: TypeAlias = tuple[float, int, int, int, int, int, int, bool, tuple[int, int, int, int], int, int, float]
"""Of a candidate: freshness; queued prefill tokens; pinned blocks of its own, in parts of 2**-16; pinned blocks that
are shared; requests in flight; of those, waiting; blocks of its cache, 0 when not known; whether it is on a CPU; blocks
of the prompt that it holds, by tier; that requests in flight pin; its identity for sessions, 0 when there was none; the
request's preference for its taints."""

class Recording:
    """A decision with everything that it read. It can be explained later, and made again, under other policies, too.

    Candidates are counted from 0 in the order in which they were asked.
    """

    policy: Policy
    occasion: object
    """Of the shortlist it chose from."""
    request_id: str
    sequence: array[int] | None
    """The sequence hashes of the prompt, where the log keeps them."""
    at: float
    """Seconds since the epoch."""
    count: int
    """Candidates."""
    picked: int
    """The candidate that was picked."""
    blocks: int
    """Full blocks of the prompt."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def block_size(self) -> int:
        """Tokens per block; 0 while it was not known."""

    @property
    def output_tokens(self) -> int:
        """Tokens that the answer was expected to have."""

    @property
    def regret(self) -> float:
        """Tokens that requests had waited for the same prefix; see `regret.pxd`."""

    @property
    def turn(self) -> int:
        """Of mode round-robin."""

    @property
    def session(self) -> int | None:
        """Hash of the session."""

    @property
    def seed(self) -> int:
        """State of the random generator before the choice."""

    def row(self, i: int) -> int:
        """Row of a candidate in the table of that time; in a restored recording its number. Raises IndexError."""

    def facts(self) -> list[Facts]:
        """What was read of every candidate."""

    def loads(self) -> list[tuple[int, int, int, int, int]]:
        """(requests in flight, of those waiting, queued prefill tokens, active blocks, total blocks) of each."""

    def candidates(self, policy: Policy | None = None) -> list[Choice]:
        """Every candidate with what it costs under a policy, None: under its own."""

    def verdict(self, policy: Policy | None = None) -> tuple[int, list[float], list[float]]:
        """The decision, made again.

        Returns:
            The candidate that is picked, and of each its score (the lowest wins; infinity never does) and how likely it
            was to be picked. Under its own policy the pick is the one that was made.
        """

    @staticmethod
    def restore(
        policy: Policy,
        occasion: object,
        request_id: str,
        *,
        at: float,
        tokens: int,
        output_tokens: int,
        block_size: int,
        turn: int,
        session: int | None,
        dice: int,
        picked: int,
        regret: float,
        rows: list[Facts],
    ) -> Recording:
        """A recording made of what another one told.

        Raises:
            ValueError: It cannot have been so; so OverflowError and TypeError.
        """
