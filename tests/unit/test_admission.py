"""Waiting for busy workers, and the thresholds above which they get nothing, on a router without a server."""

import asyncio
import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import TargetTable
from kvrouter_grpc.errors import (
    AllWorkersOverloadedError,
    DuplicateRequestError,
    NoWorkersError,
    PinnedWorkerOverloadedError,
    QueueFullError,
    QueueTimeoutError,
    WorkersBusyError,
)
from kvrouter_grpc.routing.gate import Thresholds
from kvrouter_grpc.routing.loads import Lease
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.types import (
    EngineReport,
    Prompt,
    RoutingHints,
    RoutingRequest,
    StreamState,
    WorkerFacts,
    WorkerSpec,
    WorkerState,
)
from kvrouter_grpc.upstream.waiting import booked

ENDPOINT = "ns.backend.generate"
BATCH = 100  # tokens that each worker computes in one step


class Bench:
    """A router whose requests wait while its workers have more prefill tokens than one step takes."""

    def __init__(self, workers: int = 1, **config: object) -> None:
        self.now = 0.0
        config = {"block_size": 16, "seed": 1, "queue_threshold": 1.0} | config
        self.router = Router(ENDPOINT, RouterConfig(**config), clock=lambda: self.now)  # type: ignore[arg-type]
        self.names: list[str] = []  # booked, in their order
        self.faults: dict[str, Exception] = {}
        self.leases: dict[str, Lease] = {}
        self.rng = random.Random(1)
        for number in range(workers):
            self.add(f"w{number}")

    def add(self, name: str) -> None:
        spec = WorkerSpec(name, "http://" + name, ENDPOINT, max_num_batched_tokens=BATCH, total_kv_blocks=100)
        worker = self.router.workers.add(spec)
        self.router.workers.introduced(worker, spec, WorkerFacts(("base",)))
        self.router.add_targets(worker.targets)
        for target in worker.targets:
            self.router.index.stream(target).state = StreamState.LIVE
        self.router.workers.set_health(worker, WorkerState.READY)

    def request(self, name: str, tokens: int, **hints: object) -> RoutingRequest:
        prompt = Prompt(array("I", [self.rng.randrange(1 << 20) for _ in range(tokens)]))
        return RoutingRequest(prompt, RoutingHints(**hints), request_id=name)  # type: ignore[arg-type]

    def ask(self, name: str, tokens: int = 150, **hints: object) -> bool:
        """Send a request; says whether it was booked at once."""

        def settle(outcome: Lease | Exception) -> None:
            if isinstance(outcome, Lease):
                self.booked(name, outcome)
            else:
                self.faults[name] = outcome

        request = self.request(name, tokens, **hints)
        admission = self.router.admission
        answer = admission.admit(request, settle) if admission is not None else self.router.lease(request)
        if isinstance(answer, Lease):
            self.booked(name, answer)
            return True
        return False

    def booked(self, name: str, lease: Lease) -> None:
        self.names.append(name)
        self.leases[name] = lease

    def waiting(self) -> int:
        assert self.router.admission is not None
        return len(self.router.admission.queue)


def test_a_request_waits_only_while_all_workers_are_busy():
    bench = Bench(workers=2)
    assert bench.ask("a")
    assert bench.ask("b")
    assert {lease.decision.worker_name for lease in bench.leases.values()} == {"w0", "w1"}
    bench.now = 2.0
    assert not bench.ask("c")
    bench.now = 5.0
    bench.leases["a"].first_token()
    assert bench.names == ["a", "b", "c"]
    decision = bench.leases["c"].decision
    assert decision.queued_s == 3.0
    assert decision.worker_name == bench.leases["a"].decision.worker_name
    assert bench.leases["b"].decision.queued_s == 0
    for lease in bench.leases.values():
        lease.release()
    assert len(bench.router.loads) == bench.waiting() == 0


def test_queries_never_wait_and_pins_wait_for_their_worker_alone():
    bench = Bench(workers=2)
    assert bench.ask("a")
    pin = bench.leases["a"].decision.target.worker_id
    assert not bench.ask("pinned", worker_id=pin)
    assert bench.ask("b")
    assert not bench.ask("c")
    assert bench.router.best_worker(bench.request("", 10))
    bench.leases["b"].first_token()
    assert bench.names == ["a", "b", "c"]
    bench.leases["a"].first_token()
    assert bench.names == ["a", "b", "c", "pinned"]
    assert bench.leases["pinned"].decision.target.worker_id == pin


def test_what_leaves_the_queue_is_decided_anew():
    bench = Bench(workers=1)
    assert bench.ask("a")
    assert not bench.ask("b", tokens=32)
    bench.add("w1")  # a worker that comes is a reason to look
    assert bench.names == ["a", "b"]
    assert bench.leases["b"].decision.worker_name == "w1"


def test_strict_priority_then_the_policy():
    bench = Bench(queue_policy="wspt")
    assert bench.ask("a")
    for name, tokens, priority, jump in (
        ("long", 120, 0, 0.0),
        ("short", 110, 0, 0.0),
        ("jumps", 120, 0, 5.0),
        ("first", 160, 2, 0.0),
    ):
        assert not bench.ask(name, tokens=tokens, strict_priority=priority, priority_jump_s=jump)
    for name in ("a", "first", "jumps", "short"):
        bench.leases[name].first_token()
    assert bench.names == ["a", "first", "jumps", "short", "long"]


def test_beyond_its_bounds_the_queue_refuses_and_says_when_to_come_back():
    bench = Bench(queue_size=3, queue_class_sizes="1=1 7=5")
    assert bench.ask("a")
    for name in ("b", "c"):
        assert not bench.ask(name)
    assert not bench.ask("urgent", strict_priority=1)
    bench.ask("another", strict_priority=1)
    bench.ask("d")
    assert set(bench.faults) == {"another", "d"}
    for fault in bench.faults.values():
        assert isinstance(fault, QueueFullError)
        assert fault.retry_after_s is not None
    with pytest.raises(WorkersBusyError) as refused:
        bench.ask("e", may_wait=False)
    assert refused.value.retry_after_s == 1.0
    with pytest.raises(DuplicateRequestError):
        bench.ask("b")
    with pytest.raises(DuplicateRequestError):
        bench.ask("a")
    bench.leases["a"].release()
    assert bench.names == ["a", "urgent"]
    assert bench.router.admission is not None
    assert bench.router.admission.outcomes == {"admitted": 1, "refused": 2, "timed_out": 0, "gone": 0}


def test_who_waits_for_a_worker_that_goes_is_told():
    bench = Bench()
    assert bench.ask("a")
    assert not bench.ask("b")
    worker = bench.router.workers.named("w0")
    assert worker is not None
    bench.router.workers.set_health(worker, WorkerState.UNHEALTHY, "gone")
    assert isinstance(bench.faults["b"], NoWorkersError)
    assert bench.waiting() == 0


def test_reports_and_expiry_make_room_too():
    bench = Bench(request_expiry_s=10.0)
    target = bench.router.workers.workers()[0].targets[0]
    bench.ask("a")
    assert not bench.ask("b")
    bench.now = 11.0
    bench.router.expire()
    assert bench.names == ["a", "b"]
    bench.leases["b"].release()
    for _ in range(8):
        bench.router.feedback.engine_reported(target, EngineReport(200, 200))
    assert not bench.ask("c")
    for _ in range(20):
        bench.router.feedback.engine_reported(target, EngineReport(0, 0))
    assert bench.names == ["a", "b", "c"]


def test_a_caller_that_goes_away_leaves_nothing_behind():
    async def scenario():
        bench = Bench(queue_timeout_s=0.05)
        router = bench.router
        first = await booked(router, bench.request("a", 150))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(booked(router, bench.request(name, 150))) for name in ("b", "c", "d")]
            await asyncio.sleep(0)
            assert bench.waiting() == 3
            tasks[0].cancel()
            first.release()  # b's turn comes in the moment in which it is cancelled
            await asyncio.wait([tasks[0]])
            assert tasks[0].cancelled()
            lease = await tasks[1]
            tasks[2].cancel()
        assert (lease.request_id, len(router.loads), bench.waiting()) == ("c", 1, 0)
        async with asyncio.TaskGroup() as group:
            late = group.create_task(booked(router, bench.request("e", 150)))
            await asyncio.sleep(0)
            lease.release()  # settled, and cancelled before it knew
            late.cancel()
        assert late.cancelled()
        assert (len(router.loads), bench.waiting()) == (0, 0)
        last = await booked(router, bench.request("f", 150))
        with pytest.raises(QueueTimeoutError):
            await booked(router, bench.request("g", 150))
        last.release()
        assert (len(router.loads), bench.waiting()) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", ["fcfs", "lcfs", "wspt"])
def test_nobody_is_lost_and_room_is_used(policy):
    """Random arrivals, ends and pins: everybody is settled once, and nobody waits for a worker that is not busy."""
    rng = random.Random(policy)
    bench = Bench(workers=3, queue_policy=policy, queue_size=20)
    ids = [worker.worker_id for worker in bench.router.workers.workers()]
    sent = set()
    for number in range(600):
        bench.now += 0.1
        if rng.random() < 0.6:
            pin = {"worker_id": rng.choice(ids)} if rng.random() < 0.3 else {}
            sent.add(str(number))
            bench.ask(
                str(number), rng.randint(1, 200), strict_priority=rng.randrange(2), tenant=rng.choice("ab"), **pin
            )
        running = [lease for lease in bench.leases.values() if not lease.released]
        if running and rng.random() < 0.5:
            rng.choice((Lease.first_token, Lease.release))(rng.choice(running))
        loads = [bench.router.load(worker.targets[0]) for worker in bench.router.workers.workers()]
        free = {worker_id for worker_id, load in zip(ids, loads, strict=True) if load.queued_prefill_tokens <= BATCH}
        assert bench.router.admission is not None
        for entry in bench.router.admission.queue._waiting:
            assert not free if entry.lane[1] is None else entry.lane[1] not in free  # type: ignore[index]
    while any(not lease.released for lease in bench.leases.values()):
        for lease in list(bench.leases.values()):
            lease.release()
    assert bench.waiting() == len(bench.router.loads) == 0
    assert len(bench.names) == len(set(bench.names))
    assert sorted([*bench.names, *bench.faults]) == sorted(sent)


def test_overloaded_workers_get_nothing_and_say_so():
    bench = Bench(workers=2, queue_threshold=None, active_prefill_tokens_threshold=100)
    router = bench.router
    assert bench.ask("a")
    busy = bench.leases["a"].decision
    decision = router.best_worker(bench.request("", 10)._replace(explain=True))
    assert decision.target != busy.target
    assert [candidate.dropped for candidate in decision.candidates if candidate.target == busy.target] == [
        "overloaded: above a threshold of the endpoint"
    ]
    with pytest.raises(PinnedWorkerOverloadedError):
        router.best_worker(bench.request("", 10, worker_id=busy.target.worker_id))
    assert bench.ask("b")
    with pytest.raises(AllWorkersOverloadedError) as refused:
        bench.ask("c")
    assert refused.value.retry_after_s == 1.0
    tokens = bench.request("", 10).prompt.tokens
    with pytest.raises(AllWorkersOverloadedError):
        router.choose(tokens, "")  # type: ignore[arg-type]
    router.set_thresholds(Thresholds())
    assert bench.ask("c")


def test_thresholds_and_queue_together():
    """Those who wait go on waiting while all are overloaded; those who come are refused."""
    bench = Bench(active_decode_blocks_threshold=0.5)
    assert bench.ask("a")
    assert not bench.ask("b")
    big = bench.router.loads.targets
    row = big.row(bench.leases["a"].decision.target)
    assert row is not None
    ticket = big.book(row, array("Q", range(60)), 0, True)
    bench.leases["a"].first_token()
    assert bench.names == ["a"]
    with pytest.raises(AllWorkersOverloadedError):
        bench.ask("c")
    big.release(ticket, array("Q", range(60)), True)
    bench.router.expire()
    assert bench.names == ["a", "b"]


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20), st.sampled_from((0, 8, 20))), max_size=6),
    st.sampled_from((0.0, 0.25, 0.5, 1.0, float("inf"))),
    st.sampled_from((0.0, 100.0, 299.0, float("inf"))),
    st.sampled_from((0.0, 0.5, 3.0, float("inf"))),
)
def test_within_is_the_plain_comparison(made, blocks, tokens, batches):
    table = TargetTable()
    rows = array("I")
    expected = array("I")
    for number, (queued, held, total) in enumerate(made):
        row = table.add(number)
        table.describe(row, total_blocks=total, batch_tokens=BATCH if number % 2 else 0)
        table.book(row, array("Q", range(held)), queued, False)
        rows.append(row)
        batch = BATCH if number % 2 else 10_000_000
        if queued <= tokens and queued <= batches * batch and (not total or held <= blocks * total):
            expected.append(row)
    found = table.within(rows, blocks, tokens, batches)
    assert found == expected
    assert (found is rows) == (len(expected) == len(rows))
    with pytest.raises(KeyError):
        table.within(array("I", [77]), blocks, tokens, batches)
