"""Predicted caches against a list of requests, and what the index makes of them."""

from array import array
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import RadixTree, hash_sequence
from kvrouter_grpc.routing import forecast as module
from kvrouter_grpc.routing.forecast import Forecast, PredictedCache
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.stream import freshness
from kvrouter_grpc.types import EngineChunk, Overlap, Prompt, StreamState, Target, Usage
from reference import forecast as reference
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksStored, CacheCleared

A, B = Target(1, 0), Target(2, 0)
SIZE = 4


def path(words):
    """One block per word; equal beginnings are equal paths."""
    return hash_sequence(array("I", [word for word in words for _ in range(SIZE)]), SIZE)


class Pair:
    """The forecast and its twin."""

    def __init__(self, ttl_s, max_blocks, keep, capacities):
        self.tree = RadixTree(SIZE)
        self.forecast = Forecast(ttl_s=ttl_s, max_blocks=max_blocks, keep=keep)
        self.caches = {name: PredictedCache(self.tree, self.tree.add_slot(), c) for name, c in capacities.items()}
        self.twin = reference.Forecast(ttl_s, max_blocks, keep, capacities)
        self.requests = []

    def settle(self, now):
        before = None
        while before != (before := self.forecast.stats()):
            self.forecast.expire(now)
        self.twin.settle(now)

    def check(self):
        held = {name: self.twin.held(name) for name in self.caches}
        for name, cache in self.caches.items():
            assert cache.blocks == self.tree.blocks(cache.slot) == len(held[name])
            for block in held[name]:
                assert self.tree.holds(cache.slot, block)
        stats = self.forecast.stats()
        assert stats.blocks == self.twin.size
        assert stats.predictions == len(self.twin.requests)
        assert stats.path_blocks == sum(len(request.blocks) for request in self.twin.requests)
        self.tree._check()


WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.sampled_from("ab"), WORDS),
        st.tuples(st.just("end"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("lengthen"), st.integers(0, 9), WORDS),
        st.tuples(st.just("correct"), st.integers(0, 9), st.integers(0, 5)),
        st.tuples(st.just("forget"), st.sampled_from("ab"), st.none()),
        st.tuples(st.just("wait"), st.integers(0, 6), st.none()),
    ),
    max_size=40,
)


@pytest.mark.parametrize("at_once", [1, module.BLOCKS_AT_ONCE])
@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    ttl_s=st.sampled_from([5.0, inf]),
    max_blocks=st.sampled_from([4, 12, 1000]),
    keep=st.sampled_from([0.5, 1.0]),
    capacity=st.sampled_from([0, 5]),
)
def test_it_agrees_with_a_list_of_requests(at_once, steps, ttl_s, max_blocks, keep, capacity):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCKS_AT_ONCE", at_once)
        patch.setattr(module, "PATHS_PER_BLOCK", 1_000_000)  # the twin has no bound on memory
        pair = Pair(ttl_s, max_blocks, keep, {"a": capacity, "b": 0})
        now = 0.0
        for kind, which, how in steps:
            if kind == "begin":
                # The twin takes nothing back by itself, so time and bounds are seen to in the same order.
                cache = pair.caches[which]
                pair.requests.append(
                    (pair.forecast.begin(cache, path(how), 1337, now), pair.twin.begin(which, list(path(how))), how)
                )
            elif kind == "wait":
                now += which
            elif kind == "forget":
                pair.forecast.forget(pair.caches[which])
                pair.tree.clear(pair.caches[which].slot)
                pair.twin.forget(which)
            elif pair.requests:
                ours, theirs, words = pair.requests[which % len(pair.requests)]
                if kind == "end":
                    ours.end(now, computed=how)
                    pair.twin.end(theirs, now, how)
                elif kind == "lengthen":
                    longer = path(words + how)
                    if len(longer) > len(theirs.blocks):
                        ours.lengthen(longer)
                        pair.twin.lengthen(theirs, list(longer))
                else:
                    ours.correct(how)
                    pair.twin.correct(theirs, how)
            pair.settle(now)
            pair.check()
        for cache in pair.caches.values():
            pair.forecast.forget(cache)
            pair.tree.remove_slot(cache.slot)
        assert pair.forecast.stats() == (0, 0, 0)
        assert pair.tree.stats()["bytes"] == 0


def test_the_memory_of_paths_is_bounded_however_often_a_prefix_comes_back():
    tree = RadixTree(SIZE)
    forecast = Forecast(ttl_s=inf, max_blocks=10)
    cache = PredictedCache(tree, tree.add_slot(), 0)
    words = list(range(10))
    for _ in range(100):
        forecast.begin(cache, path(words), 1337, 0).end(0, computed=True)
    forecast.expire(0)
    assert forecast.stats().path_blocks <= 10 * module.PATHS_PER_BLOCK
    assert tree.blocks(cache.slot) == 10


def test_one_call_lets_go_of_a_bounded_number_of_blocks():
    tree = RadixTree(SIZE)
    forecast = Forecast(ttl_s=1, max_blocks=1 << 20)
    cache = PredictedCache(tree, tree.add_slot(), 0)
    for first in range(100):
        forecast.begin(cache, path([first, *range(99)]), 1337, 0).end(0, computed=True)
    forecast.expire(5)
    gone = 10_000 - tree.blocks(cache.slot)
    assert module.BLOCKS_AT_ONCE <= gone <= module.BLOCKS_AT_ONCE + 100


# --- in the index ---------------------------------------------------------------------------------------------------


def make(**forecasts):
    index = KvIndex(SIZE, lambda *_: None, **forecasts)
    index.add(A)
    index.add(B)
    return index


def prompt(*words, **kwargs):
    return Prompt(array("I", [word for word in words for _ in range(SIZE)]), **kwargs)


def overlap(index, target, asked):
    return index.overlaps(index.sequence(asked), [target])[0]


def test_a_silent_target_holds_what_it_was_given_until_time_is_up():
    index = make(silent=Forecast(ttl_s=10, max_blocks=1000))
    index.without_events(A, "says nothing")
    assert index.stream(A).state is StreamState.PREDICTED
    assert 0 < freshness(index.evidence(A)).value < 1
    asked = prompt(1, 2, 3, lora_name="adapter")
    prediction = index.predict(A, index.sequence(asked), asked, 0)
    assert overlap(index, A, asked) == Overlap(3)
    assert overlap(index, B, asked) == Overlap()
    assert overlap(index, A, prompt(1, 2, 3)) == Overlap()
    index.expire(100)
    assert overlap(index, A, asked) == Overlap(3), "it is in flight"
    prediction.end(100, computed=True)
    index.expire(109)
    assert overlap(index, A, asked) == Overlap(3)
    index.expire(111)
    assert overlap(index, A, asked) == Overlap()


def test_nothing_is_predicted_of_a_target_that_tells_nor_without_a_forecast():
    index = make(silent=Forecast(ttl_s=10, max_blocks=1000))
    assert index.predict(A, index.sequence(prompt(1)), prompt(1), 0) is None
    assert index.predict(Target(9, 9), index.sequence(prompt(1)), prompt(1), 0) is None
    off = make()
    off.without_events(A)
    assert off.stream(A).state is StreamState.OFF
    assert freshness(off.evidence(A)).value == 0
    assert off.predict(A, off.sequence(prompt(1)), prompt(1), 0) is None


def test_a_prediction_ahead_of_events_gives_way_to_them():
    index = make(ahead=Forecast(ttl_s=1, max_blocks=1000))
    asked = prompt(1, 2, 3)
    prediction = index.predict(A, index.sequence(asked), asked, 0)
    assert overlap(index, A, asked) == Overlap(3)
    index.apply_payload(A, encode_batch([BlocksStored(array("Q", [7, 8]), None, asked.tokens[: 2 * SIZE], SIZE)]))
    prediction.end(0, computed=True)
    index.expire(2)
    assert overlap(index, A, asked) == Overlap(2), "what the engine told stays"
    assert index.blocks(A) == 2


def test_what_clears_a_cache_voids_its_predictions():
    index = make(ahead=Forecast(ttl_s=1, max_blocks=1000), silent=Forecast(ttl_s=1, max_blocks=1000))
    index.without_events(B)
    asked = prompt(1, 2, 3)
    seqs = index.sequence(asked)
    first = [index.predict(A, seqs, asked, 0), index.predict(B, seqs, asked, 0)]
    index.apply_payload(A, encode_batch([CacheCleared()]))
    index.clear(B)
    assert (overlap(index, A, asked), overlap(index, B, asked)) == (Overlap(), Overlap())
    for target in (A, B):
        index.predict(target, seqs, asked, 0)
    for prediction in first:
        prediction.end(0, computed=False)
    assert (overlap(index, A, asked), overlap(index, B, asked)) == (Overlap(3), Overlap(3))
    index.remove(A)
    index.remove(B)
    assert index.stats()["bytes"] == 0


def test_what_an_answer_tells_is_noted():
    index = make(silent=Forecast(ttl_s=10, max_blocks=1000))
    index.without_events(A)
    asked = prompt(1)
    prediction = index.predict(A, index.sequence(asked), asked, 0)
    prediction.heard([EngineChunk(token_ids=[5, 6], usage=Usage(4, 2)), EngineChunk(index=1, token_ids=[9])])
    prediction.heard([EngineChunk(token_ids=[7], usage=Usage(4, 3, 0))])
    assert prediction.answer.tolist() == [5, 6, 7]
    assert prediction.cached_tokens == 0
