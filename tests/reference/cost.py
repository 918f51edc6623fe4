"""The slow, clear twin of the compiled costs (`core/cost.pxd`): pure functions over plain numbers.

Every formula returns the values of its terms in the order of `Cost.terms`; the cost is their sum, times what the
request's taint preferences make of it (`preferred`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.types import Overlap


@dataclass(slots=True)
class Row:
    """One eligible target: what it holds of the prompt, and what it is busy with."""

    overlap: Overlap
    in_flight_blocks: int  # leading blocks of the prompt that requests in flight pin there
    freshness: float  # trust in `overlap`, 0..1
    queued_prefill_tokens: int
    active_blocks: int
    active_requests: int
    total_blocks: int  # 0 when not known
    waiting_requests: int = 0
    taint_preference: float = 0.0  # sum of the request's preferences for its taints


@dataclass(frozen=True, slots=True)
class Ask:
    """The request as the cost sees it."""

    prompt_tokens: int
    block_size: int  # at least 1
    expected_output_tokens: int = 0
    regret: float = 0.0  # what requests have waited for the same prefix, in tokens; see `reference/regret.py`


MEMORY_WAIT = 10


class Cost(NamedTuple):
    """A cost function and the names of its terms."""

    terms: tuple[str, ...]
    score: Callable[[Sequence[Row], Ask, Weights], list[tuple[float, ...]]]
    own: bool  # this router's rules: see `is_own` in `core/cost.pxd`


def cached_tokens(overlap: Overlap, in_flight_blocks: int, ask: Ask) -> int:
    """Tokens of the prompt that the engine should find cached.

    An engine computes at least the last token, and caches by block: of a prompt that is held completely, the last
    block is computed again.
    """
    usable = max(ask.prompt_tokens - 1, 0) // ask.block_size
    return min(max(overlap.total, in_flight_blocks), usable) * ask.block_size


def weighted(overlap: Overlap, weights: Weights) -> float:
    """Blocks of the prompt that are held, those in lower tiers by what they are worth."""
    return (
        overlap.device
        + weights.host_cache_hit_weight * overlap.host
        + weights.disk_cache_hit_weight * overlap.disk
        + weights.remote_cache_hit_weight * overlap.remote
    )


def held_blocks(row: Row, ask: Ask, weights: Weights) -> float:
    """Blocks that need not be computed, by this router's rules."""
    usable = max(ask.prompt_tokens - 1, 0) // ask.block_size
    return min(max(row.freshness * weighted(row.overlap, weights), row.in_flight_blocks), usable)


def new_work(row: Row, ask: Ask, weights: Weights) -> float:
    """Tokens of the prompt that must be computed there, as far as the index is to be trusted, and what is cached counts."""
    worth = min(1.0, weights.overlap_score_credit)
    return ask.prompt_tokens - worth * held_blocks(row, ask, weights) * ask.block_size


def new_tokens(row: Row, ask: Ask, weights: Weights, *, own: bool) -> int:
    """What is booked as prefill load; trust in the overlap plays no part."""
    held = weighted(row.overlap, weights)
    if own:
        held = min(max(held, row.in_flight_blocks), max(ask.prompt_tokens - 1, 0) // ask.block_size)
    return max(0, ask.prompt_tokens - math.floor(held * ask.block_size + 0.5))


def preferred(terms: Sequence[float], row: Row) -> tuple[float, ...]:
    """The terms as the request's preferences scale them."""
    return tuple(term * math.exp(-math.tanh(row.taint_preference)) for term in terms)


def _prefill_first(rows: Sequence[Row], ask: Ask, weights: Weights) -> list[tuple[float, ...]]:
    """`queued + new + replication + requests + shortage`, in tokens.

    `queued` is the private wait before this prompt is computed, `new` what must be computed for it. `replication` is k
    times what of that another row would not have to compute, since it delays everyone after it and evicts other
    prefixes, less the regret of the prefix. `requests` is a share of the steps and the memory for each one there,
    `shortage` by how much the pinned blocks and this request exceed the cache, weighted since memory comes free when
    whole requests end. `docs/routing.md` has the figures.
    """
    scored: list[tuple[float, ...]] = []
    request_blocks = -(-(ask.prompt_tokens + ask.expected_output_tokens) // ask.block_size)
    least = min(new_work(row, ask, weights) for row in rows)
    for row in rows:
        new = new_work(row, ask, weights)
        copied = weights.new_work_weight * (new - least) - ask.regret
        replication = 0.0 if copied < 0 else copied
        requests = weights.request_weight * row.active_requests
        shortage = 0.0
        if row.total_blocks and weights.track_active_blocks:
            needed = row.active_blocks + request_blocks - row.in_flight_blocks
            shortage = float(MEMORY_WAIT * max(0, needed - row.total_blocks) * ask.block_size)
        queued = float(row.queued_prefill_tokens) if weights.track_prefill_tokens else 0.0
        scored.append((queued, new, replication, requests, shortage))
    return scored


def _dynamo(rows: Sequence[Row], ask: Ask, weights: Weights) -> list[tuple[float, ...]]:
    """`scale * max(0, raw_prefill - credit) + decode + w_r * requests`, in blocks.

    The formula of the Dynamo KV router's default selector: `raw_prefill` is the queue plus the whole prompt, `credit`
    what is cached by tier (decayed on targets whose queue is long), `decode` the blocks pinned with this request.
    """
    scored: list[tuple[float, ...]] = []
    size = ask.block_size
    request_blocks = ask.prompt_tokens // size
    shortest_queue = min((row.queued_prefill_tokens for row in rows), default=0)
    prompt_blocks = max(1, -(-ask.prompt_tokens // size))
    for row in rows:
        overlap = row.overlap
        excess = (row.queued_prefill_tokens - shortest_queue) / size
        decay = 1 / (1 + weights.overlap_score_credit_decay * excess / prompt_blocks)
        credit = row.freshness * (
            weights.overlap_score_credit * decay * overlap.device
            + weights.host_cache_hit_weight * overlap.host
            + weights.disk_cache_hit_weight * overlap.disk
            + weights.remote_cache_hit_weight * overlap.remote
        )
        raw_prefill = 0.0
        if weights.track_prefill_tokens:
            raw_prefill = (row.queued_prefill_tokens + ask.prompt_tokens) / size
        decode = 0.0
        if weights.track_active_blocks:
            shared = row.in_flight_blocks if weights.assume_kv_reuse else 0
            decode = float(row.active_blocks + request_blocks - shared)
        if weights.track_prefill_tokens:
            prefill = weights.prefill_load_scale * max(0.0, raw_prefill - credit)
        else:
            prefill, decode = 0.0, max(0.0, decode - credit)
        requests = weights.decode_active_request_weight * row.active_requests
        scored.append((prefill, decode, requests))
    return scored


def _dynamo_example(rows: Sequence[Row], ask: Ask, weights: Weights) -> list[tuple[float, ...]]:
    """`2 * overlap - usage - waiting`, the score of Dynamo's example of a router, turned into a cost: 2 minus it.

    `overlap` is the share of the prompt that is cached, `usage` that of the cache in use, `waiting` the number of
    requests without a first token over the most of any target.
    """
    scored: list[tuple[float, ...]] = []
    most_waiting = max((row.waiting_requests for row in rows), default=0)
    for row in rows:
        cached = row.freshness * weighted(row.overlap, weights) * ask.block_size
        overlap = cached / ask.prompt_tokens if ask.prompt_tokens else 0.0
        usage = min(1.0, row.active_blocks / row.total_blocks) if row.total_blocks else 0.0
        waiting = row.waiting_requests / most_waiting if most_waiting else 0.0
        scored.append((2 * (1 - overlap), usage, waiting))
    return scored


def _lmetric(rows: Sequence[Row], ask: Ask, weights: Weights) -> list[tuple[float, ...]]:
    """`prefill * (1 + requests)`, in tokens, as the sum of the prefill and of one more for each request in flight."""
    scored: list[tuple[float, ...]] = []
    for row in rows:
        prefill = new_work(row, ask, weights)
        if weights.track_prefill_tokens:
            prefill += row.queued_prefill_tokens
        scored.append((prefill, prefill * row.active_requests))
    return scored


COSTS = {
    "default": Cost(
        ("queued_prefill", "new_prefill", "replication", "active_requests", "memory_shortage"),
        _prefill_first,
        own=True,
    ),
    "dynamo": Cost(("prefill", "decode", "active_requests"), _dynamo, own=False),
    "dynamo-example": Cost(("uncached", "kv_usage", "waiting"), _dynamo_example, own=False),
    "lmetric": Cost(("prefill", "batch"), _lmetric, own=True),
}
"""Cost functions by the name that `--router-cost` and `router_config_override.cost` use."""
