"""The compiled decision against its slow, clear twin: every term of every row, and the choice among them."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import Decider, Policy, Shortlist, TargetTable, hash_sequence
from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.mode import Knobs
from reference import pick, regret
from reference.cost import COSTS, Ask, cached_tokens, new_tokens, preferred
from reference.field import NO_BLOCKS, SEED, SIZE, Field, Made
from reference.mode import MODES, Scene, fewest_requests_break_ties


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
        choice = field.decide(weights, explain=True, booked=learn)
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
    assert [field.decide(weights, booked=True).row for _ in range(9)] == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert {field.decide(weights).row for _ in range(9)} == {0}  # asking alone teaches nothing
    assert [field.decide(weights, booked=True).row for _ in range(2)] == [0, 0]
    field.tokens = array("I", [*range(8), 99, 98, 97, 96])  # another question behind the same prefix
    assert field.decide(weights).row == 1


def test_waiting_counts_where_the_prefix_is_little_liked_too():
    # The preference more than doubles what row 0 costs: (4 + 4) * exp(tanh(1)) = 17.1 against 12 + 3 * 8.
    field = Field([Made(tiers=(2, 0, 0, 0), queued=4, taint=-1.0), Made()], range(12))
    weights = Weights(new_work_weight=3.0, request_weight=0.0)
    assert [field.decide(weights, booked=True).row for _ in range(6)] == [0, 0, 0, 0, 1, 0]


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
        array("I", range(100)), SEED, Shortlist(rows), Policy(Weights(), Knobs()), explain=True
    )
    assert (choice.row, choice.blocks, choice.tiers, choice.cached_tokens) == (1, 0, (0, 0, 0, 0), 0)
    assert [seen.terms for seen in choice.recording.candidates()] == [(5, 100, 0, 500, 0), (0, 100, 0, 0, 0)]


def test_multimodal_content_and_seed_are_part_of_the_prompt():
    field = Field([Made((3, 0, 0, 0))], range(12))
    asked = Shortlist(field.rows), Policy(Weights(), Knobs())
    ask = field.decider.decide
    assert ask(field.tokens, SEED, *asked, mm_hashes={}).tiers[0] == 3
    assert ask(field.tokens, SEED, *asked, mm_hashes={1: [9]}).tiers[0] == 1
    assert field.decider.sequence() == hash_sequence(field.tokens, SIZE, SEED, {1: [9]})
    assert ask(field.tokens, SEED + 1, *asked).tiers[0] == 0


def test_blocks_in_flight_count_in_whole_cuts_where_the_groups_of_a_model_ask_for_them():
    """A hybrid engine uses prefixes of whole blocks of its largest group: what is in flight behind the last is no help."""
    field = Field([Made((1, 0, 0, 0), in_flight=7), Made((1, 0, 0, 0), in_flight=7)], range(9 * SIZE + 1))
    slots = (0, None, None, None)
    field.table.set_groups(field.rows[0], ((0, slots),), 4)
    seen = field.decide(explain=True).recording.candidates()
    assert [each.in_flight for each in seen] == [4, 7]
    assert [each.cached_tokens for each in seen] == [4 * SIZE, 7 * SIZE]


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
        ({"shortlist": None}, TypeError, "shortlist"),
        ({"shortlist": Shortlist(array("I"))}, ValueError, "at least one row"),
        ({"shortlist": Shortlist(array("I", [0, 2]))}, KeyError, "row 2"),
        ({"shortlist": Shortlist(array("I", [0, 1]), None, array("d", [1.0]))}, ValueError, "preferences"),
        ({"output_tokens": -1}, ValueError, "output_tokens"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(change, error, said):
    field = Field([Made((2, 0, 0, 0)), Made()], range(8))
    asked = {
        "tokens": field.tokens,
        "seed": SEED,
        "shortlist": Shortlist(field.rows),
        "policy": Policy(Weights(), Knobs()),
    }
    with pytest.raises(error, match=said):
        field.decider.decide(**(asked | change))
    assert field.decider.decide(**asked).tiers[0] == 2


def test_a_shortlist_takes_arrays_of_its_types_only():
    for wrong in (array("Q", [0]), array("i", [0])):
        with pytest.raises(ValueError, match="rows"):
            Shortlist(wrong)
    with pytest.raises(ValueError, match="preferences"):
        Shortlist(array("I", [0]), None, array("f", [1.0]))


def test_only_what_is_booked_takes_a_turn():
    field = Field([Made()] * 3, range(4))
    turns = []
    for booked in (True, False, False, True):
        asked = Shortlist(field.rows), Policy(Weights(), Knobs(), mode="round-robin")
        turns.append(field.decider.decide(field.tokens, SEED, *asked, booked=booked).row)
    assert turns == [0, 1, 1, 1]
    assert field.decider.turn == 2


def test_policies_know_their_names():
    with pytest.raises(ValueError, match="default, dynamo, dynamo-example, lmetric"):
        Policy(Weights(), Knobs(), cost="other")
    with pytest.raises(ValueError, match="round-robin"):
        Policy(Weights(), Knobs(), mode="other")
