"""The reference costs against figures worked out by hand from their published formulas.

`test_decider.py` compares the compiled ones with these.
"""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.routing.cost import COSTS as NAMES
from kvrouter_grpc.routing.cost import Weights, credit_blocks
from kvrouter_grpc.types import Overlap
from reference.cost import COSTS, Ask, Row, cached_tokens, new_tokens, preferred


def row(
    device=0, host=0, disk=0, *, in_flight=0, fresh=1.0, queued=0, active=0, requests=0, total=0, waiting=0, taint=0.0
):
    return Row(
        Overlap(device, host, disk), in_flight, fresh, queued, active, requests, total, waiting, taint_preference=taint
    )


def score(name, rows, ask, **weights):
    scored = COSTS[name].score(rows, ask, Weights(**weights))
    return [preferred(terms, row) for terms, row in zip(scored, rows, strict=True)]


ASK = Ask(prompt_tokens=100, block_size=16)


@pytest.mark.parametrize(
    ("given_row", "weights", "expected"),
    [
        (row(), {}, (0, 100, 300, 0, 0)),  # nothing cached: 100, and 3 * 100 that the other row would not compute
        (row(4), {}, (0, 36, 108, 0, 0)),
        (row(4, queued=50), {}, (50, 36, 108, 0, 0)),
        (row(4, in_flight=5), {}, (0, 20, 60, 0, 0)),  # a request in flight pins more than is cached yet
        (row(4, fresh=0.5), {}, (0, 68, 204, 0, 0)),  # half the trust, half the overlap
        (row(4, in_flight=4, fresh=0.0), {}, (0, 36, 108, 0, 0)),  # what this router sent is known without events
        (row(4), {"new_work_weight": 0.0}, (0, 36, 0, 0, 0)),
        (row(2, 2, 2), {}, (0, 36, 108, 0, 0)),  # two blocks, and two each worth 0.75 and 0.25
        (row(2, 2, 2), {"host_cache_hit_weight": 1.0, "disk_cache_hit_weight": 1.0}, (0, 4, 12, 0, 0)),
        (row(4, requests=3), {}, (0, 36, 108, 1500, 0)),
        (row(4, requests=3), {"request_weight": 5.0}, (0, 36, 108, 15, 0)),
        (row(active=90, total=100), {}, (0, 100, 300, 0, 0)),  # 90 + 7 of 100 blocks
        (row(active=98, total=100), {}, (0, 100, 300, 0, 10 * 5 * 16)),  # 98 + 7: five blocks short
        (row(active=98, total=100, in_flight=5), {}, (0, 20, 60, 0, 0)),  # five of the seven are pinned already
        (row(active=98, total=100), {"track_active_blocks": False}, (0, 100, 300, 0, 0)),
        (row(queued=50), {"track_prefill_tokens": False}, (0, 100, 300, 0, 0)),
    ],
)
def test_default_cost_by_hand(given_row, weights, expected):
    everything = row(in_flight=6)  # all that a cache can save: four tokens are left
    [terms, other] = score("default", [given_row, everything], ASK, **weights)
    assert other[1:3] == (4, 0)
    least = 4 * weights.get("new_work_weight", 3.0)
    assert terms == pytest.approx((*expected[:2], max(0, expected[2] - least), *expected[3:]))


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (0.0, [(100, 0), (100, 0), (100, 0)]),  # by load alone
        (0.5, [(68, 0), (84, 48), (60, -24)]),  # a cached block saves half of what it would
        (1.0, [(36, 0), (68, 96), (20, -48)]),
        (3.0, [(36, 0), (68, 96), (20, -48)]),  # and none more than itself
    ],
)
def test_what_is_cached_counts_as_much_as_was_asked(credit, expected):
    rows = [row(4), row(2), row(4, in_flight=5)]
    for name in ("default", "lmetric"):
        terms = score(name, rows, ASK, overlap_score_credit=credit)
        assert [each[1 if name == "default" else 0] for each in terms] == [new for new, _ in expected]
    least = min(copied for _, copied in expected)
    assert [each[2] for each in score("default", rows, ASK, overlap_score_credit=credit)] == [
        copied - least for _, copied in expected
    ]


def test_default_cost_of_the_row_that_has_most_has_no_replication():
    rows = [row(4), row(2), row()]
    assert [terms[2] for terms in score("default", rows, ASK)] == [0, 96, 192]


@pytest.mark.parametrize(("regret", "expected"), [(0, [0, 96, 192]), (100, [0, 0, 92]), (1000, [0, 0, 0])])
def test_regret_pays_for_replication(regret, expected):
    rows = [row(4), row(2), row()]
    assert [terms[2] for terms in score("default", rows, replace(ASK, regret=regret))] == expected


def test_default_cost_counts_expected_output_as_memory():
    ask = Ask(prompt_tokens=100, block_size=16, expected_output_tokens=60)  # ten blocks in all
    assert score("default", [row(active=95, total=100)], ask)[0][4] == 10 * 5 * 16


@pytest.mark.parametrize(
    ("rows", "weights", "expected"),
    [
        # raw prefill (32 + 96) / 16 = 8 blocks, 4 cached; decode 10 + 6 pinned
        ([row(4, queued=32, active=10)], {}, [(4, 16, 0)]),
        ([row(4, queued=32, active=10)], {"prefill_load_scale": 8.0}, [(32, 16, 0)]),
        ([row(4, queued=32, active=10)], {"overlap_score_credit": 0.0}, [(8, 16, 0)]),
        ([row(4, 2, 1)], {}, [(6 - 4 - 1.5 - 0.25, 6, 0)]),
        ([row(9)], {}, [(0, 6, 0)]),  # never below zero
        ([row(active=10, in_flight=4)], {}, [(6, 12, 0)]),  # shared blocks count once
        ([row(active=10, in_flight=4)], {"assume_kv_reuse": False}, [(6, 16, 0)]),
        ([row(4, active=10)], {"track_active_blocks": False}, [(2, 0, 0)]),
        (
            [row(4, active=10)],
            {"track_prefill_tokens": False},
            [(0, 12, 0)],
        ),  # decode only: the credit comes off decode
        ([row(requests=3)], {"decode_active_request_weight": 2.0}, [(6, 6, 6)]),
        # decay: the busy one is 96 tokens = one prompt ahead, so its credit halves
        ([row(4, queued=96), row(4)], {"overlap_score_credit_decay": 1.0}, [(12 - 2, 6, 0), (2, 6, 0)]),
        ([row(taint=1.0)], {}, [(6 * math.exp(-math.tanh(1)), 6 * math.exp(-math.tanh(1)), 0)]),
    ],
)
def test_dynamo_cost_by_hand(rows, weights, expected):
    ask = Ask(prompt_tokens=96, block_size=16)
    assert score("dynamo", rows, ask, **weights) == [pytest.approx(values) for values in expected]


@pytest.mark.parametrize("weight", [0.0, 1.0, 8.0])
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 50_000), st.integers(0, 1000)), min_size=1, max_size=5),
    st.integers(96, 111),
)
def test_the_older_form_of_the_dynamo_cost_is_a_setting_of_the_newer(weight, made, tokens):
    """`weight * (queued + new) / size + decode`, with `--router-kv-overlap-score-weight` as `load` translates it."""
    rows = [row(device, queued=queued, active=active) for device, queued, active in made]
    translated = {"prefill_load_scale": weight} | ({} if weight else {"overlap_score_credit": 0.0})
    for one, terms in zip(rows, score("dynamo", rows, Ask(tokens, 16), **translated), strict=True):
        new = tokens - 16 * one.overlap.device
        older = weight * (one.queued_prefill_tokens + new) / 16 + one.active_blocks + tokens // 16
        assert sum(terms) == pytest.approx(older)


@pytest.mark.parametrize(
    ("rows", "weights", "expected"),
    [
        ([row()], {}, [(2, 0, 0)]),
        ([row(3)], {}, [(1, 0, 0)]),  # half of the prompt
        ([row(1, 2, 2)], {}, [(2 - 2 * (1 + 1.5 + 0.5) / 6, 0, 0)]),
        ([row(3, fresh=0.5)], {}, [(1.5, 0, 0)]),
        ([row(active=25, total=100), row(active=200, total=100)], {}, [(2, 0.25, 0), (2, 1, 0)]),
        ([row(waiting=1), row(waiting=4), row()], {}, [(2, 0, 0.25), (2, 0, 1), (2, 0, 0)]),
    ],
)
def test_dynamo_example_cost_by_hand(rows, weights, expected):
    scored = score("dynamo-example", rows, Ask(prompt_tokens=96, block_size=16), **weights)
    assert scored == [pytest.approx(values) for values in expected]


@pytest.mark.parametrize(
    ("given_row", "weights", "expected"),
    [
        (row(), {}, (100, 0)),
        (row(4, queued=50, requests=3), {}, (86, 3 * 86)),
        (row(4, queued=50, requests=3), {"track_prefill_tokens": False}, (36, 3 * 36)),
        (row(in_flight=5, requests=1), {}, (20, 20)),
    ],
)
def test_lmetric_cost_by_hand(given_row, weights, expected):
    assert score("lmetric", [given_row], ASK, **weights) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("given_row", "own", "published"),
    [
        (row(), 96, 96),
        (row(2), 64, 64),
        (row(2, fresh=0.0), 64, 64),
        (row(6), 16, 0),  # an engine computes the last block again; the contract does not say so
        (row(1, 2, 2), 96 - 48, 96 - 48),  # 1 + 1.5 + 0.5 blocks
        (row(1, 1), 96 - 28, 96 - 28),
        (row(in_flight=5), 16, 96),
    ],
)
def test_what_is_booked_as_prefill_load(given_row, own, published):
    ask = Ask(96, 16)
    assert new_tokens(given_row, ask, Weights(), own=True) == own
    assert new_tokens(given_row, ask, Weights(), own=False) == published


@pytest.mark.parametrize(
    ("overlap", "in_flight", "prompt", "expected"),
    [
        (Overlap(), 0, 100, 0),
        (Overlap(3), 0, 100, 48),
        (Overlap(3), 5, 100, 80),
        (Overlap(2, 1, 1), 0, 100, 64),
        (Overlap(6), 0, 96, 80),  # a full hit computes its last block again
        (Overlap(6), 0, 97, 96),
        (Overlap(1), 0, 16, 0),
        (Overlap(), 0, 0, 0),
    ],
)
def test_cached_tokens_is_what_an_engine_reports(overlap, in_flight, prompt, expected):
    assert cached_tokens(overlap, in_flight, Ask(prompt, 16)) == expected


def test_the_terms_are_named_as_in_the_reference():
    assert {name: cost.terms for name, cost in COSTS.items()} == NAMES


def test_credit_weighs_the_tiers():
    assert credit_blocks(Overlap(4, 2, 1, 3), Weights()) == 4 + 1.5 + 1.0


ROWS = st.builds(
    row,
    device=st.integers(0, 40),
    host=st.integers(0, 10),
    disk=st.integers(0, 10),
    in_flight=st.integers(0, 40),
    fresh=st.floats(0, 1),
    queued=st.integers(0, 10_000),
    active=st.integers(0, 1000),
    requests=st.integers(0, 100),
    total=st.integers(0, 1000),
    taint=st.floats(-5, 5),
)


@given(st.sampled_from(sorted(COSTS)), ROWS, st.integers(1, 600), st.sampled_from([1, 16, 32]), st.integers(0, 20))
def test_terms_are_finite_and_not_negative_and_more_overlap_never_costs_more(name, base, tokens, size, more):
    ask = Ask(tokens, size)
    better = row(
        base.overlap.device + more,
        base.overlap.host,
        base.overlap.disk,
        in_flight=base.in_flight_blocks,
        fresh=base.freshness,
        queued=base.queued_prefill_tokens,
        active=base.active_blocks,
        requests=base.active_requests,
        total=base.total_blocks,
        taint=base.taint_preference,
    )
    low, high = (sum(score(name, [one], ask)[0]) for one in (better, base))
    assert low <= high + 1e-9
    terms = score(name, [base], ask)[0]
    assert len(terms) == len(COSTS[name].terms)
    assert all(math.isfinite(value) for value in terms)
    if base.overlap.total * size <= tokens and base.in_flight_blocks <= base.active_blocks + tokens // size:
        assert all(value >= 0 for value in terms)
