"""The compiled decision against its slow, clear twin: every term of every row, and the choice among them."""

import math
from array import array
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import Decider, Policy, RadixTree, TargetTable, hash_sequence
from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.mode import Knobs
from kvrouter_grpc.types import Overlap
from reference import pick, regret
from reference.cost import COSTS, Ask, Row, cached_tokens, new_tokens, preferred
from reference.mode import MODES, Scene, Seat, fewest_requests_break_ties

SIZE = 4
SEED = 1337
NO_BLOCKS = array("Q")


@dataclass
class Made:
    """What a row of the table is made to be."""

    tiers: tuple[int, int, int, int] = (0, 0, 0, 0)  # blocks of the prompt in each tier, one tier after the other
    in_flight: int = 0
    fresh: float = 1.0
    queued: int = 0
    private: int = 0
    requests: int = 0
    total: int = 0
    taint: float = 0.0
    on_cpu: bool = False
    foreign: tuple[int, int, int, int] = (0, 0, 0, 0)  # as `TargetTable.foreign` tells it


class Field:
    """A table, an index and a decider with the rows of `made`, all about one prompt."""

    def __init__(self, made, tokens, seed=1):
        self.tokens = array("I", tokens)
        self.made = made
        self.table = TargetTable()
        self.index = RadixTree(SIZE)
        self.table.attach(self.index)
        self.decider = Decider(self.table, seed)
        self.seqs = hash_sequence(self.tokens, SIZE, SEED)
        self.rows = array("I", [self._row(number, one) for number, one in enumerate(made)])
        self.preferences = array("d", [one.taint for one in made])
        self.turn = 0

    def _row(self, number, made):
        row = self.table.add(number)
        depth = 0
        for tier, blocks in enumerate(made.tiers):
            if blocks:
                slot = self.index.add_slot()
                self.table.set_slot(row, tier, slot)
                names = array("Q", [1000 * number + depth + i for i in range(blocks)])
                for other in range(self.index.stats()["slots"]):
                    if depth == 0 or self.index.holds(other, names[0] - 1):
                        parent = names[0] - 1 if depth else None
                        below = self.tokens[depth * SIZE : (depth + blocks) * SIZE]
                        assert self.index.store(slot, parent, names[: len(below) // SIZE], below, SEED, None, other)
                        break
                depth += blocks
        self.table.set_freshness(row, made.fresh)
        self.table.describe(row, total_blocks=made.total, identity=identity(number), on_cpu=made.on_cpu)
        self.table.book(row, self.seqs[: made.in_flight], made.queued, True)
        self.table.book(row, array("Q", range(made.private)), 0, False)
        for _ in range(made.requests):
            ticket = self.table.book(row, NO_BLOCKS, 0, True)
            self.table.first_token(ticket, 0)
        self.table.set_foreign(row, *made.foreign)
        return row

    def expected_rows(self):
        rows = []
        for made in self.made:
            tiers, left = [], len(self.seqs)
            for blocks in made.tiers:
                tiers.append(min(blocks, left))
                left -= tiers[-1]
            in_flight = min(made.in_flight, len(self.seqs))
            requests, waiting, tokens, blocks = made.foreign
            rows.append(
                Row(
                    overlap=Overlap(*tiers),
                    in_flight_blocks=in_flight,
                    freshness=made.fresh,
                    queued_prefill_tokens=made.queued + tokens,
                    active_blocks=in_flight + made.private + blocks,
                    active_requests=made.requests + 2 + requests,
                    total_blocks=min(made.total, 2**32 - 1),
                    waiting_requests=2 + waiting,
                    taint_preference=made.taint,
                )
            )
        return rows

    @property
    def seats(self):
        return [Seat(identity(number), made.on_cpu) for number, made in enumerate(self.made)]

    def decide(
        self,
        weights=Weights(),  # noqa: B008
        knobs=Knobs(),  # noqa: B008
        *,
        output=0,
        explain=False,
        preferences=True,
        session=None,
        learn=False,
        **policy,
    ):
        return self.decider.decide(
            self.tokens,
            SEED,
            None,
            Policy(weights, knobs, **policy),
            self.rows,
            self.preferences if preferences else None,
            output,
            self.turn,
            explain,
            session,
            learn,
        )


def identity(number):
    return pick.scramble(number + 1)


def tiers(draw_total):
    return st.tuples(*(st.integers(0, draw_total) | st.just(0) for _ in range(4)))


MADE = st.builds(
    Made,
    tiers=st.tuples(st.integers(0, 12), st.just(0), st.just(0), st.just(0)) | tiers(5),
    in_flight=st.integers(0, 12),
    fresh=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1),
    queued=st.sampled_from([0, 0, 16, 64]) | st.integers(0, 100_000),
    private=st.integers(0, 30),
    requests=st.integers(0, 3),
    total=st.sampled_from([0, 10, 20]) | st.integers(0, 2**33),
    taint=st.just(0.0) | st.floats(-5, 5),
    on_cpu=st.booleans(),
    foreign=st.just((0, 0, 0, 0))
    | st.tuples(st.integers(3, 9), st.integers(0, 3), st.integers(0, 5000), st.integers(0, 500)),
)
KNOB = st.sampled_from([0.0, 1.0]) | st.floats(0, 1e6)
WEIGHTS = st.builds(
    Weights,
    new_work_weight=KNOB,
    request_weight=KNOB,
    overlap_score_credit=KNOB,
    overlap_score_credit_decay=KNOB,
    prefill_load_scale=KNOB,
    decode_active_request_weight=KNOB,
    host_cache_hit_weight=st.floats(0, 1),
    disk_cache_hit_weight=st.floats(0, 1),
    remote_cache_hit_weight=st.floats(0, 1),
    track_active_blocks=st.booleans(),
    track_prefill_tokens=st.booleans(),
    assume_kv_reuse=st.booleans(),
)
TEMPERATURES = st.just(0.0) | st.floats(1e-6, 1e6)


KNOBS = st.builds(
    Knobs,
    session_load_bound=st.sampled_from([1.0, 1.25, 1e6]),
    prefix_threshold=st.sampled_from([0, 8, 20]),
    kv_aware_threshold=st.sampled_from([0, 4, 30, 2000]),
    accelerator_to_cpu_ratio=st.sampled_from([1.0, 1.5, 8.0]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(MADE, min_size=1, max_size=9),
    st.integers(0, 50),
    st.sampled_from(sorted(COSTS)),
    st.just("kv") | st.sampled_from(sorted(MODES)),
    WEIGHTS,
    KNOBS,
    TEMPERATURES,
    st.none() | st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 50),
)
def test_terms_overlaps_and_choice_are_those_of_the_reference(
    made, length, cost, mode, weights, knobs, temperature, session, seed, output
):
    field = Field(made, range(7, 7 + length), seed)
    ask = Ask(length, SIZE, output)
    rows = field.expected_rows()
    terms = COSTS[cost].score(rows, ask, weights)
    dice = pick.Dice(seed)
    for field.turn in range(3):
        choice = field.decide(
            weights, knobs, cost=cost, mode=mode, temperature=temperature, output=output, session=session, explain=True
        )
        for seen, row, expected, number in zip(choice.recording.candidates(), rows, terms, field.rows, strict=True):
            assert (seen.row, seen.blocks, seen.freshness) == (number, length // SIZE, row.freshness)
            assert seen.tiers == row.overlap
            assert seen.in_flight == row.in_flight_blocks
            assert seen.terms == pytest.approx(preferred(expected, row), rel=1e-12)
            assert seen.cost == sum(seen.terms)
            in_flight = row.in_flight_blocks if COSTS[cost].own else 0
            assert seen.cached_tokens == cached_tokens(row.overlap, in_flight, ask)
            assert seen.new_tokens == new_tokens(row, ask, weights, own=COSTS[cost].own)
        # Costs are compared on the compiled ones: their last bits are the compiler's.
        scene = Scene(rows, field.seats, ask, cost, weights, knobs, field.turn, session, dice)
        scores = (
            [seen.cost for seen in choice.recording.candidates()] if mode in {"kv", "direct"} else MODES[mode](scene)
        )
        if temperature:
            assert choice.row == field.rows[pick.softmax(scores, temperature, dice)]
        else:
            requests = scene.requests if fewest_requests_break_ties(mode, cost) else None
            assert choice.row == field.rows[pick.lowest(scores, requests, dice)]
        seen = choice.recording.candidates()[field.rows.index(choice.row)]
        assert (choice.cost, choice.terms) == (seen.cost, seen.terms)


@settings(max_examples=150, deadline=None)
@given(st.lists(MADE, min_size=1, max_size=5), st.integers(0, 50), WEIGHTS, st.lists(st.booleans(), max_size=8))
def test_regret_is_that_of_the_reference(made, length, weights, learning):
    field = Field(made, range(7, 7 + length))
    rows, regrets = field.expected_rows(), regret.Regrets()
    depth = regret.deepest(rows, Ask(length, SIZE))
    for learn in learning:
        ask = Ask(length, SIZE, regret=regrets.of(field.seqs[depth - 1]) if depth else 0.0)
        choice = field.decide(weights, explain=True, learn=learn)
        for seen, row, expected in zip(
            choice.recording.candidates(), rows, COSTS["default"].score(rows, ask, weights), strict=True
        ):
            assert seen.terms == pytest.approx(preferred(expected, row), rel=1e-9, abs=1e-6)
        if learn and depth:
            regrets.set(field.seqs[depth - 1], regret.after(rows, ask, weights, field.rows.index(choice.row)))


def test_a_prefix_that_many_wait_for_gets_another_holder_and_a_private_one_does_not():
    # Row 0 has the prefix of 8 tokens and more work than computing it would be; row 1 is idle.
    field = Field([Made(tiers=(2, 0, 0, 0), queued=19), Made()], range(12))
    weights = Weights(new_work_weight=3.0, request_weight=0.0)
    # 19 + 4 against 12 + 3 * 8: each that stays regrets 11, and the third finds 22 of the 24 paid.
    assert [field.decide(weights, learn=True).row for _ in range(9)] == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert {field.decide(weights).row for _ in range(9)} == {0}  # asking alone teaches nothing
    assert [field.decide(weights, learn=True).row for _ in range(2)] == [0, 0]
    field.tokens = array("I", [*range(8), 99, 98, 97, 96])  # another question behind the same prefix
    assert field.decide(weights).row == 1


@pytest.mark.parametrize("targets", [1, 2, 64, 1024])
@pytest.mark.parametrize("cost", sorted(COSTS))
def test_many_targets(targets, cost):
    made = [
        Made((number % 5, 0, 0, 0), number % 3, 1.0, number * 7 % 13 * 4, number % 4, number % 2, 100)
        for number in range(targets)
    ]
    field = Field(made, range(22), seed=5)
    rows = field.expected_rows()
    costs = [sum(terms) for terms in COSTS[cost].score(rows, Ask(22, SIZE), Weights())]
    requests = [row.active_requests for row in rows] if COSTS[cost].own else None
    dice = pick.Dice(5)
    for _ in range(5):
        choice = field.decide(cost=cost, preferences=False)
        assert choice.row == field.rows[pick.lowest(costs, requests, dice)]
        assert (choice.terms, choice.recording) == (None, None)
    # Only some of them, in another order.
    field.rows = field.rows[:: -2 if targets > 1 else 1]
    some = costs[:: -2 if targets > 1 else 1]
    requests = requests[:: -2 if targets > 1 else 1] if requests else None
    assert field.decide(cost=cost, preferences=False).row == field.rows[pick.lowest(some, requests, dice)]


def test_ties_go_to_the_fewest_requests_then_evenly():
    field = Field([Made(requests=2), Made(requests=1), Made(queued=1), Made(requests=2)], [1])
    weights = Weights(request_weight=0.0)
    assert {field.decide(weights).row for _ in range(50)} == {1}
    field = Field([Made(requests=3), Made(requests=3), Made(queued=1), Made(requests=3)], [1])
    even = Counter(field.decide(weights).row for _ in range(9000))
    assert set(even) == {0, 1, 3}
    assert all(abs(count - 3000) < 300 for count in even.values())  # six standard deviations


def test_softmax_follows_the_formula():
    field = Field([Made(queued=10), Made(queued=20), Made(queued=40)], [])
    draws, temperature = 30_000, 0.5
    drawn = Counter(field.decide(temperature=temperature).row for _ in range(draws))
    weights = [math.exp(-(cost - 10) / (30 * temperature)) for cost in (10, 20, 40)]
    for row, weight in enumerate(weights):
        share = weight / sum(weights)
        assert drawn[row] / draws == pytest.approx(share, abs=6 * math.sqrt(share / draws))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_never_preferred(temperature, wrong):
    field = Field([Made(taint=math.nan), Made(taint=1.0), Made(taint=math.nan)], range(8))
    choices = [field.decide(cost="dynamo", temperature=temperature, explain=True) for _ in range(50)]
    assert {choice.row for choice in choices} == {1}
    assert [seen.cost for seen in choices[0].recording.candidates()][::2] == [math.inf, math.inf]
    field = Field([Made(), Made()], range(8))
    endless = [field.decide(Weights(new_work_weight=wrong), temperature=temperature) for _ in range(100)]
    assert {choice.row for choice in endless} == {0, 1}  # somebody has to have it
    assert all(choice.cost == math.inf for choice in endless)


def test_taking_turns_and_chance():
    field = Field([Made() for _ in range(5)], range(8))
    for field.turn in range(12):
        assert field.decide(mode="round-robin").row == field.turn % 5
    even = Counter(field.decide(mode="random").row for _ in range(5000))
    assert all(abs(even[row] - 1000) < 180 for row in range(5))


def test_the_less_busy_of_two():
    field = Field([Made(requests=number) for number in range(4)], range(8))
    drawn = Counter(field.decide(mode="power-of-two").row for _ in range(6000))
    # Of six pairs, the least busy row is in three, the next in two more, and so on; the busiest never wins.
    assert [round(6 * drawn[row] / 6000) for row in range(4)] == [3, 2, 1, 0]
    assert drawn[3] == 0
    even = Field([Made()] * 3, range(8))
    drawn = Counter(even.decide(mode="power-of-two").row for _ in range(3000))
    assert all(abs(drawn[row] - 1000) < 160 for row in range(3))
    assert Field([Made()], [1]).decide(mode="power-of-two").row == 0


def test_targets_on_cpus_get_their_share():
    """Each decision is booked: an accelerator that is worth four CPUs ends up with four times as much as one."""
    field = Field([Made(), Made(), Made(on_cpu=True)], range(4))
    for _ in range(900):
        chosen = field.decide(knobs=Knobs(accelerator_to_cpu_ratio=4.0), mode="device-aware-weighted").row
        field.table.book(chosen, NO_BLOCKS, 0, True)
    requests = [field.table.load(row)[0] - 2 for row in field.rows]
    assert requests == pytest.approx([400, 400, 100], abs=4)


def test_a_session_stays_and_a_target_that_goes_moves_only_its_own():
    sessions = [pick.scramble(number) for number in range(2000)]
    field = Field([Made() for _ in range(8)], range(4))
    knobs = Knobs(session_load_bound=1e6)
    homes = {key: field.decide(knobs=knobs, mode="session", session=key).row for key in sessions}
    assert all(abs(count - 250) < 90 for count in Counter(homes.values()).values())
    assert len(set(homes.values())) == 8
    field.rows, field.preferences = field.rows[:3] + field.rows[4:], field.preferences[1:]
    for key, home in homes.items():
        moved = field.decide(knobs=knobs, mode="session", session=key).row
        assert home in {moved, 3}


def test_a_busy_target_passes_sessions_on_and_nobody_exceeds_the_bound():
    field = Field([Made() for _ in range(5)], range(4))
    for number in range(500):
        chosen = field.decide(knobs=Knobs(session_load_bound=1.25), mode="session", session=7 + number % 3).row
        field.table.book(chosen, NO_BLOCKS, 0, True)
    requests = [field.table.load(row)[0] for row in field.rows]
    assert max(requests) <= math.ceil(1.25 * sum(requests) / 5)


def test_prefix_modes_fall_back_when_the_match_is_short():
    made = [Made((3, 0, 0, 0), requests=5), Made((3, 0, 0, 0), requests=4), Made()]
    field = Field(made, range(20))
    assert field.decide(mode="prefix").row == 1
    assert field.decide(knobs=Knobs(prefix_threshold=12), mode="prefix").row == 1
    assert field.decide(knobs=Knobs(prefix_threshold=13), mode="prefix").row == 2
    assert field.decide(knobs=Knobs(kv_aware_threshold=8), mode="kv-aware").row == 1
    assert field.decide(knobs=Knobs(kv_aware_threshold=7), mode="kv-aware").row == 2
    homes = {
        field.decide(knobs=Knobs(session_load_bound=9, kv_aware_threshold=7), mode="kv-aware", session=key).row
        for key in range(50)
    }
    assert homes == {0, 1, 2}
    assert Field([Made(requests=1), Made()], range(20)).decide(mode="kv-aware").row == 1  # nobody holds anything


def test_the_average_of_new_tokens_follows_the_decisions():
    field = Field([Made()], range(20))
    assert field.decider.usual_new_tokens == 0
    for _ in range(1000):
        field.decide()
    assert field.decider.usual_new_tokens == pytest.approx(20)


def test_a_seed_repeats_the_choices():
    again = [
        [Field([Made()] * 8, range(4), seed).decide(temperature=t).row for seed in range(40)] for t in (0.0, 0.0, 1.0)
    ]
    assert again[0] == again[1]
    assert len(set(again[0])) == len(set(again[2])) == 8
    unseeded = {tuple(Field([Made()] * 8, [1], None).decide().row for _ in range(1)) for _ in range(60)}
    assert len(unseeded) > 1


def test_without_an_index_load_alone_decides():
    table = TargetTable()
    rows = array("I", [table.add("a"), table.add("b")])
    table.book(rows[0], NO_BLOCKS, 5, True)
    choice = Decider(table).decide(
        array("I", range(100)), SEED, None, Policy(Weights(), Knobs()), rows, None, 0, 0, True
    )
    assert (choice.row, choice.blocks, choice.tiers, choice.cached_tokens) == (1, 0, (0, 0, 0, 0), 0)
    assert [seen.terms for seen in choice.recording.candidates()] == [(5, 100, 0, 500, 0), (0, 100, 0, 0, 0)]


def test_multimodal_content_and_seed_are_part_of_the_prompt():
    field = Field([Made((3, 0, 0, 0))], range(12))
    policy = Policy(Weights(), Knobs())
    ask = field.decider.decide
    assert ask(field.tokens, SEED, {}, policy, field.rows, None, 0, 0, False).tiers[0] == 3
    assert ask(field.tokens, SEED, {1: [9]}, policy, field.rows, None, 0, 0, False).tiers[0] == 1
    assert field.decider.sequence() == hash_sequence(field.tokens, SIZE, SEED, {1: [9]})
    assert ask(field.tokens, SEED + 1, None, policy, field.rows, None, 0, 0, False).tiers[0] == 0


def test_the_decider_follows_rows_and_slots_that_come_and_go():
    field = Field([Made((2, 0, 0, 0), in_flight=1), Made((3, 1, 0, 0))], range(20))
    for number in range(100):
        field.table.add(f"more {number}")
    late = field._row(7, Made((4, 0, 0, 0), in_flight=5))
    field.rows.append(late)
    field.preferences.append(0.0)
    assert [(seen.tiers[:2], seen.in_flight) for seen in field.decide(explain=True).recording.candidates()] == [
        ((2, 0), 1),
        ((3, 1), 0),
        ((4, 0), 5),
    ]
    field.table.remove(7)
    with pytest.raises(KeyError, match=f"row {late}"):
        field.decide()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"tokens": array("Q", [1])}, ValueError, "items of 8 bytes"),
        ({"tokens": [1, 2]}, TypeError, "bytes-like"),
        ({"seed": -1}, ValueError, "seed"),
        ({"mm_hashes": {0: [2**64]}}, ValueError, "mm_hashes"),
        ({"policy": None}, TypeError, "policy"),
        ({"rows": array("I")}, ValueError, "at least one row"),
        ({"rows": array("Q", [0])}, ValueError, "array"),
        ({"rows": array("I", [0, 2])}, KeyError, "row 2"),
        ({"preferences": array("d", [1.0])}, ValueError, "preferences"),
        ({"preferences": array("f", [1.0, 1.0])}, ValueError, "preferences"),
        ({"output_tokens": -1}, ValueError, "output_tokens"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(change, error, said):
    field = Field([Made((2, 0, 0, 0)), Made()], range(8))
    asked = {
        "tokens": field.tokens,
        "seed": SEED,
        "mm_hashes": None,
        "policy": Policy(Weights(), Knobs()),
        "rows": field.rows,
        "preferences": None,
        "output_tokens": 0,
        "turn": 0,
        "explain": False,
    }
    with pytest.raises(error, match=said):
        field.decider.decide(*(asked | change).values())
    assert field.decider.decide(*asked.values()).tiers[0] == 2


def test_policies_know_their_names():
    with pytest.raises(ValueError, match="default, dynamo, dynamo-example, lmetric"):
        Policy(Weights(), Knobs(), cost="other")
    with pytest.raises(ValueError, match="round-robin"):
        Policy(Weights(), Knobs(), mode="other")
