"""The knobs of the costs of sending a request to a target. The compiled core (`core/cost.pxd`) works them out.

default         queued_prefill + new_prefill + replication + active_requests + memory_shortage, in tokens: the prompt
                tokens that wait there; what must be computed for this prompt; new-work weight times what of that
                another target would not have to compute, less the regret of its prefix (`core/regret.pxd`);
                request weight times the requests in flight; ten times by how much pinned blocks and this
                request exceed the cache.
dynamo          prefill + decode + active_requests, in blocks: the default selector of the Dynamo KV router.
dynamo-example  uncached + kv_usage + waiting, in shares of 1: the example of a router that comes with Dynamo.
lmetric         prefill + batch, in tokens: what must be computed there, times one plus the requests in flight.
"""

from dataclasses import dataclass

from kvrouter_grpc.core import COSTS
from kvrouter_grpc.types import Overlap

__all__ = ["COSTS", "Weights", "credit_blocks"]


@dataclass(frozen=True, slots=True)
class Weights:
    """The knobs of all costs; names and defaults as the `--router-*` flags."""

    new_work_weight: float = 3.0
    request_weight: float = 500.0
    overlap_score_credit: float = 1.0
    overlap_score_credit_decay: float = 0.0
    prefill_load_scale: float = 1.0
    decode_active_request_weight: float = 0.0
    host_cache_hit_weight: float = 0.75
    disk_cache_hit_weight: float = 0.25
    remote_cache_hit_weight: float = 0.25
    shared_cache: bool = False  # what one worker has in the remote tier, all have
    track_active_blocks: bool = True
    track_prefill_tokens: bool = True
    assume_kv_reuse: bool = True


def credit_blocks(overlap: Overlap, weights: Weights) -> float:
    """Blocks that the tiers are worth: device at its credit, lower tiers at their weights."""
    return (
        weights.overlap_score_credit * overlap.device
        + weights.host_cache_hit_weight * overlap.host
        + weights.disk_cache_hit_weight * overlap.disk
        + weights.remote_cache_hit_weight * overlap.remote
    )
