"""Remote storage that all workers read: what one of them put there counts for all, at a worth of its own."""

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import Decider, Policy, RadixTree, Recording, Shortlist, TargetTable, hash_sequence
from kvrouter_grpc.routing.cost import Weights, credit_blocks
from kvrouter_grpc.routing.mode import Knobs
from kvrouter_grpc.routing.plan import Plan
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.types import (
    Overlap,
    Prompt,
    RouterOverride,
    RoutingHints,
    RoutingRequest,
    StreamState,
    Target,
    Tier,
    WorkerFacts,
    WorkerSpec,
    WorkerState,
)
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksRemoved, BlocksStored
from reference.shared import overlap

SEED = 1337
SIZE = 16
ENDPOINT = "ns.backend.generate"
FREE = RoutingHints()
WORDS = list(range(100, 196))  # six blocks


# --- the overlaps ---------------------------------------------------------------------------------------------------


class Scene:
    """A prompt of blocks of one token, in a tree with branches off it, and targets that hold some of it."""

    def __init__(self, rng, length, targets):
        self.rng, self.length = rng, length
        self.index = RadixTree(1)
        self.table = TargetTable()
        self.table.attach(self.index)
        self.tokens = array("I", [rng.randrange(5) for _ in range(length)])
        self.seqs = hash_sequence(self.tokens, 1, SEED)
        others = self.index.add_slot()
        for cut in rng.sample(range(length), min(length, rng.randrange(4))):
            self.index.store(others, None, array("Q", range(cut + 2)), self.tokens[:cut] + array("I", [9, 9]), SEED)
        self.held, self.pools, self.fresh = [], [], []
        for number in range(targets):
            row = self.table.add(number)
            self.held.append([self._hold(row, tier) for tier in range(4)])
            self.pools.append(rng.choice((7, 7, 8)))
            self.fresh.append(rng.choice((0.0, 0.5, 1.0)))
            self.table.describe(row, pool=self.pools[-1])
            self.table.set_freshness(row, self.fresh[-1])
        self.rows = array("I", range(targets))

    def _hold(self, row, tier):
        """Lets a target hold some blocks in a tier; their positions."""
        rng = self.rng
        if rng.random() < 0.4:
            return set()
        slot = self.index.add_slot()
        self.table.set_slot(row, tier, slot)
        if not self.length:
            return set()
        names = array("Q", range(1000, 1000 + self.length))
        self.index.store(slot, None, names, self.tokens, SEED)
        share = rng.choice([0.0, 0.2, 0.6])
        low, high = sorted((rng.randint(0, self.length), rng.randint(0, self.length)))
        held = {block for block in range(low if tier else 0, high) if rng.random() >= share}
        gone = [names[block] for block in range(self.length) if block not in held]
        rng.shuffle(gone)
        self.index.remove(slot, array("Q", gone))
        return held

    def shared(self, pool):
        believed = [
            held[3] for held, own, fresh in zip(self.held, self.pools, self.fresh, strict=True) if own == pool and fresh
        ]
        return set().union(*believed)

    def expected(self, *, shared):
        return [
            overlap(held, self.shared(pool) if shared else None, self.length)
            for held, pool in zip(self.held, self.pools, strict=True)
        ]


@settings(max_examples=200, deadline=None)
@given(rng=st.randoms(use_true_random=False), length=st.integers(0, 140), targets=st.integers(1, 6))
def test_overlaps_are_those_of_the_reference(rng, length, targets):
    scene = Scene(random.Random(rng.random()), length, targets)
    for shared in (False, True):
        expected = scene.expected(shared=shared)
        assert scene.table.overlaps(scene.rows, scene.seqs, shared) == expected
        decider = Decider(scene.table, 1)
        policy = Policy(Weights(shared_cache=shared), Knobs())
        # Who may be chosen serves one model; what they share is not only what those have that may be chosen.
        asked = array("I", [row for row in scene.rows if scene.pools[row] == scene.pools[0]])
        for rows in (asked, asked[-1:]):
            choice = decider.decide(scene.tokens, SEED, Shortlist(rows), policy, explain=True)
            seen = choice.recording.candidates()
            assert [each.tiers for each in seen] == [expected[row] for row in rows]
            assert choice.tiers == expected[choice.row]
        again = Recording.restore(
            policy,
            None,
            "",
            at=0.0,
            tokens=length,
            output_tokens=0,
            block_size=1,
            turn=0,
            session=None,
            dice=choice.recording.seed,
            picked=choice.recording.picked,
            regret=choice.recording.regret,
            rows=choice.recording.facts(),
        )
        assert [each.cost for each in again.candidates()] == [each.cost for each in seen]


def test_a_row_that_goes_takes_what_it_shared_along():
    rng = random.Random(1)
    scene = Scene(rng, 0, 0)
    scene.length, scene.tokens = 4, array("I", range(4))
    scene.seqs = hash_sequence(scene.tokens, 1, SEED)
    for name in "ab":
        scene.table.set_freshness(scene.table.add(name), 1.0)
    slot = scene.index.add_slot()
    scene.table.set_slot(scene.table.row("b"), 3, slot)
    scene.index.store(slot, None, array("Q", range(4)), scene.tokens, SEED)
    assert scene.table.overlaps([0], scene.seqs, True) == [(0, 0, 0, 4)]
    assert scene.table.overlaps([0], scene.seqs) == [(0, 0, 0, 0)]
    scene.table.remove("b")
    assert scene.table.overlaps([0], scene.seqs, True) == [(0, 0, 0, 0)]
    with pytest.raises(KeyError):
        scene.table.overlaps([1], scene.seqs, True)


# --- what they are worth --------------------------------------------------------------------------------------------


def test_the_credit_has_a_weight_of_its_own():
    held = Overlap(4, 2, 1, 3)
    assert credit_blocks(held, Weights(remote_cache_hit_weight=0.5)) == 4 + 1.5 + 0.25 + 1.5


@pytest.mark.parametrize(
    ("config", "shares", "worth"),
    [
        ({}, False, 0.25),
        ({"disk_cache_hit_weight": 0.1}, False, 0.1),
        ({"shared_cache_multiplier": 0.9}, False, 0.25),
        ({"shared_cache_type": "events"}, True, 0.5),
        ({"shared_cache_type": "hicache"}, True, 0.5),
        ({"shared_cache_type": "events", "shared_cache_multiplier": 0.0}, True, 0.0),
    ],
)
def test_settings(config, shares, worth):
    plan = Plan.of(RouterConfig(**config))
    assert (plan.weights.shared_cache, plan.weights.remote_cache_hit_weight) == (shares, worth)
    changed = plan.changed(RouterOverride(shared_cache_multiplier=0.75))
    assert changed.weights.remote_cache_hit_weight == (0.75 if shares else worth)
    assert plan.decoding().weights.remote_cache_hit_weight == 0


# --- the router -----------------------------------------------------------------------------------------------------


def make(**config):
    return Router(ENDPOINT, RouterConfig(**({"block_size": SIZE, "seed": 1} | config)), clock=lambda: 0.0)


def add(router, name, model="base"):
    worker = router.workers.add(WorkerSpec(name, f"http://{name}", ENDPOINT, dp_size=1))
    router.workers.introduced(worker, worker.spec, WorkerFacts((model,)))
    router.add_targets(worker.targets)
    router.index.stream(worker.targets[0]).state = StreamState.LIVE
    router.index.refresh(worker.targets[0])
    router.workers.set_health(worker, WorkerState.READY)
    return worker


def tell(router, worker, *events):
    router.index.apply_payload(Target(worker.worker_id, 0), encode_batch(events))


def stored(first, end, tier):
    """Blocks of WORDS, named by their number from 1 on."""
    words = array("I", WORDS[first * SIZE : end * SIZE])
    return BlocksStored(array("Q", range(first + 1, end + 1)), first or None, words, SIZE, tier=tier)


def asked(router, *, model="", hints=FREE):
    decision = router.best_worker(RoutingRequest(Prompt(array("I", [*WORDS, 1])), hints, model, explain=True))
    return decision, {each.worker_name: each for each in decision.candidates}


def test_a_block_in_remote_storage_counts_for_every_worker():
    router = make(shared_cache_type="events", cost="dynamo")
    a, b = add(router, "a"), add(router, "b")
    tell(router, a, stored(0, 6, Tier.DEVICE), stored(0, 6, Tier.REMOTE))
    tell(router, b, stored(0, 2, Tier.DEVICE))
    decision, seen = asked(router)
    assert (decision.worker_name, decision.overlap) == ("a", Overlap(6))
    assert seen["b"].overlap == Overlap(2, 0, 0, 4)
    # 97 tokens, of which b has two blocks at hand and four at half their worth
    assert seen["b"].terms["prefill"] == pytest.approx(97 / 16 - 2 - 4 * 0.5)
    scores = router.overlap_scores(Prompt(array("I", WORDS)))
    assert {each.worker_name: (each.overlap, each.credit_blocks) for each in scores.targets} == {
        "a": (Overlap(6), 6.0),
        "b": (Overlap(2, 0, 0, 4), 4.0),
    }
    _, seen = asked(router, hints=RoutingHints(override=RouterOverride(shared_cache_multiplier=0.25)))
    assert seen["b"].terms["prefill"] == pytest.approx(97 / 16 - 2 - 4 * 0.25)
    # It is fetched, so the engine finds it: what is booked and foretold follows.
    pin = RoutingHints(worker_id=b.worker_id)
    pinned = router.lease(RoutingRequest(Prompt(array("I", [*WORDS, 1])), pin, request_id="r")).decision
    assert (pinned.expected_cached_tokens, pinned.new_tokens) == (96, 97 - 64)
    # What is removed there is nobody's any more.
    tell(router, a, BlocksRemoved(array("Q", [4]), Tier.REMOTE))
    assert asked(router)[1]["b"].overlap == Overlap(2, 0, 0, 1)


def test_without_the_setting_it_counts_for_its_own_worker_alone():
    router = make()
    a, b = add(router, "a"), add(router, "b")
    tell(router, a, stored(0, 6, Tier.REMOTE))
    assert b
    _, seen = asked(router)
    assert (seen["a"].overlap, seen["b"].overlap) == (Overlap(0, 0, 0, 6), Overlap())
    assert [each.overlap.total for each in router.overlap_scores(Prompt(array("I", WORDS))).targets] in ([6, 0], [0, 6])


def test_another_model_does_not_read_it():
    router = make(shared_cache_type="events")
    a, _ = add(router, "a", "one"), add(router, "b", "other")
    tell(router, a, stored(0, 6, Tier.REMOTE))
    assert asked(router, model="one")[0].overlap == Overlap(0, 0, 0, 6)
    assert asked(router, model="other")[0].overlap == Overlap()
    held = {each.worker_name: each.overlap.total for each in router.overlap_scores(Prompt(array("I", WORDS))).targets}
    assert held == {"a": 6, "b": 0}


def test_the_load_decides_where_all_can_fetch():
    router = make(shared_cache_type="events")
    a, b = add(router, "a"), add(router, "b")
    tell(router, a, stored(0, 6, Tier.REMOTE))
    for number in range(3):
        pin = RoutingHints(worker_id=a.worker_id)
        router.lease(RoutingRequest(Prompt(array("I", [5] * 64)), pin, request_id=f"r{number}"))
    assert asked(router)[0].target.worker_id == b.worker_id
