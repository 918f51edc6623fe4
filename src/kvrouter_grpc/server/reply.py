"""Writes the replies of the request path."""

from collections.abc import Iterable, Sequence

import msgspec

from kvrouter_grpc._gen import admin_pb2, common_pb2, router_pb2
from kvrouter_grpc.core import best_worker_head
from kvrouter_grpc.routing.loads import TargetLoad
from kvrouter_grpc.routing.overlap_scores import OverlapScores
from kvrouter_grpc.routing.roster import Seat
from kvrouter_grpc.server import duration
from kvrouter_grpc.types import Candidate, Decision, EngineChunk, Explanation, Overlap, TokenLogprob
from kvrouter_grpc.upstream.prefill_leg import Handover

FINISH_REASONS = {
    "stop": router_pb2.FINISH_REASON_STOP,
    "length": router_pb2.FINISH_REASON_LENGTH,
    "abort": router_pb2.FINISH_REASON_CANCELLED,
    "error": router_pb2.FINISH_REASON_ERROR,
    "content_filter": router_pb2.FINISH_REASON_CONTENT_FILTER,
    "repetition": router_pb2.FINISH_REASON_REPETITION,
}


# Messages are filled field by field: that takes less than half as long as keyword arguments and submessages.


def write_routing_data(
    message: router_pb2.RoutingData,
    decision: Decision,
    request_id: str,
    attempts: int,
    prefill: Handover | None = None,
) -> None:
    """The decision behind a stream."""
    message.worker_id, message.dp_rank = decision.target
    message.worker_name = decision.worker_name
    _write_overlap(message.overlap, decision.overlap)
    message.expected_cached_tokens = decision.expected_cached_tokens
    message.prompt_tokens = decision.prompt_tokens
    message.attempts = attempts
    message.freshness = decision.freshness
    message.request_id = request_id
    if decision.queued_s:
        duration.write(message.queued, decision.queued_s)
    if prefill is not None:
        _write_prefill(message.prefill, prefill)


def _write_prefill(message: router_pb2.PrefillData, prefill: Handover) -> None:
    """Who computed the prompt."""
    message.remote = prefill.remote
    message.reason = prefill.reason
    decision = prefill.decision
    if decision is not None:
        message.worker_id, message.dp_rank = decision.target
        message.worker_name = decision.worker_name
        _write_overlap(message.overlap, decision.overlap)
        message.expected_cached_tokens = decision.expected_cached_tokens


def write_best_worker(message: router_pb2.BestWorkerIdResponse, decision: Decision, load: TargetLoad) -> None:
    """The decision and the load of its target."""
    message.worker_id, message.dp_rank = decision.target
    message.worker_name = decision.worker_name
    message.url = decision.url
    message.overlap_blocks = _write_overlap(message.overlap, decision.overlap)
    message.expected_cached_tokens = decision.expected_cached_tokens
    message.prompt_tokens = decision.prompt_tokens
    message.block_size = decision.block_size
    message.cost = decision.cost
    message.freshness = decision.freshness
    if decision.queued_s:
        duration.write(message.queued, decision.queued_s)
    booked = message.load
    booked.active_requests = load.active_requests
    booked.queued_prefill_tokens = load.queued_prefill_tokens
    booked.active_blocks = load.active_blocks
    if decision.candidates:
        message.candidates.extend(map(candidate_message, decision.candidates))


def write_head(seat: Seat) -> bytes:
    """Write the part of a plain reply that names the target, and keep it where the next one finds it."""
    spec = seat.worker.spec
    seat.reply_head = best_worker_head(seat.target.worker_id, seat.target.dp_rank, spec.name, spec.url)
    return seat.reply_head


def _write_overlap(message: common_pb2.Overlap, overlap: Overlap) -> int:
    """Blocks by tier; gives their sum."""
    total = overlap.total
    message.device_blocks = overlap.device  # also when 0: it makes the message be there
    if total > overlap.device:
        message.host_blocks = overlap.host
        message.disk_blocks = overlap.disk
        message.remote_blocks = overlap.remote
    return total


def candidate_message(candidate: Candidate) -> common_pb2.Candidate:
    """One target as the decision saw it."""
    message = common_pb2.Candidate(
        freshness=candidate.freshness,
        active_requests=candidate.active_requests,
        waiting_requests=candidate.waiting_requests,
        queued_prefill_tokens=candidate.queued_prefill_tokens,
        active_blocks=candidate.active_blocks,
        total_blocks=candidate.total_blocks,
        in_flight_blocks=candidate.in_flight_blocks,
        preference=candidate.preference,
        score=candidate.score,
        chance=candidate.chance,
        worker_id=candidate.target.worker_id,
        dp_rank=candidate.target.dp_rank,
        worker_name=candidate.worker_name,
        cost=candidate.cost,
        terms=[common_pb2.CostTerm(name=name, value=value) for name, value in candidate.terms.items()],
        dropped=candidate.dropped,
    )
    _write_overlap(message.overlap, candidate.overlap)
    return message


def explanation_message(explanation: Explanation) -> admin_pb2.Explanation:
    """One decision and everything that it read."""
    message = admin_pb2.Explanation(
        endpoint=explanation.endpoint,
        request_id=explanation.request_id,
        worker_id=explanation.target.worker_id,
        dp_rank=explanation.target.dp_rank,
        worker_name=explanation.worker_name,
        reason=explanation.reason,
        mode=explanation.mode,
        cost=explanation.cost,
        temperature=explanation.temperature,
        prompt_tokens=explanation.prompt_tokens,
        prompt_blocks=explanation.prompt_blocks,
        block_size=explanation.block_size,
        expected_output_tokens=explanation.output_tokens,
        candidates=map(candidate_message, explanation.candidates),
        prefilled=explanation.prefilled,
    )
    message.decided_at.FromNanoseconds(round(explanation.at * 1e9))
    return message


def overlap_scores_reply(scores: OverlapScores) -> router_pb2.GetOverlapScoresResponse:
    """What every target holds; the contract counts the tiers both cumulatively and alone."""
    return router_pb2.GetOverlapScoresResponse(
        block_size=scores.block_size,
        num_blocks=scores.num_blocks,
        workers=[
            router_pb2.OverlapScore(
                worker_id=entry.target.worker_id,
                dp_rank=entry.target.dp_rank,
                worker_name=entry.worker_name,
                device_blocks=entry.overlap.device,
                host_pinned_blocks=entry.overlap.device + entry.overlap.host,
                disk_blocks=entry.overlap.device + entry.overlap.host + entry.overlap.disk,
                host_pinned_extension_blocks=entry.overlap.host,
                disk_extension_blocks=entry.overlap.disk,
                shared_beyond_device_blocks=entry.overlap.remote,
                router_credit_blocks=entry.credit_blocks,
                freshness=entry.freshness,
            )
            for entry in sorted(scores.targets, key=lambda entry: entry.target)
        ],
    )


class AnswerWriter:
    """Turns the chunks of one answer stream into messages.

    Chunks that arrived together become one message per answer: nothing is lost but the running totals in
    between, and a stream under load costs far fewer messages.
    """

    def __init__(self) -> None:
        self._cum_log_probs: dict[int, float] = {}  # by index of the answer

    def write(self, chunks: Iterable[EngineChunk]) -> list[router_pb2.GenerateResponse]:
        """Give the messages for chunks that arrived together."""
        messages: dict[int, router_pb2.GenerateResponse] = {}
        usage = None
        for chunk in chunks:
            usage = chunk.usage or usage
            if messages and _is_bare_usage(chunk):
                continue
            message = messages.get(chunk.index)
            if message is None:
                message = messages[chunk.index] = router_pb2.GenerateResponse()
                message.index = chunk.index
            self._append(message, chunk)
        if usage is not None:
            # The totals are over all answers, so they belong to the step as a whole: its last message.
            counted = next(reversed(messages.values())).usage
            counted.prompt_tokens = usage.prompt_tokens
            counted.completion_tokens = usage.completion_tokens
            if usage.cached_tokens is not None:
                counted.cached_tokens = usage.cached_tokens
        return list(messages.values())

    def _append(self, message: router_pb2.GenerateResponse, chunk: EngineChunk) -> None:
        if chunk.token_ids:
            message.token_ids.extend(chunk.token_ids)
        if chunk.text:
            message.text += chunk.text
        if chunk.logprobs:
            message.log_probs.extend(_log_probs(chunk.logprobs))
            total = self._cum_log_probs.get(chunk.index, 0.0) + sum(entry.logprob for entry in chunk.logprobs)
            message.cum_log_prob = self._cum_log_probs[chunk.index] = total
        for step in chunk.top_logprobs:
            message.top_logprobs.add(candidates=_log_probs(step))
        if chunk.finish_reason is not None:
            # A reason that is not in the table ended the answer too, and not as a caller could expect.
            message.finish_reason = FINISH_REASONS.get(chunk.finish_reason, router_pb2.FINISH_REASON_ERROR)
        if chunk.stop_reason is not None:
            if isinstance(chunk.stop_reason, str):
                message.stop_string = chunk.stop_reason
            else:
                message.stop_token_id = chunk.stop_reason
        if chunk.kv_transfer_params is not None:
            message.kv_transfer_params_json = msgspec.json.encode(chunk.kv_transfer_params).decode()
        if chunk.prompt_logprobs is not None:
            extra = {"prompt_logprobs": chunk.prompt_logprobs}
            message.extra_args_json = msgspec.json.encode(extra).decode()


def _is_bare_usage(chunk: EngineChunk) -> bool:
    content = (chunk.token_ids, chunk.text, chunk.finish_reason, chunk.logprobs, chunk.prompt_logprobs)
    return not any(content) and chunk.kv_transfer_params is None


def _log_probs(entries: Sequence[TokenLogprob]) -> list[router_pb2.TokenLogprob]:
    return [
        router_pb2.TokenLogprob(token_id=entry.token_id, token=entry.token, logprob=entry.logprob, rank=entry.rank)
        for entry in entries
    ]
