"""Shares the event loop between the KV events and everybody else: a state machine without I/O and without a clock.

A call takes some ten turns of the event loop, so a storm of events that takes a slice of every turn delays it ten
times. But the loop itself tells whether anybody else needs it: by the CPU time that passed on its thread since the last
slice. As long as that is next to none, slices follow each other with two turns in between, in which a call that has
just arrived shows itself. From then on there is one slice per pause, long enough for a whole decision, until a pause
has passed in which nobody worked.

When everything is worked off, what comes next is gathered for a while: to look at a stream costs as much as the
messages that it has by then, and each costs the engine tens of milliseconds anyway.
"""

import math

SLICE_S = 0.000_2
"""Length of a slice: how long a call may wait that arrives amid one."""

PAUSE_S = 0.001
"""Time between two slices while others work: the event loop's timers are no finer, and a decision takes half of it."""

GATHER_S = 0.004
"""Time between two slices when the first has left nothing to do. What comes after a longer rest does not wait."""

OTHERS_S = 0.000_02
"""CPU time since the last slice above which others are at work; an empty turn takes 1 us, a call 100 to 300 us."""

FLOOR = 0.2
"""Share of the time that events get however busy others are."""

LONGEST_SLICE_S = 0.001
"""Longest slice: what the floor may come to when others keep the loop long."""


class Pacer:
    """Says when the next slice of work on events may begin and how long it may take.

    All times are seconds: `now` of a monotonic clock, `cpu` of the CPU time that the loop's thread has spent, without
    what the event plane spends outside slices.
    """

    def __init__(self) -> None:
        self._ended = -math.inf  # of the last slice
        self._cpu = 0.0  # at that time
        self._waiting_since: float | None = None  # there is work to do
        self._backlog = False  # the last slice left some
        self._others = False  # somebody else worked lately

    def slice(self, now: float, cpu: float) -> float:
        """How long may be worked now; 0.0 for not at all: wait for `pause` and ask again."""
        if not self._backlog and now - self._ended < GATHER_S:
            return 0.0
        if self._waiting_since is None:
            self._waiting_since = now
        rested = now - self._ended >= PAUSE_S
        if cpu - self._cpu > OTHERS_S:
            self._others = True
        elif rested:
            self._others = False
        if self._others and not rested:
            return 0.0
        if not self._others:
            return SLICE_S
        waited = now - self._waiting_since
        return min(max(waited * FLOOR / (1 - FLOOR), SLICE_S), LONGEST_SLICE_S)

    def pause(self, now: float) -> float:
        """Seconds to wait after `slice` said no."""
        return PAUSE_S if self._backlog else max(self._ended + GATHER_S - now, 0.0)

    def worked(self, now: float, cpu: float, *, more: bool) -> None:
        """A slice is over; whether there is more to do."""
        self._ended, self._cpu = now, cpu
        self._waiting_since = now if more else None
        self._backlog = more
