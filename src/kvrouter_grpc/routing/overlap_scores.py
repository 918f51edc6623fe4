"""What every target holds of a prompt, whether or not it may be picked."""

from dataclasses import dataclass

from kvrouter_grpc.errors import NotReadyError
from kvrouter_grpc.routing.cost import Weights, credit_blocks
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.roster import Roster
from kvrouter_grpc.routing.stream import freshness
from kvrouter_grpc.types import Overlap, Prompt, Target


@dataclass(frozen=True, slots=True)
class TargetOverlap:
    """What one target holds of a prompt, and what that is worth to the decision."""

    target: Target
    worker_name: str
    overlap: Overlap
    credit_blocks: float
    freshness: float


@dataclass(frozen=True, slots=True)
class OverlapScores:
    """What every target holds of a prompt, sorted by target."""

    block_size: int
    num_blocks: int
    targets: tuple[TargetOverlap, ...]


def overlap_scores(index: KvIndex, roster: Roster, prompt: Prompt, weights: Weights) -> OverlapScores:
    """Look a prompt up, without deciding.

    Raises:
        NotReadyError: The block size is not known yet.
    """
    if not index.block_size:
        raise NotReadyError(
            "the block size is not known yet: no worker has told it; set --router-block-size or wait for a worker"
        )
    pairs = sorted((target, worker.spec.name) for worker in roster.workers for target in worker.targets)
    seqs = index.sequence(prompt)
    found = index.overlaps(seqs, [target for target, _ in pairs], shared=weights.shared_cache)
    scores = tuple(
        TargetOverlap(target, name, overlap, credit_blocks(overlap, weights), freshness(index.evidence(target)).value)
        for (target, name), overlap in zip(pairs, found, strict=True)
    )
    return OverlapScores(index.block_size, len(seqs), scores)
