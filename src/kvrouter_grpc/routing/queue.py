"""The order in which requests that wait are let go: a state machine that knows neither workers nor clocks.

Of those that may go at all, a request of the highest strict priority goes first. Within one strict priority the
tenants take turns by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), counted in tokens to compute: while
two tenants both wait, what the one was given never exceeds what the other was given by more than the largest request of
each. Within a tenant the policy orders:

- fcfs: by arrival, each counted `priority_jump_s` earlier;
- lcfs: the newest first, each counted `priority_jump_s` later;
- wspt: by (1 + `priority_jump_s`) / tokens to compute, the shortest job first unless its weight says otherwise.

Requests of one *lane* can be taken by the same targets, so they wait for the same reason. One that must wait does not
hold up those of other lanes.

Where there is no room for a newcomer, the tenant that has the most requests waiting loses its last one, in the lowest
strict priority; so a flood costs those who send it.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, Literal, NamedTuple, TypeVar

Policy = Literal["fcfs", "lcfs", "wspt"]

MOST_TOKENS = 1 << 26
"""Prompt tokens that may wait at an endpoint: their ids are kept meanwhile, 256 MiB of them."""
MOST_REMEMBERED = 4096
"""Tenants that have nothing waiting but are ahead of the others, over all priorities. Names come from requests."""
DEPARTURES = 64
"""Requests let go last, by whose rate waits are estimated."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.1, 60.0
"""Bounds of an estimated wait: it is told to clients, who come back after it."""
UNKNOWN_WAIT_S = 1.0

_rank = attrgetter("rank")


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits.

    Attributes:
        lane: The same for all requests that the same targets may take.
        tenant: On whose account it goes.
        strict_priority: Higher ones go first.
        priority_jump_s: See the module.
        prompt_tokens: Kept in memory meanwhile.
        work: Of these the tokens still to be computed, at least 1.
        arrived_at: Clock reading.
        rank: Its place within its lane and tenant, lowest first; set by the queue.
    """

    lane: Hashable
    tenant: str = ""
    strict_priority: int = 0
    priority_jump_s: float = 0.0
    prompt_tokens: int = 1
    work: int = 1
    arrived_at: float = 0.0
    rank: tuple[float, int] = (0.0, 0)


class ClassStatus(NamedTuple):
    """The requests of one strict priority that wait."""

    strict_priority: int
    waiting: int
    tokens: int  # still to be computed
    oldest_at: float  # arrival of the one that waits longest


_W = TypeVar("_W", bound=Waiting)


@dataclass(slots=True)
class _Tenant(Generic[_W]):
    """What waits of one tenant in one band."""

    start: int  # its turn, in the band's virtual time; lowest first
    turn: int  # tells tenants of one start apart: who came first
    waiting: int = 0
    lanes: dict[Hashable, list[_W]] = field(default_factory=dict)  # each in order

    def first(self, blocked: Container[Hashable]) -> _W | None:
        heads = [lane[0] for name, lane in self.lanes.items() if name not in blocked]
        return min(heads, key=_rank) if heads else None

    def last(self) -> _W:
        return max((lane[-1] for lane in self.lanes.values()), key=_rank)


@dataclass(slots=True)
class _Band(Generic[_W]):
    """The requests of one strict priority, and whose turn it is, in virtual time: tokens per tenant."""

    now: int = 0
    turns: int = 0
    waiting: int = 0
    tenants: dict[str, _Tenant[_W]] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)  # turns of tenants that have nothing waiting

    def tenant(self, name: str) -> _Tenant[_W]:
        found = self.tenants.get(name)
        if found is None:
            start = max(self.now, self.finished.pop(name, 0))
            found = self.tenants[name] = _Tenant(start, self.turns)
            self.turns += 1
        return found

    def charge(self, name: str, work: int) -> None:
        """A request of a tenant that waits is let go."""
        tenant = self.tenants[name]
        self.now = max(self.now, tenant.start)
        # A tenant whose lanes were blocked for long is given one request at once for it, not all that it missed.
        tenant.start = max(self.now, tenant.start + work)
        tenant.turn = self.turns
        self.turns += 1

    def left(self, name: str) -> None:
        """Nothing of a tenant waits any more; its turn is remembered, or it would come back as if it had had none."""
        start = self.tenants.pop(name).start
        if start > self.now:
            self.finished[name] = start

    def forget(self) -> None:
        """Forget the turns that are of no use any more: of tenants that would begin with the others."""
        self.finished = {name: turn for name, turn in self.finished.items() if turn > self.now}


class AdmissionQueue(Generic[_W]):
    """The requests of one endpoint that wait.

    Args:
        policy: The order within a tenant.
        size: Most requests that wait.
        class_sizes: Strict priority to the most requests of it that wait, where it has a bound of its own.
        most_tokens: Most prompt tokens that wait.
    """

    def __init__(
        self,
        policy: Policy,
        size: int,
        class_sizes: Mapping[int, int] | None = None,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        self._policy = policy
        self._size = size
        self._class_sizes = dict(class_sizes or {})
        self._most_tokens = most_tokens
        self._bands: dict[int, _Band[_W]] = {}
        self._waiting: set[_W] = set()
        self._tokens = 0  # of all prompts
        self._work = 0
        self._arrivals = 0
        self._departures: deque[tuple[float, int]] = deque(maxlen=DEPARTURES)

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def __contains__(self, entry: _W) -> bool:
        """Whether it waits."""
        return entry in self._waiting

    def push(self, entry: _W) -> list[_W]:
        """Let a request wait.

        Returns:
            Those for which there is no room any more, `entry` perhaps among them; they are no longer waiting.
        """
        self._arrivals += 1
        entry.rank = self._key(entry), self._arrivals
        band = self._bands.setdefault(entry.strict_priority, _Band())
        tenant = band.tenant(entry.tenant)
        insort(tenant.lanes.setdefault(entry.lane, []), entry, key=_rank)
        tenant.waiting += 1
        band.waiting += 1
        self._waiting.add(entry)
        self._tokens += entry.prompt_tokens
        self._work += entry.work
        dropped = []
        if band.waiting > self._class_sizes.get(entry.strict_priority, band.waiting):
            dropped.append(self._drop(entry.strict_priority, entry.tenant))
        while len(self._waiting) > self._size or self._tokens > self._most_tokens:
            dropped.append(self._drop(min(self._bands), entry.tenant))
        return dropped

    def next(self, blocked: Container[Hashable] = ()) -> _W | None:
        """The request whose turn it is, of those whose lane is not blocked; it goes on waiting until `take`."""
        for priority in sorted(self._bands, reverse=True):
            found: tuple[tuple[int, int], _W] | None = None
            for tenant in self._bands[priority].tenants.values():
                turn = tenant.start, tenant.turn
                if (found is None or turn < found[0]) and (entry := tenant.first(blocked)) is not None:
                    found = turn, entry
            if found is not None:
                return found[1]
        return None

    def take(self, entry: _W, now: float) -> None:
        """Let a request go that waits, on its tenant's account."""
        self._bands[entry.strict_priority].charge(entry.tenant, entry.work)
        self._departures.append((now, entry.work))
        self.remove(entry)

    def remove(self, entry: _W) -> None:
        """Forget a request that no longer wants to go; nothing happens when it does not wait."""
        if entry not in self._waiting:
            return
        self._waiting.discard(entry)
        self._tokens -= entry.prompt_tokens
        self._work -= entry.work
        band = self._bands[entry.strict_priority]
        tenant = band.tenants[entry.tenant]
        lane = tenant.lanes[entry.lane]
        del lane[bisect_left(lane, entry.rank, key=_rank)]
        if not lane:
            del tenant.lanes[entry.lane]
        tenant.waiting -= 1
        band.waiting -= 1
        if not tenant.waiting:
            band.left(entry.tenant)
            if self._remembered() > MOST_REMEMBERED:
                band.forget()
                if self._remembered() > MOST_REMEMBERED:
                    band.finished.pop(entry.tenant, None)
        if not band.waiting:
            del self._bands[entry.strict_priority]  # nobody is ahead of anybody where nobody waits
        if not self._waiting:
            self._departures.clear()  # the rate is that of the time since requests began to wait

    def classes(self) -> Iterator[ClassStatus]:
        """What waits, by strict priority, highest first."""
        for priority in sorted(self._bands, reverse=True):
            entries = [entry for entry in self._waiting if entry.strict_priority == priority]
            oldest_at = min(entry.arrived_at for entry in entries)
            yield ClassStatus(priority, len(entries), sum(entry.work for entry in entries), oldest_at)

    def estimated_wait_s(self, now: float) -> float:
        """Seconds until what waits now will have gone, by the rate at which requests went last."""
        if len(self._departures) < 2:  # a rate needs two points
            return UNKNOWN_WAIT_S
        began = self._departures[0][0]
        gone = sum(work for _, work in self._departures) - self._departures[0][1]
        wait_s = self._work * max(now - began, 1e-6) / gone
        return min(max(wait_s, SHORTEST_WAIT_S), LONGEST_WAIT_S)

    def _remembered(self) -> int:
        return sum(len(band.finished) for band in self._bands.values())

    def _drop(self, priority: int, newcomer: str) -> _W:
        tenants = self._bands[priority].tenants
        # Of equals the newcomer's: nobody loses a place to one who has as many.
        _, _, most = max((tenant.waiting, name == newcomer, name) for name, tenant in tenants.items())
        entry = tenants[most].last()
        self.remove(entry)
        return entry

    def _key(self, entry: _W) -> float:
        if self._policy == "wspt":
            return -(1 + entry.priority_jump_s) / entry.work
        if self._policy == "lcfs":
            return -(entry.arrived_at + entry.priority_jump_s)
        return entry.arrived_at - entry.priority_jump_s
