"""The queue once more, as slow as it is clear: everything is worked out anew from one list of what waits."""

from collections.abc import Container, Hashable

from kvrouter_grpc.routing.queue import Waiting


class NaiveQueue:
    """What `AdmissionQueue` does, said with one list."""

    def __init__(self, policy: str, size: int, class_sizes: dict[int, int], most_tokens: int) -> None:
        self.policy, self.size, self.class_sizes, self.most_tokens = policy, size, class_sizes, most_tokens
        self.entries: list[tuple[int, Waiting]] = []  # in the order of arrival, numbered
        self.now: dict[int, int] = {}  # virtual time by strict priority
        self.starts: dict[tuple[int, str], tuple[int, int]] = {}  # (strict priority, tenant) to (start, turn)
        self.arrivals = self.turns = 0

    def push(self, entry: Waiting) -> list[Waiting]:
        band = entry.strict_priority
        if not any(other.tenant == entry.tenant for other in self.of(band)):
            before, _ = self.starts.get((band, entry.tenant), (0, 0))
            self.starts[band, entry.tenant] = max(self.now.get(band, 0), before), self.turn()
        self.arrivals += 1
        self.entries.append((self.arrivals, entry))
        dropped = []
        if band in self.class_sizes and len(self.of(band)) > self.class_sizes[band]:
            dropped.append(self.drop(band, entry.tenant))
        while len(self.entries) > self.size or sum(other.prompt_tokens for _, other in self.entries) > self.most_tokens:
            dropped.append(self.drop(min(other.strict_priority for _, other in self.entries), entry.tenant))
        return dropped

    def next(self, blocked: Container[Hashable]) -> Waiting | None:
        able = [(number, entry) for number, entry in self.entries if entry.lane not in blocked]
        return min(able, key=self.place)[1] if able else None

    def place(self, numbered: tuple[int, Waiting]) -> tuple[object, ...]:
        number, entry = numbered
        return -entry.strict_priority, self.starts[entry.strict_priority, entry.tenant], self.key(entry), number

    def key(self, entry: Waiting) -> float:
        if self.policy == "fcfs":
            return entry.arrived_at - entry.priority_jump_s
        if self.policy == "lcfs":
            return -(entry.arrived_at + entry.priority_jump_s)
        return -(1 + entry.priority_jump_s) / entry.work

    def take(self, entry: Waiting) -> None:
        band, account = entry.strict_priority, (entry.strict_priority, entry.tenant)
        start, _ = self.starts[account]
        self.now[band] = max(self.now.get(band, 0), start)
        self.starts[account] = max(self.now[band], start + entry.work), self.turn()
        self.remove(entry)

    def remove(self, entry: Waiting) -> None:
        self.entries = [numbered for numbered in self.entries if numbered[1] is not entry]
        if not self.of(entry.strict_priority):
            self.now.pop(entry.strict_priority, None)
            self.starts = {account: at for account, at in self.starts.items() if account[0] != entry.strict_priority}

    def of(self, band: int) -> list[Waiting]:
        return [entry for _, entry in self.entries if entry.strict_priority == band]

    def drop(self, band: int, newcomer: str) -> Waiting:
        names = [entry.tenant for entry in self.of(band)]
        most = max(names, key=lambda name: (names.count(name), name == newcomer, name))
        mine = [(n, e) for n, e in self.entries if e.strict_priority == band and e.tenant == most]
        _, victim = max(mine, key=lambda numbered: (self.key(numbered[1]), numbered[0]))
        self.remove(victim)
        return victim

    def turn(self) -> int:
        self.turns += 1
        return self.turns
