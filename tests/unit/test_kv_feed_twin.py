"""Random event streams: the compiled feed and its typed twin must do the same with every message."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reference.feeds import FeedPair
from reference.kv_stream import SIZE, Stream


@pytest.mark.parametrize("trouble", [0.0, 0.02])
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_long_streams(seed, hybrid, trouble):
    rng = random.Random(seed)
    stream = Stream(rng, trouble, names=rng.choice([12, 40, 200]), hybrid=hybrid)
    pair = FeedPair(targets=2, block_size=SIZE)
    for number in range(1000):
        pair.apply(rng.randrange(2), stream.message())
        if number % 10 == 0:
            pair.compare()
    pair.finish()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(rng=st.randoms(use_true_random=False), messages=st.integers(1, 12), hybrid=st.booleans())
def test_short_streams(rng, messages, hybrid):
    """The same, in a form that hypothesis can shrink to the few fields that matter."""
    stream = Stream(rng, trouble=0.05, names=6, hybrid=hybrid)
    pair = FeedPair(targets=1, block_size=SIZE)
    for _ in range(messages):
        pair.apply(0, stream.message())
        pair.compare()
    pair.finish()
