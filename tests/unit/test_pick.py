"""Choosing among costs: the minimum, its ties, and the softmax of the contract."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter_grpc.routing.pick import lowest, softmax

COSTS = st.lists(st.floats(0, 1e9), min_size=1, max_size=20)


@given(COSTS, st.integers())
def test_lowest_is_lowest(costs, seed):
    assert costs[lowest(costs, None, random.Random(seed))] == min(costs)


def test_ties_go_to_the_fewest_requests_then_evenly():
    rng = random.Random(7)
    assert {lowest([1.0, 1.0, 2.0, 1.0], [5, 3, 0, 4], rng) for _ in range(50)} == {1}
    even = Counter(lowest([1.0, 1.0, 2.0, 1.0], [3, 3, 0, 3], rng) for _ in range(9000))
    assert set(even) == {0, 1, 3}
    assert all(abs(count - 3000) < 300 for count in even.values())  # six standard deviations


def test_softmax_follows_the_formula():
    rng = random.Random(11)
    costs, temperature, draws = [10.0, 20.0, 40.0], 0.5, 30_000
    weights = [math.exp(-(cost - 10) / (30 * temperature)) for cost in costs]
    drawn = Counter(softmax(costs, temperature, rng) for _ in range(draws))
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        assert drawn[index] / draws == pytest.approx(share, abs=6 * math.sqrt(share / draws))


@given(COSTS, st.floats(1e-6, 1e6), st.integers())
def test_softmax_never_fails(costs, temperature, seed):
    assert 0 <= softmax(costs, temperature, random.Random(seed)) < len(costs)


def test_softmax_of_equal_costs_is_uniform():
    drawn = Counter(softmax([3.0] * 4, 1.0, random.Random(seed)) for seed in range(4000))
    assert all(abs(count - 1000) < 200 for count in drawn.values())


def test_seed_repeats_the_choice():
    picks = [[lowest([1.0] * 8, None, rng) for _ in range(20)] for rng in (random.Random(3), random.Random(3))]
    assert picks[0] == picks[1]
