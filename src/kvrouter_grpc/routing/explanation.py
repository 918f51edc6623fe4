"""Why a decision was taken, in words and figures, from its recording."""

import math
from collections.abc import Sequence
from typing import cast

from kvrouter_grpc.core import Recording
from kvrouter_grpc.routing.roster import Occasion
from kvrouter_grpc.types import Candidate, Explanation, Overlap

_DECIDES = {
    "kv": "the lowest cost",
    "direct": "the lowest cost of what the pin leaves",
    "round-robin": "its turn",
    "random": "chance",
    "power-of-two": "the fewest requests in flight of two drawn by chance",
    "least-loaded": "the fewest requests in flight",
    "device-aware-weighted": "the fewest requests in flight of the kind that is due",
    "session": "its session's place",
    "prefix": "the longest cached prefix",
    "kv-aware": "the longest cached prefix",
}


def explain(endpoint: str, recording: Recording) -> Explanation:
    """All that can be told of a decision."""
    policy = recording.policy
    occasion = cast("Occasion", recording.occasion)
    seat = occasion.seats[recording.row(recording.picked)]
    return Explanation(
        endpoint,
        recording.request_id,
        recording.at,
        seat.target,
        seat.worker.spec.name,
        _reason(recording),
        policy.mode_name,
        policy.cost,
        policy.temperature,
        recording.prompt_tokens,
        recording.blocks,
        recording.block_size,
        recording.output_tokens,
        candidates(recording),
        occasion.prefilled,
    )


def candidates(recording: Recording) -> tuple[Candidate, ...]:
    """Every target, cheapest first, those that were not eligible last."""
    occasion = cast("Occasion", recording.occasion)
    _, scores, chances = recording.verdict()
    scored = []
    for seen, facts, load, score, chance in zip(
        recording.candidates(), recording.facts(), recording.loads(), scores, chances, strict=True
    ):
        seat = occasion.seats[seen.row]
        requests, waiting, queued, blocks, total = load
        candidate = Candidate(
            seat.target,
            seat.worker.spec.name,
            Overlap._make(seen.tiers),
            seen.cost,
            dict(zip(recording.policy.terms, seen.terms or (), strict=True)),
            "",
            seen.freshness,
            requests,
            waiting,
            queued,
            blocks,
            total,
            seen.in_flight,
            facts[-1],
            score if score < math.inf else None,
            chance,
        )
        scored.append(candidate)
    scored.sort(key=lambda candidate: (candidate.cost or 0.0, candidate.target))
    dropped = [Candidate(out.target, out.worker_name, Overlap(), None, {}, out.reason) for out in occasion.left_out]
    return (*scored, *dropped)


def _reason(recording: Recording) -> str:
    if recording.count == 1:
        return "the only one that may take it"
    _, scores, chances = recording.verdict()
    chance = chances[recording.picked]
    what = _decides(recording, scores)
    if recording.policy.temperature > 0:
        return f"{what}, drawn with a chance of {chance:.1%} at temperature {recording.policy.temperature:g}"
    if recording.policy.mode_name == "random" or chance == 1:
        return what
    return f"{what}, as {round(1 / chance) - 1} more; drawn by chance"


def _decides(recording: Recording, scores: Sequence[float]) -> str:
    mode = recording.policy.mode_name
    if mode in {"prefix", "kv-aware"} and scores[recording.picked] >= 0:  # a match has a score below 0
        other = "session" if mode == "kv-aware" and recording.session is not None else "least-loaded"
        return f"{_DECIDES[other]} (no match is long enough)"
    if mode == "session" and recording.session is None:
        return f"{_DECIDES['least-loaded']} (it has no session)"
    return _DECIDES[mode]
