"""Recordings of decisions: what they tell is what decided, and they decide the same again."""

import math
import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import COSTS, Decider, DecisionLog, Policy, RadixTree, Recording, Shortlist, TargetTable
from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.mode import Knobs

SIZE = 4
SEED = 1337
MODES = [
    "kv",
    "round-robin",
    "random",
    "power-of-two",
    "least-loaded",
    "device-aware-weighted",
    "session",
    "prefix",
    "kv-aware",
]


def policy(**given):
    return Policy(Weights(), Knobs(), **given)


class Scene:
    """Targets with random contents and loads, and a decider with a log over them."""

    def __init__(self, rng, targets, size=1024, hashes=False):
        self.rng = rng
        self.index = RadixTree(SIZE)
        self.table = TargetTable()
        self.table.attach(self.index)
        self.prompt = array("I", range(1, 1 + SIZE * 8))
        for number in range(targets):
            row = self.table.add(number)
            depth = 0
            for tier in range(rng.choice((1, 1, 2))):
                slot = self.index.add_slot()
                self.table.set_slot(row, tier, slot)
                blocks = rng.randrange(0, 5) if tier == 0 else 0
                if blocks:
                    names = array("Q", range(100 * number + 1, 100 * number + 1 + blocks))
                    self.index.store(slot, None, names, self.prompt[: blocks * SIZE], SEED, None, slot)
                depth += blocks
            self.table.set_freshness(row, rng.choice((0.0, 0.5, 1.0, 1.0)))
            self.table.describe(
                row, total_blocks=rng.choice((0, 5, 50)), identity=rng.getrandbits(64), on_cpu=rng.random() < 0.3
            )
            for _ in range(rng.randrange(3)):
                self.table.book(row, array("Q", [1, 2]), rng.randrange(3) * 16, rng.random() < 0.5)
            self.table.set_foreign(row, rng.randrange(4), 0, rng.randrange(50), rng.randrange(9))
        self.rows = array("I", range(targets))
        self.log = DecisionLog(size, hashes=hashes)
        self.decider = Decider(self.table, rng.getrandbits(63), self.log)

    def decide(self, policy, *, taints=False, request_id="", **more):
        preferences = array("d", [self.rng.choice((0.0, 1.5, -2)) for _ in self.rows]) if taints else None
        self.decider.turn = self.rng.randrange(99)
        return self.decider.decide(
            self.prompt[: self.rng.randrange(0, len(self.prompt))],
            SEED,
            Shortlist(self.rows, None, preferences),
            policy,
            request_id,
            output_tokens=self.rng.randrange(40),
            **more,
        )


def copy(recording, policy, **changed):
    """The recording, made of what it tells."""
    told = {
        "at": recording.at,
        "tokens": recording.prompt_tokens,
        "output_tokens": recording.output_tokens,
        "block_size": recording.block_size,
        "turn": recording.turn,
        "session": recording.session,
        "dice": recording.seed,
        "picked": recording.picked,
        "regret": recording.regret,
        "rows": recording.facts(),
    }
    return Recording.restore(policy, None, recording.request_id, **(told | changed))


@settings(max_examples=150, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(1, 9),
    st.sampled_from(MODES),
    st.sampled_from(sorted(COSTS)),
    st.just(0.0) | st.floats(1e-3, 10),
    st.none() | st.integers(0, 2**64 - 1),
    st.booleans(),
)
def test_a_recording_tells_what_decided_and_decides_it_again(rng, targets, mode, cost, temperature, session, taints):
    scene = Scene(rng, targets)
    chosen = policy(mode=mode, cost=cost, temperature=temperature)
    for _ in range(3):
        choice = scene.decide(chosen, explain=True, session=session, booked=True, taints=taints)
        recording = choice.recording
        assert scene.log.since(scene.log.count - 1, 1) == (scene.log.count - 1, [recording])
        picked, scores, chances = recording.verdict()
        seen = recording.candidates()
        assert recording.row(picked) == recording.row(recording.picked) == choice.row
        assert sum(chances) == pytest.approx(1)
        assert chances[picked] > 0
        assert all(each.cost == sum(each.terms) for each in seen)
        assert (seen[picked].cost, seen[picked].terms, seen[picked].tiers) == (choice.cost, choice.terms, choice.tiers)
        if mode == "kv":
            assert scores == [each.cost for each in seen]
        if not temperature:
            assert scores[picked] == min(scores)
            assert all((chance > 0) <= (score == min(scores)) for chance, score in zip(chances, scores, strict=True))
        loads = [(*scene.table.load(row), scene.table.waiting(row)) for row in scene.rows]
        assert [(a, q, b, w) for a, w, q, b, _ in recording.loads()] == loads
        again = copy(recording, chosen)
        assert again.verdict() == recording.verdict()
        assert again.facts() == recording.facts()
        assert [each.terms for each in again.candidates()] == [each.terms for each in seen]
        # What another policy would have done is what the copy says, too, however the first one decided.
        other = policy(mode=rng.choice(MODES), cost=rng.choice(sorted(COSTS)))
        assert again.verdict(other) == recording.verdict(other)


def test_chances_are_how_often_each_is_picked():
    scene = Scene(random.Random(3), 4)
    for chosen in (policy(mode="random"), policy(temperature=0.5), policy(mode="least-loaded")):
        recording = scene.decide(chosen, explain=True).recording
        _, _, chances = recording.verdict()
        count = [0] * 4
        for seed in range(4000):
            count[copy(recording, chosen, dice=seed * 0x9E37).verdict()[0]] += 1
        assert [each / 4000 for each in count] == pytest.approx(chances, abs=0.04)


def test_a_recording_outlives_the_rows_that_it_is_of():
    scene = Scene(random.Random(1), 3)
    recording = scene.decide(policy(), explain=True).recording
    before = recording.facts(), recording.verdict()
    for number in range(3):
        scene.table.remove(number)
    assert (recording.facts(), recording.verdict()) == before


def test_the_ring_keeps_the_last_and_counts_all():
    scene = Scene(random.Random(1), 2, size=4)
    for number in range(10):
        scene.decide(policy(), request_id=str(number))
    log = scene.log
    assert (log.count, log.oldest, len(log), log.size) == (10, 6, 4, 4)
    assert [each.request_id for each in log.since(0, 99)[1]] == ["6", "7", "8", "9"]
    assert (log.since(0, 99)[0], log.since(8, 1)[0]) == (6, 8)
    assert [each.request_id for each in log.since(8, 1)[1]] == ["8"]
    assert log.since(10, 5) == (10, [])
    each = log.bytes // 4
    assert 0 < each < 2 * 120
    scene.decide(policy(), remember=False)
    assert log.count == 10


def test_very_many_targets_are_remembered_in_fewer_decisions():
    scene = Scene(random.Random(1), 1)
    for number in range(1, 70_000):
        scene.table.add(number)
    scene.rows = array("I", range(70_000))
    for _ in range(12):
        scene.decide(policy())
        assert scene.log.bytes <= 64 << 20
    assert 1 <= len(scene.log) < 12
    assert scene.log.count == 12


def test_hashes_are_kept_when_asked():
    assert Scene(random.Random(1), 1).decide(policy(), explain=True).recording.sequence is None
    scene = Scene(random.Random(1), 1, hashes=True)
    recording = scene.decide(policy(), explain=True).recording
    assert recording.sequence == scene.decider.sequence()
    assert len(recording.sequence) == recording.blocks


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": []},
        {"picked": 3},
        {"tokens": -1},
        {"tokens": 1 << 41},
        {"output_tokens": -1},
        {"block_size": -1},
        {"turn": -1},
        {"session": 1 << 64},
        {"dice": -1},
        {"regret": math.nan},
        {"at": math.inf},
        {"rows": [()]},
        {"rows": [(1.5, 0, 0, 0, 0, 0, 0, False, (0, 0, 0, 0), 0, 0, 0.0)]},
        {"rows": [(1.0, 1 << 50, 0, 0, 0, 0, 0, False, (0, 0, 0, 0), 0, 0, 0.0)]},
        {"rows": [(1.0, 0, 0, -1, 0, 0, 0, False, (0, 0, 0, 0), 0, 0, 0.0)]},
        {"rows": [(1.0, 0, 0, 0, 1 << 33, 0, 0, False, (0, 0, 0, 0), 0, 0, 0.0)]},
        {"rows": [(1.0, 0, 0, 0, 0, 0, 0, False, (99, 0, 0, 0), 0, 0, 0.0)]},
        {"rows": [(1.0, 0, 0, 0, 0, 0, 0, False, (0, 0), 0, 0, 0.0)]},
        {"rows": [(1.0, 0, 0, 0, 0, 0, 0, False, (0, 0, 0, 0), 99, 0, 0.0)]},
        {"rows": [(1.0, 0, 0, 0, 0, 0, 0, False, (0, 0, 0, 0), 0, 0, math.nan)]},
    ],
    ids=repr,
)
def test_what_cannot_have_been_is_refused(changed):
    recording = Scene(random.Random(1), 1).decide(policy(), explain=True).recording
    copy(recording, policy())
    with pytest.raises((ValueError, OverflowError, TypeError, IndexError)):
        copy(recording, policy(), **({"picked": 0} | changed))


@pytest.mark.parametrize("size", [0, -1, 1 << 25])
def test_a_log_has_a_size(size):
    with pytest.raises((ValueError, OverflowError)):
        DecisionLog(size)
