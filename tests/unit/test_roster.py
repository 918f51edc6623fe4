"""Who may take a request: worked out once per change of the workers, and never older than that."""

from array import array

import pytest

from kvrouter_grpc.core import TargetTable
from kvrouter_grpc.errors import NoWorkersError, UnknownModelError, UnknownWorkerError
from kvrouter_grpc.routing.roster import MOST_NAMES, NO_ROW, Roster
from kvrouter_grpc.routing.workers import WorkerRegistry
from kvrouter_grpc.types import Prompt, Role, RoutingHints, RoutingRequest, Target, WorkerFacts, WorkerSpec, WorkerState

FREE = RoutingHints()


class Rig:
    def __init__(self):
        self.workers = WorkerRegistry()
        self.table = TargetTable()
        self.roster = Roster("a.b.c", self.workers, self.table)

    def add(self, name, *, dp=1, models=("base",), loras=(), rows=True, **spec):
        worker = self.workers.add(WorkerSpec(name, f"http://{name}", "a.b.c", dp_size=dp, **spec))
        self.workers.introduced(worker, worker.spec, WorkerFacts(models, loras))
        self.workers.set_health(worker, WorkerState.READY)
        for target in worker.targets if rows else ():
            self.table.add(target)
        return worker

    def shortlist(self, model="", hints=FREE, tried=()):
        return self.roster.shortlist(RoutingRequest(Prompt(array("I")), hints, model, exclude=frozenset(tried)))

    def who(self, *asked, **more):
        seats = map(self.roster.seat, self.shortlist(*asked, **more).rows)
        return [(seat.worker.spec.name, seat.target.dp_rank) for seat in seats]

    def why(self):
        return {(out.worker_name, out.target.dp_rank): out.reason for out in self.shortlist().occasion.left_out}


@pytest.fixture
def rig():
    return Rig()


def test_every_change_is_seen_at_once(rig):
    with pytest.raises(NoWorkersError, match=r"endpoint a\.b\.c has no workers"):
        rig.who()
    b = rig.add("b", dp=2)
    assert rig.who() == [("b", 0), ("b", 1)]
    a = rig.add("a")
    assert rig.who() == [("a", 0), ("b", 0), ("b", 1)]
    rig.workers.set_draining(a, draining=True)
    assert (rig.who(), rig.why()) == ([("b", 0), ("b", 1)], {("a", 0): "draining: draining"})
    rig.workers.set_draining(a, draining=False)
    rig.table.remove(Target(b.worker_id, 0))
    assert (rig.who(), rig.why()) == ([("a", 0), ("b", 1)], {("b", 0): NO_ROW})
    rig.table.add(Target(b.worker_id, 0))
    assert len(rig.who()) == 3
    rig.workers.remove("b")
    assert rig.who() == [("a", 0)]
    rig.table.remove(Target(a.worker_id, 0))
    with pytest.raises(NoWorkersError, match=NO_ROW):
        rig.who()


def test_the_same_answer_is_not_worked_out_twice(rig):
    rig.add("a")
    assert rig.shortlist("base") is rig.shortlist("base")


def test_a_request_narrows_it_down(rig):
    a, b = rig.add("a", dp=2, taints=frozenset({"big"})), rig.add("b")
    assert rig.who(hints=RoutingHints(worker_id=a.worker_id, dp_rank=1)) == [("a", 1)]
    assert rig.who(hints=RoutingHints(allowed_worker_ids=frozenset({b.worker_id}))) == [("b", 0)]
    assert rig.who(hints=RoutingHints(required_taints=frozenset({"big"}))) == [("a", 0), ("a", 1)]
    assert rig.who(tried={Target(a.worker_id, 0)}) == [("a", 1), ("b", 0)]
    assert rig.who() == [("a", 0), ("a", 1), ("b", 0)]
    with pytest.raises(UnknownWorkerError):
        rig.who(hints=RoutingHints(worker_id=5))


def test_models_adapters_and_roles(rig):
    assert (rig.roster.role, rig.roster.model_for("any", ""), rig.roster.model_for("", "")) == (Role.BOTH, "any", "")
    rig.add("a", loras=("adapter",), role=Role.PREFILL)
    assert (rig.roster.role, rig.roster.model_for("", ""), rig.roster.is_lora("adapter")) == (
        Role.PREFILL,
        "base",
        True,
    )
    assert (rig.who("adapter"), rig.who("base"), rig.roster.is_lora("base")) == ([("a", 0)], [("a", 0)], False)
    rig.add("b", models=("other",))
    assert (rig.roster.role, rig.who("other"), rig.who("base")) == (Role.BOTH, [("b", 0)], [("a", 0)])
    for ask in (
        lambda: rig.who("nope"),
        lambda: rig.roster.model_for("nope", ""),
        lambda: rig.roster.model_for("", ""),
    ):
        with pytest.raises(UnknownModelError):
            ask()


def test_names_from_requests_do_not_pile_up(rig):
    rig.add("a", models=())  # told nothing: serves whatever is asked for
    for number in range(3 * MOST_NAMES):
        assert rig.who(f"model {number}") == [("a", 0)]
        assert rig.roster.model_for(f"model {number}", "") == f"model {number}"
    picture = rig.roster._picture()
    assert max(len(picture.shortlists), len(picture.models)) <= MOST_NAMES
