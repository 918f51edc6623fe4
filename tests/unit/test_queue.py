"""The queue against its twin, and what it promises: order, fairness, bounds, nobody lost and nobody twice."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrouter_grpc.routing import queue as queue_module
from kvrouter_grpc.routing.queue import LONGEST_WAIT_S, MOST_REMEMBERED, UNKNOWN_WAIT_S, AdmissionQueue, Waiting
from reference.queue import NaiveQueue

LANES = ("any", "pinned", "model")


class QueueMachine(RuleBasedStateMachine):
    """Requests come, go, give up and are dropped; the two queues agree at every step."""

    @initialize(
        policy=st.sampled_from(("fcfs", "lcfs", "wspt")),
        size=st.integers(0, 12),
        class_sizes=st.dictionaries(st.integers(0, 2), st.integers(0, 4), max_size=2),
        most_tokens=st.sampled_from((50, 1000)),
    )
    def start(self, policy, size, class_sizes, most_tokens):
        self.size, self.class_sizes, self.most_tokens = size, class_sizes, most_tokens
        self.queue = AdmissionQueue(policy, size, class_sizes, most_tokens)
        self.twin = NaiveQueue(policy, size, class_sizes, most_tokens)
        self.now = 0.0
        self.waiting: list[Waiting] = []

    @rule(
        lane=st.sampled_from(LANES),
        tenant=st.sampled_from(("", "a", "b")),
        strict_priority=st.integers(0, 2),
        jump=st.sampled_from((0.0, 0.0, 2.5)),
        tokens=st.integers(1, 40),
        later=st.sampled_from((0.0, 1.0)),
    )
    def push(self, lane, tenant, strict_priority, jump, tokens, later):
        self.now += later
        entry = Waiting(lane, tenant, strict_priority, jump, tokens, 1 + tokens // 2, self.now)
        dropped = self.queue.push(entry)
        assert dropped == self.twin.push(entry)
        self.waiting.append(entry)
        for victim in dropped:
            self.waiting.remove(victim)

    @rule(blocked=st.sets(st.sampled_from(LANES), max_size=2), later=st.sampled_from((0.0, 1.0)))
    def take(self, blocked, later):
        self.now += later
        entry = self.queue.next(blocked)
        assert entry is self.twin.next(blocked)
        if entry is None:
            assert all(other.lane in blocked for other in self.waiting)
            return
        assert entry.strict_priority == max(e.strict_priority for e in self.waiting if e.lane not in blocked)
        self.queue.take(entry, self.now)
        self.twin.take(entry)
        self.waiting.remove(entry)
        assert entry not in self.queue

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data):
        entry = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.queue.remove(entry)
        self.queue.remove(entry)  # nothing more happens
        self.twin.remove(entry)

    @invariant()
    def nobody_is_lost_and_the_bounds_hold(self):
        assert len(self.queue) == len(self.waiting) <= self.size
        assert all(entry in self.queue for entry in self.waiting)
        assert sum(entry.prompt_tokens for entry in self.waiting) <= self.most_tokens
        classes = list(self.queue.classes())
        assert [status.strict_priority for status in classes] == sorted(
            {entry.strict_priority for entry in self.waiting}, reverse=True
        )
        for status in classes:
            mine = [entry for entry in self.waiting if entry.strict_priority == status.strict_priority]
            assert status.waiting == len(mine) <= self.class_sizes.get(status.strict_priority, self.size)
            assert status.tokens == sum(entry.work for entry in mine)
            assert status.oldest_at == min(entry.arrived_at for entry in mine)
        assert 0 < self.queue.estimated_wait_s(self.now) <= LONGEST_WAIT_S

    def teardown(self):
        if hasattr(self, "queue"):
            while (entry := self.queue.next()) is not None:
                assert entry is self.twin.next(())
                self.queue.take(entry, self.now)
                self.twin.take(entry)
                self.waiting.remove(entry)
            assert not self.waiting
            assert not self.queue._bands


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=40)


def served(queue: AdmissionQueue, count: int) -> list[Waiting]:
    entries = []
    for _ in range(count):
        entry = queue.next()
        assert entry is not None
        queue.take(entry, 0.0)
        entries.append(entry)
    return entries


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), max_size=60), st.randoms(use_true_random=False))
def test_two_tenants_that_both_wait_get_the_same_to_within_a_request_of_each(requests, rng):
    """Whoever comes with whatever, in between, cannot change that."""
    queue = AdmissionQueue("fcfs", 10_000)
    for tenant in "xy":
        for _ in range(60):
            queue.push(Waiting("", tenant, work=rng.randint(1, 50)))
    given = {"x": 0, "y": 0}
    for tenant, work in requests:
        queue.push(Waiting("", tenant, work=work))
        (entry,) = served(queue, 1)
        if entry.tenant in given:
            given[entry.tenant] += entry.work
        assert abs(given["x"] - given["y"]) <= 100


def test_a_tenant_that_comes_back_each_time_is_not_ahead_of_one_that_waits():
    queue = AdmissionQueue("fcfs", 100)
    for _ in range(30):
        queue.push(Waiting("", "patient", work=10))
    queue.push(Waiting("", "again", work=10))
    given = {"patient": 0, "again": 0}
    for _ in range(20):
        (entry,) = served(queue, 1)
        given[entry.tenant] += 1
        if entry.tenant == "again":
            queue.push(Waiting("", "again", work=10))
    assert given == {"patient": 10, "again": 10}


def test_a_tenant_that_was_blocked_has_no_claim_to_all_that_it_missed():
    queue = AdmissionQueue("fcfs", 100)
    for _ in range(20):
        queue.push(Waiting("busy", "blocked", work=10))
        queue.push(Waiting("free", "other", work=10))
    for _ in range(10):
        entry = queue.next({"busy"})
        assert entry is not None
        assert entry.tenant == "other"
        queue.take(entry, 0.0)
    assert [entry.tenant for entry in served(queue, 12)].count("other") == 5


def test_a_flood_costs_those_who_send_it():
    queue = AdmissionQueue("fcfs", 4)
    few = Waiting("", "few")
    assert queue.push(few) == []
    flood = [Waiting("", "flood", arrived_at=float(number)) for number in range(6)]
    assert [queue.push(entry) for entry in flood] == [[], [], [], *([entry] for entry in flood[3:])]
    other = Waiting("", "other")
    assert queue.push(other) == [flood[2]]
    urgent = [Waiting("", "flood", strict_priority=1) for _ in range(4)]
    assert [queue.push(entry) for entry in urgent] == [[flood[1]], [flood[0]], [other], [few]]


def test_tenants_that_are_made_up_take_bounded_memory():
    queue = AdmissionQueue("fcfs", 64)
    for number in range(3 * MOST_REMEMBERED):
        priority = number % 16
        if number < 16:
            queue.push(Waiting("", "stays", priority, work=1 << 30))  # so that its band does
            queue.push(Waiting("", "first", priority, work=1))
        entry = Waiting("", f"made up {number}", priority, work=100)
        queue.push(entry)
        queue.take(entry, 0.0)
        assert len(queue) <= 32
    bands = queue._bands.values()
    assert len(bands) == 16
    assert sum(len(band.finished) for band in bands) == MOST_REMEMBERED
    assert sum(len(band.tenants) for band in bands) == len(queue)
    for entry in served(queue, len(queue)):
        assert entry.tenant in {"stays", "first"}
    assert not queue._bands


def test_turns_that_are_over_make_room_for_others(monkeypatch):
    monkeypatch.setattr(queue_module, "MOST_REMEMBERED", 2)
    queue = AdmissionQueue("fcfs", 64)
    for _ in range(3):
        queue.push(Waiting("", "stays", work=100))
    for name in "ab":
        queue.push(Waiting("", name, work=10))
        queue.take(next(entry for entry in queue._waiting if entry.tenant == name), 0.0)
    (band,) = queue._bands.values()
    assert set(band.finished) == {"a", "b"}
    served(queue, 2)  # of the one that stays: it is ahead of both now
    queue.push(Waiting("", "c", work=10))
    served(queue, 1)
    assert set(band.finished) == {"c"}


def test_a_wait_is_estimated_by_the_rate_at_which_requests_went():
    queue = AdmissionQueue("fcfs", 100)
    for _ in range(30):
        queue.push(Waiting("", work=100))
    assert queue.estimated_wait_s(0.0) == UNKNOWN_WAIT_S
    for second in range(10):
        entry = queue.next()
        assert entry is not None
        queue.take(entry, float(second))
    assert queue.estimated_wait_s(9.0) == 20.0  # 20 wait, one goes per second
    served(queue, 20)
    assert queue.estimated_wait_s(9.0) == UNKNOWN_WAIT_S
