"""When a stream asks for replays, gives up their answers, and looks for losses: timing alone, without a clock."""

import math
import random

from kvrouter_grpc.config import EventsConfig

REPLAY_INTERVAL_S = 1.0
"""Shortest time between two replay requests: an answer costs the engine's publisher thread up to its whole ring."""

REPLAY_TOTAL_TIMEOUTS = 12
"""Replay timeouts after which even an answer that still drips counts as failed."""

AUDIT_S = 2.0
AUDIT_MAX_S = 60.0
"""Quiet time before the first look for a lost last batch, and the longest between two looks. The wait doubles."""

REPAIR_MAX_S = 3.0
"""The longest while batches are known to be lost that may still be had. What comes of one look need not be fetched
again by the next, and where it is seen not to be had, the looking ends."""


class ReplaySchedule:
    """The times of one stream. All are seconds of the event loop's clock.

    Args:
        config: Timeout and back-off.
        rng: Jitter of the back-off.
        audits: Whether there is a replay port to look for losses at.
    """

    def __init__(self, config: EventsConfig, rng: random.Random, *, audits: bool) -> None:
        self._config = config
        self._rng = rng
        self._audits = audits
        self._asked_at = 0.0
        self._answered_at = 0.0
        self._failures = 0  # replays in a row that timed out
        self._audit_gap = AUDIT_S
        self._audit_at = math.inf
        self.ask_after = 0.0

    @property
    def reply_due(self) -> float:
        """When the answer under way counts as failed."""
        timeout = self._config.replay_timeout_s
        return min(self._answered_at + timeout, self._asked_at + REPLAY_TOTAL_TIMEOUTS * timeout)

    def asked(self, now: float) -> None:
        """A replay is asked for."""
        self._asked_at = self._answered_at = now
        self.ask_after = now + REPLAY_INTERVAL_S

    def answered(self, now: float) -> None:
        """A message of the answer came."""
        self._answered_at = now

    def ended(self) -> None:
        """The answer is complete."""
        self._failures = 0

    def failed(self, now: float) -> None:
        """The answer is given up; the next one is asked for after a while."""
        self._failures += 1
        longest = self._config.replay_backoff_max_s
        backoff = min(self._config.replay_backoff_s * 2 ** min(self._failures, 16), longest)
        self.ask_after = max(self.ask_after, now + backoff * self._rng.uniform(0.5, 1.0))

    def audit_due(self, now: float, *, repairs: bool) -> bool:
        """Whether it is time to look for losses; when it says yes, it takes that to be done.

        Args:
            now: The time.
            repairs: Whether some are known, and are to be made good.
        """
        if now < self._audit_at:
            return False
        self._audit_gap = min(2 * self._audit_gap, REPAIR_MAX_S if repairs else AUDIT_MAX_S)
        self._audit_at = now + self._audit_gap
        return True

    def postpone_audit(self, now: float) -> None:
        """The stream speaks, so what it says next will show what was lost before."""
        if self._audits:
            self._audit_gap = AUDIT_S
            self._audit_at = now + AUDIT_S

    def hasten_audit(self, now: float) -> None:
        """Something was lost just now."""
        if self._audits:
            self._audit_at = min(self._audit_at, now + AUDIT_S)

    def due(self, *, replaying: bool, wants_replay: bool) -> float:
        """When there is something to do without any message."""
        if replaying:
            return min(self._audit_at, self.reply_due)
        return min(self._audit_at, self.ask_after) if wants_replay else self._audit_at
