"""Which target each session is bound to: a session stays where its prefix is cached until it was idle for a while."""

from kvrouter_grpc.core import hash_bytes
from kvrouter_grpc.types import RoutingHints, Target

MOST_SESSIONS = 1 << 17
"""Sessions that are remembered; the one idle for longest goes first. Some 25 MB."""


def session_of(hints: RoutingHints) -> int | None:
    """The hash of the session that a request belongs to; None without one."""
    return hash_bytes(hints.session_id.encode(), 0) if hints.session_id else None


class Sessions:
    """Bindings that end when they are not used. Pure: the time is passed in and never goes back.

    Args:
        ttl_s: Seconds without a request after which a session is free again.
        most: Sessions that are remembered.
    """

    def __init__(self, ttl_s: float, most: int = MOST_SESSIONS) -> None:
        self._ttl_s = ttl_s
        self._most = most
        self._bound: dict[int, tuple[Target, float]] = {}  # session -> target and end; the next to end comes first

    def __len__(self) -> int:
        return len(self._bound)

    def find(self, session: int, now: float) -> Target | None:
        """The target that a session is bound to."""
        self._expire(now)
        bound = self._bound.get(session)
        return bound[0] if bound is not None else None

    def bind(self, session: int, target: Target, now: float) -> None:
        """Bind a session to the target it was sent to, for another `ttl_s`."""
        self._expire(now)
        self._bound.pop(session, None)
        if len(self._bound) >= self._most:
            del self._bound[next(iter(self._bound))]
        self._bound[session] = target, now + self._ttl_s

    def _expire(self, now: float) -> None:
        while self._bound:
            session, (_, end) = next(iter(self._bound.items()))
            if end > now:
                return
            del self._bound[session]
