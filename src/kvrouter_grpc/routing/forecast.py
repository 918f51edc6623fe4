"""What targets should hold that do not tell: the blocks of the requests this router gave them.

A request's blocks count as cached from its booking on, for its engine computes them next, and for a time after its end.
Engines evict what was used least recently, and use ends when a request does. So predictions that have ended are kept in
the order of their ends, and whatever ends a prediction takes the oldest first: time, the bound on all blocks, the size
of the engine's cache, and the engine's own word that it found less than was predicted.

A prediction is a path in the index whose blocks are named by their own sequence hashes. The index counts such names,
so a block is held as long as any prediction, or an event of the engine, vouches for it, and a decision costs what it
always costs. Time is passed in; nothing here has a clock.
"""

import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import RadixTree
from kvrouter_grpc.types import EngineChunk

BLOCKS_AT_ONCE = 4096
"""Blocks let go in one call, about: some 0.2 ms, however many are due. The rest goes with the next calls."""

PATHS_PER_BLOCK = 8
"""Bound on the memory of the paths: blocks on all of them, counted as often as they occur, per block of the bound on
distinct blocks. A session that sends its whole history again with every turn occurs once per turn."""


@dataclass(slots=True, eq=False)
class Prediction:
    """The blocks of one booked request; `Forecast.begin` makes it, and only `Forecast` changes it."""

    forecast: "Forecast"
    cache: "PredictedCache"
    seqs: "array[int]"  # of its blocks; empty once it is void
    seed: int
    began: int  # the order of bookings and ends, here and below
    ended: int = 0  # 0 while the request is in flight
    expires_at: float = math.inf
    answer: "array[int]" = field(default_factory=lambda: array("I"))  # token ids generated so far
    cached_tokens: int | None = None  # of the prompt, as the engine says

    def end(self, now: float, *, computed: bool) -> None:
        """The request has ended; its blocks stay if the engine has `computed` them."""
        self.forecast.end(self, now, computed=computed)

    def heard(self, chunks: Iterable[EngineChunk]) -> None:
        """Note what an answer tells of the cache."""
        for chunk in chunks:
            if chunk.index == 0:
                self.answer.extend(chunk.token_ids)
            if chunk.usage is not None and chunk.usage.cached_tokens is not None:
                self.cached_tokens = chunk.usage.cached_tokens

    def lengthen(self, seqs: "array[int]") -> None:
        """The request in flight has more blocks, those of its answer: `seqs` are all of them."""
        self.forecast.lengthen(self, seqs)

    def correct(self, cached_blocks: int) -> None:
        """The engine found only this many of the prompt's blocks cached, fewer than were predicted."""
        self.forecast.correct(self, cached_blocks)


@dataclass(slots=True, eq=False)
class PredictedCache:
    """What is predicted of one target; only `Forecast` changes it."""

    tree: RadixTree
    slot: int  # the target's blocks
    capacity: int  # blocks the engine has room for; 0 when not known
    blocks: int = 0  # distinct ones that are predicted and that nothing else names
    in_flight: set[Prediction] = field(default_factory=set)
    ended: OrderedDict[int, Prediction] = field(default_factory=OrderedDict)  # by order, oldest first
    evicted_to: int = 0  # predictions that ended up to here are void, and about to be taken back

    @property
    def behind(self) -> bool:
        """Whether some of it should be gone already."""
        return bool(self.ended) and (self.blocks > self.capacity > 0 or next(iter(self.ended)) <= self.evicted_to)


class ForecastStats(NamedTuple):
    """Sizes of a forecast."""

    predictions: int  # of requests, in flight and ended
    blocks: int  # distinct ones, over all targets
    path_blocks: int  # counted once per prediction


class Forecast:
    """The predictions for all targets of an endpoint that end by the same rule.

    Args:
        ttl_s: Life of a prediction after the end of its request; infinity to let the bounds alone end it.
        max_blocks: Distinct blocks above which the oldest predictions are taken back.
        keep: Part of `max_blocks` that is left then.
    """

    def __init__(self, *, ttl_s: float, max_blocks: int, keep: float = 1.0) -> None:
        self._ttl_s = ttl_s
        self._most = (max_blocks, max_blocks * PATHS_PER_BLOCK)
        self._least = tuple(int(most * keep) for most in self._most)
        self._blocks = 0
        self._path_blocks = 0
        self._in_flight = 0
        self._order = 0  # of bookings and ends
        self._ended: OrderedDict[int, Prediction] = OrderedDict()
        self._caches_behind: dict[PredictedCache, None] = {}
        self._pruning = False

    def stats(self) -> ForecastStats:
        """Its sizes."""
        return ForecastStats(self._in_flight + len(self._ended), self._blocks, self._path_blocks)

    def begin(self, cache: PredictedCache, seqs: "array[int]", seed: int, now: float) -> Prediction:
        """A request was booked: its blocks are about to be cached.

        Args:
            cache: Of its target.
            seqs: Sequence hashes of the prompt's blocks.
            seed: The seed they were made with.
            now: Seconds.
        """
        self._order += 1
        prediction = Prediction(self, cache, seqs, seed, self._order)
        cache.in_flight.add(prediction)
        self._in_flight += 1
        self._store(prediction)
        self.expire(now)
        return prediction

    def expire(self, now: float) -> None:
        """Take back what is past its time or over the bounds; costs nothing when nothing is."""
        budget = BLOCKS_AT_ONCE
        while budget > 0 and (prediction := self._due(now)) is not None:
            budget -= len(prediction.seqs) + 1
            self._drop(prediction)

    def forget(self, cache: PredictedCache) -> None:
        """The engine has dropped all that its cache held: the predictions are void, in flight or not."""
        for order in cache.ended:
            del self._ended[order]
        self._in_flight -= len(cache.in_flight)
        for prediction in (*cache.in_flight, *cache.ended.values()):
            self._remove(prediction)
        self._count(cache, -cache.blocks, 0)  # of those that were gone from the index before
        cache.in_flight.clear()
        cache.ended.clear()
        self._caches_behind.pop(cache, None)

    # --- the life of a prediction -----------------------------------------------------------------------------------

    def end(self, prediction: Prediction, now: float, *, computed: bool) -> None:
        """See `Prediction.end`."""
        cache = prediction.cache
        if prediction not in cache.in_flight:
            return  # forgotten meanwhile
        cache.in_flight.remove(prediction)
        self._in_flight -= 1
        if not computed:
            self._remove(prediction)
            return
        self._order += 1
        prediction.ended = self._order
        prediction.expires_at = now + self._ttl_s
        self._ended[self._order] = cache.ended[self._order] = prediction
        self._look(cache)

    def lengthen(self, prediction: Prediction, seqs: "array[int]") -> None:
        """See `Prediction.lengthen`."""
        if prediction in prediction.cache.in_flight and len(seqs) > len(prediction.seqs):
            shorter = prediction.seqs
            prediction.seqs = seqs
            self._store(prediction)
            self._path_blocks -= len(shorter)
            prediction.cache.tree.remove_path(prediction.cache.slot, shorter)  # counted twice until here

    def correct(self, prediction: Prediction, cached_blocks: int) -> None:
        """See `Prediction.correct`.

        The engine had evicted the block after those, and with it everything on this target that was not used since.
        """
        cache, seqs = prediction.cache, prediction.seqs
        if cached_blocks >= len(seqs):
            return
        evicted = seqs[cached_blocks]
        for order, other in reversed(cache.ended.items()):
            before = order < prediction.began
            if before and len(other.seqs) > cached_blocks and other.seqs[cached_blocks] == evicted:
                cache.evicted_to = order
                self._look(cache)
                break

    # --- what is due ------------------------------------------------------------------------------------------------

    def _due(self, now: float) -> Prediction | None:
        """The next prediction that has to go."""
        while self._caches_behind:
            cache = next(iter(self._caches_behind))
            if cache.behind:
                return next(iter(cache.ended.values()))
            del self._caches_behind[cache]
        if not self._ended:
            return None
        bounds = self._least if self._pruning else self._most
        self._pruning = self._blocks > bounds[0] or self._path_blocks > bounds[1]
        oldest = next(iter(self._ended.values()))
        return oldest if self._pruning or oldest.expires_at <= now else None

    def _look(self, cache: PredictedCache) -> None:
        if cache.behind:
            self._caches_behind[cache] = None

    # --- the index --------------------------------------------------------------------------------------------------

    def _store(self, prediction: Prediction) -> None:
        cache = prediction.cache
        before = cache.tree.blocks(cache.slot)
        cache.tree.store_path(cache.slot, prediction.seqs, prediction.seed)
        self._count(cache, cache.tree.blocks(cache.slot) - before, len(prediction.seqs))
        self._look(cache)

    def _remove(self, prediction: Prediction) -> None:
        cache = prediction.cache
        before = cache.tree.blocks(cache.slot)
        cache.tree.remove_path(cache.slot, prediction.seqs)
        self._count(cache, cache.tree.blocks(cache.slot) - before, -len(prediction.seqs))
        prediction.seqs = _NOTHING

    def _drop(self, prediction: Prediction) -> None:
        del self._ended[prediction.ended], prediction.cache.ended[prediction.ended]
        self._remove(prediction)

    def _count(self, cache: PredictedCache, blocks: int, path_blocks: int) -> None:
        cache.blocks += blocks
        self._blocks += blocks
        self._path_blocks += path_blocks


_NOTHING = array("Q")


def forecasts(config: RouterConfig) -> dict[str, Forecast]:
    """What is predicted of caches: of those that do not tell, and of the others until they do."""
    if config.load_aware:
        return {}

    def forecast(ttl_s: float) -> Forecast:
        return Forecast(ttl_s=ttl_s, max_blocks=config.max_tree_size, keep=config.prune_target_ratio)

    made = {"silent": forecast(config.ttl_secs if config.approximate_cache_policy == "ttl" else math.inf)}
    if config.prediction_ahead_s is not None:
        made["ahead"] = forecast(config.prediction_ahead_s)
    return made
