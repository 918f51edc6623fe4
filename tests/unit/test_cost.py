"""The reference costs against figures worked out by hand from their published formulas.

`test_decider.py` compares the compiled ones with these.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.routing.cost import COSTS as NAMES
from kvrouter_grpc.routing.cost import Weights, credit_blocks
from kvrouter_grpc.types import Overlap
from reference.cost import COSTS, Ask, Row, cached_tokens


def row(device=0, host=0, disk=0, *, in_flight=0, fresh=1.0, queued=0, active=0, requests=0, total=0, taint=0.0):
    return Row(Overlap(device, host, disk), in_flight, fresh, queued, active, requests, total, taint)


def score(name, rows, ask, **weights):
    return COSTS[name].score(rows, ask, Weights(**weights))


ASK = Ask(prompt_tokens=100, block_size=16)


@pytest.mark.parametrize(
    ("given_row", "weights", "expected"),
    [
        (row(), {}, (0, 300, 0)),  # nothing cached: (1 + 2) * 100
        (row(4), {}, (0, 3 * (100 - 64), 0)),
        (row(4, queued=50), {}, (50, 108, 0)),
        (row(4, in_flight=5), {}, (0, 3 * (100 - 80), 0)),  # a request in flight pins more than is cached yet
        (row(4, fresh=0.5), {}, (0, 3 * (100 - 32), 0)),  # half the trust, half the overlap
        (row(4, in_flight=4, fresh=0.0), {}, (0, 108, 0)),  # what this router sent is known without events
        (row(4), {"new_work_weight": 0.0}, (0, 36, 0)),
        (row(active=90, total=100), {}, (0, 300, 0)),  # 90 + 7 of 100 blocks
        (row(active=98, total=100), {}, (0, 300, 5 * 16)),  # 98 + 7: five blocks short
        (row(active=98, total=100, in_flight=5), {}, (0, 60, 0)),  # five of the seven are pinned already
        (row(active=98, total=100), {"track_active_blocks": False}, (0, 300, 0)),
        (row(queued=50), {"track_prefill_tokens": False}, (0, 300, 0)),
    ],
)
def test_default_cost_by_hand(given_row, weights, expected):
    assert score("default", [given_row], ASK, **weights) == [pytest.approx(expected)]


def test_default_cost_counts_expected_output_as_memory():
    ask = Ask(prompt_tokens=100, block_size=16, expected_output_tokens=60)  # ten blocks in all
    assert score("default", [row(active=95, total=100)], ask)[0][2] == 5 * 16


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
    assert all(value >= 0 for value in terms[: 1 if name == "dynamo" else None])
