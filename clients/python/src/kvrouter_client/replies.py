"""What a router answers on the request path: frozen values, one per message of `kvrouter/v1/router.proto`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ._gen import common_pb2, router_pb2

Json = dict[str, Any]


def _parsed(text: str) -> Json | None:
    """A JSON object of the contract's opaque fields; absent when empty."""
    if not text:
        return None
    value = json.loads(text)
    return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class Overlap:
    """Blocks of a prompt that one target holds, each tier continuing where the one before it ends."""

    device_blocks: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    remote_blocks: int = 0

    @property
    def total(self) -> int:
        """Leading blocks over all tiers."""
        return self.device_blocks + self.host_blocks + self.disk_blocks + self.remote_blocks

    @classmethod
    def from_proto(cls, message: common_pb2.Overlap) -> "Overlap":
        """Convert."""
        return cls(message.device_blocks, message.host_blocks, message.disk_blocks, message.remote_blocks)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One target as the decision saw it."""

    worker_id: int
    dp_rank: int
    worker_name: str
    overlap: Overlap
    cost: float | None  # the lowest wins; None when the target was not eligible
    terms: Mapping[str, float]  # name of a cost term to its contribution
    dropped: str  # why it was not eligible; empty when it was
    freshness: float  # trust in its overlap, 0 to 1
    active_requests: int  # that it had in flight, foreign ones too, here and below
    waiting_requests: int  # of those, without a first token
    queued_prefill_tokens: int
    active_blocks: int  # distinct blocks that its requests pinned
    total_blocks: int  # that its device cache has room for; 0 when not known
    in_flight_blocks: int  # leading blocks of the prompt that its requests in flight pinned
    preference: float  # sum of the request's preferences for its taints; it scales the terms
    score: float | None  # what the mode compares, the lowest wins; None when the mode passed it over
    chance: float  # how likely it was to be picked

    @classmethod
    def from_proto(cls, message: common_pb2.Candidate) -> "Candidate":
        """Convert."""
        return cls(
            worker_id=message.worker_id,
            dp_rank=message.dp_rank,
            worker_name=message.worker_name,
            overlap=Overlap.from_proto(message.overlap),
            cost=message.cost if message.HasField("cost") else None,
            terms={term.name: term.value for term in message.terms},
            dropped=message.dropped,
            freshness=message.freshness,
            active_requests=message.active_requests,
            waiting_requests=message.waiting_requests,
            queued_prefill_tokens=message.queued_prefill_tokens,
            active_blocks=message.active_blocks,
            total_blocks=message.total_blocks,
            in_flight_blocks=message.in_flight_blocks,
            preference=message.preference,
            score=message.score if message.HasField("score") else None,
            chance=message.chance,
        )


@dataclass(frozen=True, slots=True)
class TargetLoad:
    """Work that the router has booked on one target."""

    active_requests: int
    queued_prefill_tokens: int  # uncached prompt tokens sent that have no first token yet
    active_blocks: int

    @classmethod
    def from_proto(cls, message: router_pb2.TargetLoad) -> "TargetLoad":
        """Convert."""
        return cls(message.active_requests, message.queued_prefill_tokens, message.active_blocks)


@dataclass(frozen=True, slots=True)
class WorkerChoice:
    """Where a request should go, and why."""

    worker_id: int
    dp_rank: int  # to be sent as `X-data-parallel-rank` when the worker has several ranks
    worker_name: str
    url: str  # http://host:port
    overlap: Overlap
    overlap_blocks: int
    expected_cached_tokens: int  # what the engine should report as `cached_tokens`
    prompt_tokens: int
    block_size: int  # tokens per block; 0 while the router has not learned it
    cost: float
    freshness: float  # trust in the overlap, 0 to 1
    load: TargetLoad  # without this request
    candidates: tuple[Candidate, ...] = ()  # cheapest first; empty unless asked for
    reservation_ttl_s: float | None = None
    queued_s: float = 0.0  # that the reservation waited for a worker that is not busy

    @classmethod
    def from_proto(cls, message: router_pb2.BestWorkerIdResponse) -> "WorkerChoice":
        """Convert."""
        reserved = message.HasField("reservation_ttl")
        return cls(
            worker_id=message.worker_id,
            dp_rank=message.dp_rank,
            worker_name=message.worker_name,
            url=message.url,
            overlap=Overlap.from_proto(message.overlap),
            overlap_blocks=message.overlap_blocks,
            expected_cached_tokens=message.expected_cached_tokens,
            prompt_tokens=message.prompt_tokens,
            block_size=message.block_size,
            cost=message.cost,
            freshness=message.freshness,
            load=TargetLoad.from_proto(message.load),
            candidates=tuple(Candidate.from_proto(each) for each in message.candidates),
            reservation_ttl_s=message.reservation_ttl.ToTimedelta().total_seconds() if reserved else None,
            queued_s=message.queued.ToTimedelta().total_seconds(),
        )


@dataclass(frozen=True, slots=True)
class OverlapScore:
    """What one target holds of a prompt. `host_pinned_blocks` and `disk_blocks` include the nearer tiers."""

    worker_id: int
    dp_rank: int
    worker_name: str
    device_blocks: int
    host_pinned_blocks: int
    disk_blocks: int
    host_pinned_extension_blocks: int
    disk_extension_blocks: int
    shared_beyond_device_blocks: int
    router_credit_blocks: float
    freshness: float

    @classmethod
    def from_proto(cls, message: router_pb2.OverlapScore) -> "OverlapScore":
        """Convert."""
        return cls(
            worker_id=message.worker_id,
            dp_rank=message.dp_rank,
            worker_name=message.worker_name,
            device_blocks=message.device_blocks,
            host_pinned_blocks=message.host_pinned_blocks,
            disk_blocks=message.disk_blocks,
            host_pinned_extension_blocks=message.host_pinned_extension_blocks,
            disk_extension_blocks=message.disk_extension_blocks,
            shared_beyond_device_blocks=message.shared_beyond_device_blocks,
            router_credit_blocks=message.router_credit_blocks,
            freshness=message.freshness,
        )


@dataclass(frozen=True, slots=True)
class OverlapScores:
    """What every target holds of a prompt, sorted by (worker_id, dp_rank)."""

    block_size: int
    num_blocks: int  # full blocks of the prompt
    workers: tuple[OverlapScore, ...]

    @classmethod
    def from_proto(cls, message: router_pb2.GetOverlapScoresResponse) -> "OverlapScores":
        """Convert."""
        workers = tuple(OverlapScore.from_proto(each) for each in message.workers)
        return cls(message.block_size, message.num_blocks, workers)


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    CONTENT_FILTER = "content_filter"
    REPETITION = "repetition"


_FINISH_REASONS: Mapping[int, FinishReason] = {
    router_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    router_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    router_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    router_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
    router_pb2.FINISH_REASON_CONTENT_FILTER: FinishReason.CONTENT_FILTER,
    router_pb2.FINISH_REASON_REPETITION: FinishReason.REPETITION,
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted by the engine."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None  # None unless the engine runs with --enable-prompt-tokens-details

    @classmethod
    def from_proto(cls, message: router_pb2.Usage) -> "Usage":
        """Convert."""
        cached = message.cached_tokens if message.HasField("cached_tokens") else None
        return cls(message.prompt_tokens, message.completion_tokens, cached)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One alternative at one position."""

    token_id: int | None
    token: str
    logprob: float
    rank: int | None

    @classmethod
    def from_proto(cls, message: router_pb2.TokenLogprob) -> "TokenLogprob":
        """Convert."""
        return cls(
            token_id=message.token_id if message.HasField("token_id") else None,
            token=message.token,
            logprob=message.logprob,
            rank=message.rank if message.HasField("rank") else None,
        )


@dataclass(frozen=True, slots=True)
class PrefillData:
    """Who computed the prompt of a request to an endpoint with a prefill pool."""

    remote: bool  # a worker of the pool; else the worker of the stream itself
    reason: str  # why it was the worker of the stream; empty when it was not
    worker_id: int  # the prefill worker that was asked; 0 when none was
    dp_rank: int
    worker_name: str
    overlap: Overlap
    expected_cached_tokens: int

    @classmethod
    def from_proto(cls, message: router_pb2.PrefillData) -> "PrefillData":
        """Convert."""
        return cls(
            remote=message.remote,
            reason=message.reason,
            worker_id=message.worker_id,
            dp_rank=message.dp_rank,
            worker_name=message.worker_name,
            overlap=Overlap.from_proto(message.overlap),
            expected_cached_tokens=message.expected_cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class RoutingData:
    """The decision behind a stream."""

    worker_id: int
    dp_rank: int
    worker_name: str
    overlap: Overlap
    expected_cached_tokens: int
    prompt_tokens: int
    attempts: int
    freshness: float
    request_id: str
    prefill: PrefillData | None = None  # where the endpoint has a prefill pool
    queued_s: float = 0.0  # that the request waited for a worker that is not busy

    @classmethod
    def from_proto(cls, message: router_pb2.RoutingData) -> "RoutingData":
        """Convert."""
        return cls(
            worker_id=message.worker_id,
            dp_rank=message.dp_rank,
            worker_name=message.worker_name,
            overlap=Overlap.from_proto(message.overlap),
            expected_cached_tokens=message.expected_cached_tokens,
            prompt_tokens=message.prompt_tokens,
            attempts=message.attempts,
            freshness=message.freshness,
            request_id=message.request_id,
            prefill=PrefillData.from_proto(message.prefill) if message.HasField("prefill") else None,
            queued_s=message.queued.ToTimedelta().total_seconds(),
        )


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """One step of an answer: what is new since the step before, except `usage`, which is a running total."""

    token_ids: tuple[int, ...]
    text: str
    index: int  # which of the `n` answers
    finish_reason: FinishReason | None  # None while the answer goes on
    stop_reason: str | int | None  # the stop string or stop token id that ended it
    log_probs: tuple[TokenLogprob, ...]  # one per token, if asked for
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]  # alternatives per token, if asked for
    cum_log_prob: float | None
    usage: Usage | None
    routing: RoutingData | None  # in the first chunk
    kv_transfer_params: Json | None
    extra_args: Json | None

    @classmethod
    def from_proto(cls, message: router_pb2.GenerateResponse) -> "GenerateChunk":
        """Convert."""
        stop_reason: str | int | None = None
        match message.WhichOneof("stop_reason"):
            case "stop_string":
                stop_reason = message.stop_string
            case "stop_token_id":
                stop_reason = message.stop_token_id
            case None:
                pass
        return cls(
            token_ids=tuple(message.token_ids),
            text=message.text,
            index=message.index,
            finish_reason=_FINISH_REASONS.get(message.finish_reason),
            stop_reason=stop_reason,
            log_probs=tuple(TokenLogprob.from_proto(each) for each in message.log_probs),
            top_logprobs=tuple(
                tuple(TokenLogprob.from_proto(each) for each in position.candidates)
                for position in message.top_logprobs
            ),
            cum_log_prob=message.cum_log_prob if message.HasField("cum_log_prob") else None,
            usage=Usage.from_proto(message.usage) if message.HasField("usage") else None,
            routing=RoutingData.from_proto(message.routing) if message.HasField("routing") else None,
            kv_transfer_params=_parsed(message.kv_transfer_params_json),
            extra_args=_parsed(message.extra_args_json),
        )
