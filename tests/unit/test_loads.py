"""Leases: whatever happens to requests, the load is what the requests in flight make it."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kvrouter_grpc.core import TargetTable
from kvrouter_grpc.errors import DuplicateRequestError, UnknownReservationError
from kvrouter_grpc.routing.loads import Booking, LoadTable, Output, TargetLoad
from kvrouter_grpc.types import Decision, Overlap, Target

TARGETS = [Target(1, 0), Target(1, 1), Target(2, 0)]


def decision(target):
    return Decision(target, "w", "http://w", Overlap(), 16, 0, 0, 0, 0.0, 1.0)


def chain(*path):
    """Sequence hashes of a path: equal prefixes give equal hashes."""
    return array("Q", [hash(path[: depth + 1]) % 2**64 for depth in range(len(path))])


def loads(clock=lambda: 0.0, expiry_s=10.0):
    targets = TargetTable()
    for target in TARGETS:
        targets.add(target)
    return LoadTable(targets, clock, expiry_s)


class Leases(RuleBasedStateMachine):
    """Books, first tokens, releases, expiries and removals, against a plain list of what is in flight."""

    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.table = loads(lambda: self.now, 100.0)
        self.model = {}  # id -> [target, seqs, prefill, shared, expires_at]
        self.leases = {}

    @rule(
        target=requests,
        request_id=st.integers(0, 30).map(str),
        where=st.sampled_from(TARGETS),
        path=st.lists(st.integers(0, 1), max_size=6),
        prefill=st.integers(0, 500),
        shared=st.booleans(),
        counts=st.booleans(),
        ttl=st.none() | st.floats(1, 300),
    )
    def book(self, request_id, where, path, prefill, shared, counts, ttl):
        booking = Booking(chain(*path), prefill, shared, Output.after(4 * len(path), 4, None) if counts else None)
        if request_id in self.model:
            with pytest.raises(DuplicateRequestError):
                self.table.book(request_id, decision(where), booking, ttl)
        else:
            self.leases[request_id] = self.table.book(request_id, decision(where), booking, ttl)
            self.model[request_id] = [where, booking.seqs, prefill, shared, self.now + (ttl or 100.0), 0, counts]
        return request_id

    @rule(request_id=requests, twice=st.booleans())
    def first_token(self, request_id, twice):
        if request_id not in self.model:
            with pytest.raises(UnknownReservationError):
                self.table.lease(request_id)
            return
        for _ in range(1 + twice):
            self.table.lease(request_id).first_token()
        self.model[request_id][2] = 0

    @rule(request_id=requests, tokens=st.integers(0, 40))
    def generated(self, request_id, tokens):
        self.leases[request_id].generated(tokens)
        if request_id in self.model:
            self.model[request_id][5] += tokens

    @rule(request_id=requests, twice=st.booleans())
    def release(self, request_id, twice):
        lease = self.leases[request_id]
        for _ in range(1 + twice):
            lease.release()
        self.model.pop(request_id, None)
        assert lease.released

    @rule(seconds=st.floats(0, 150))
    def wait(self, seconds):
        self.now += seconds
        self.table.expire()
        self.model = {name: entry for name, entry in self.model.items() if entry[4] > self.now}

    @rule(where=st.sampled_from(TARGETS))
    def replace(self, where):
        """A target that comes back is another one: what was booked on it before is gone for good."""
        self.table.targets.remove(where)
        self.table.targets.add(where)
        for entry in self.model.values():
            if entry[0] == where:
                entry[0] = None

    def teardown(self):
        for lease in self.leases.values():
            lease.release()
        for target in TARGETS:
            self.table.targets.remove(target)
        assert self.table.targets.stats() == {"rows": 0, "bookings": 0, "pinned_blocks": 0, "bytes": 0}

    @invariant()
    def loads_are_the_sum_of_what_is_in_flight(self):
        assert len(self.table) == len(self.model)
        for target in TARGETS:
            mine = [entry for entry in self.model.values() if entry[0] == target]
            load = self.table.load(target)
            assert load.active_requests == len(mine)
            assert load.queued_prefill_tokens == sum(entry[2] for entry in mine)
            shared = {seq for entry in mine if entry[3] for seq in entry[1]}
            output = sum(-(-entry[5] // 4) for entry in mine if entry[6])
            assert load.active_blocks == len(shared) + output + sum(len(entry[1]) for entry in mine if not entry[3])
            for path in ([], [0], [0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0, 0, 0]):
                seqs = chain(*path)
                held = next((depth for depth, seq in enumerate(seqs) if seq not in shared), len(seqs))
                assert self.table.targets.pinned(self.table.targets.row(target), seqs) == held
        stats = self.table.targets.stats()
        assert stats["bookings"] == sum(entry[0] is not None for entry in self.model.values())


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_lease_is_released_whatever_ends_its_block():
    table = loads()

    def fail():
        with table.book("a", decision(TARGETS[0]), Booking(chain(1, 2), 50)):
            assert table.load(TARGETS[0]).queued_prefill_tokens == 50
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (table.load(TARGETS[0]).active_requests, table.load(TARGETS[0]).active_blocks, len(table)) == (0, 0, 0)


def test_a_removed_target_takes_its_load_along_and_its_leases_end_quietly():
    table = loads()
    lease = table.book("a", decision(TARGETS[0]), Booking(chain(1), 50))
    table.targets.remove(TARGETS[0])
    assert table.load(TARGETS[0]) == TargetLoad()
    table.targets.add(Target(7, 7))  # has the row now
    table.targets.add(TARGETS[0])
    lease.release()
    assert table.load(TARGETS[0]) == table.load(Target(7, 7)) == TargetLoad()


def test_forgotten_reservations_are_counted_and_the_heap_stays_small():
    now = [0.0]
    table = loads(lambda: now[0])
    for number in range(1000):
        table.book(f"done-{number}", decision(TARGETS[0]), Booking(chain(1), 1)).release()
    assert len(table._deadlines) < 100
    table.book("forgotten", decision(TARGETS[0]), Booking(chain(1), 1))
    now[0] = 10.0
    table.expire()
    assert (table.expired, len(table), table.load(TARGETS[0]).active_blocks) == (1, 0, 0)


@pytest.mark.parametrize(
    ("prompt", "tokens", "blocks"),
    [(32, 0, 0), (32, 1, 1), (32, 16, 1), (32, 17, 2), (33, 15, 0), (33, 16, 1), (47, 1, 0), (47, 2, 1), (0, 16, 1)],
)
def test_output_begins_a_block_where_the_prompt_ends_one(prompt, tokens, blocks):
    assert Output.after(prompt, 16, None).blocks(tokens) == blocks == -(-(prompt + tokens) // 16) - -(-prompt // 16)


def test_output_counts_in_full_when_nobody_says_how_long_it_will_be():
    table = loads()
    lease = table.book("a", decision(TARGETS[0]), Booking(chain(1, 2), 32, True, Output.after(32, 16, None)))
    for _ in range(40):
        lease.generated(1)
    assert table.load(TARGETS[0]).active_blocks == 2 + 3
    lease.release()
    lease.generated(100)
    assert table.load(TARGETS[0]) == TargetLoad()


@pytest.mark.parametrize("shared", [True, False])
def test_what_only_one_request_pins_fades_towards_its_expected_end(shared):
    table = loads()
    booking = Booking(chain(1, 2, 3, 4), 64, shared, Output.after(64, 16, 100))
    lease = table.book("a", decision(TARGETS[0]), booking)
    lease.generated(50)  # four blocks of prompt, four of output, half of the way
    assert table.load(TARGETS[0]).active_blocks == 4
    lease.generated(25)
    assert table.load(TARGETS[0]).active_blocks == round((4 + 5) * 0.25)
    lease.generated(100)  # past the expected end
    assert table.load(TARGETS[0]).active_blocks == 0
    lease.release()
    assert table.load(TARGETS[0]) == TargetLoad()


def test_what_others_share_does_not_fade():
    table = loads()
    lease = table.book("a", decision(TARGETS[0]), Booking(chain(1, 2, 3, 4), 64, True, Output.after(64, 16, 32)))
    other = table.book("b", decision(TARGETS[0]), Booking(chain(1, 2, 3), 48))
    lease.generated(32)
    assert table.load(TARGETS[0]).active_blocks == 3
    other.release()  # told at the next output block: what stands was right when it was worked out
    assert table.load(TARGETS[0]).active_blocks == 3
    lease.generated(16)
    assert table.load(TARGETS[0]).active_blocks == 0
    lease.release()
    assert table.load(TARGETS[0]) == TargetLoad()


def test_output_on_a_target_that_is_gone_or_another_one():
    table = loads()
    lease = table.book("a", decision(TARGETS[0]), Booking(chain(1), 16, True, Output.after(16, 16, None)))
    table.targets.remove(TARGETS[0])
    table.targets.add(TARGETS[0])
    lease.generated(100)
    lease.release()
    assert table.load(TARGETS[0]) == TargetLoad()
