"""How busy a router's workers are: frozen values, one per message of `proto/kvrouter/v1/admin.proto`."""

from dataclasses import dataclass

from ._gen import admin_pb2
from .fleet import HitPrediction
from .replies import TargetLoad


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What a rank says of itself, whoever sent the requests. The totals count from the start of its process."""

    running: int  # requests in its batch
    waiting: int  # requests that it has queued
    kv_usage: float | None  # part of its KV cache that requests in flight hold, 0 to 1
    prefix_queries: int | None  # prompt tokens looked up in its cache
    prefix_hits: int | None  # ... and found there

    @classmethod
    def from_proto(cls, message: admin_pb2.EngineReport) -> "EngineReport":
        """Convert."""
        return cls(
            running=message.running,
            waiting=message.waiting,
            kv_usage=message.kv_usage if message.HasField("kv_usage") else None,
            prefix_queries=message.prefix_queries if message.HasField("prefix_queries") else None,
            prefix_hits=message.prefix_hits if message.HasField("prefix_hits") else None,
        )


@dataclass(frozen=True, slots=True)
class ForeignLoad:
    """The part of a target's load that did not come through this router."""

    requests: int  # in flight
    waiting_requests: int  # of those, without a first token
    prefill_tokens: int  # that those are taken to compute
    blocks: int  # that they pin

    @classmethod
    def from_proto(cls, message: admin_pb2.ForeignLoad) -> "ForeignLoad":
        """Convert."""
        return cls(message.requests, message.waiting_requests, message.prefill_tokens, message.blocks)


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """Work booked on one target, and the cache it has for it."""

    worker_id: int
    dp_rank: int
    worker_name: str
    endpoint: str
    load: TargetLoad
    cached_blocks: int
    total_blocks: int | None  # None when not known
    engine: EngineReport | None  # None while it said nothing
    hits: HitPrediction
    foreign: ForeignLoad | None  # None without any
    degraded: tuple[str, ...]  # why what its worker caches is not known as well as it could be

    @classmethod
    def from_proto(cls, message: admin_pb2.WorkerLoad) -> "WorkerLoad":
        """Convert."""
        return cls(
            worker_id=message.worker_id,
            dp_rank=message.dp_rank,
            worker_name=message.worker_name,
            endpoint=message.endpoint,
            load=TargetLoad(message.active_requests, message.queued_prefill_tokens, message.active_blocks),
            cached_blocks=message.cached_blocks,
            total_blocks=message.total_blocks if message.HasField("total_blocks") else None,
            engine=EngineReport.from_proto(message.engine) if message.HasField("engine") else None,
            hits=HitPrediction.from_proto(message.hits),
            foreign=ForeignLoad.from_proto(message.foreign) if message.HasField("foreign") else None,
            degraded=tuple(message.degraded),
        )


@dataclass(frozen=True, slots=True)
class IndexStats:
    """What an endpoint's index costs."""

    endpoint: str
    block_size: int  # tokens per block; 0 while not known
    blocks: int  # (target, block) pairs held
    edges: int
    bytes: int

    @classmethod
    def from_proto(cls, message: admin_pb2.IndexStats) -> "IndexStats":
        """Convert."""
        return cls(message.endpoint, message.block_size, message.blocks, message.edges, message.bytes)


@dataclass(frozen=True, slots=True)
class PrefillCount:
    """How often a prompt of an endpoint with a prefill pool was computed in one way."""

    endpoint: str
    reason: str  # why its own worker computed the prompt; empty for those that the pool computed
    count: int

    @classmethod
    def from_proto(cls, message: admin_pb2.PrefillCount) -> "PrefillCount":
        """Convert."""
        return cls(message.endpoint, message.reason, message.count)


@dataclass(frozen=True, slots=True)
class QueueClass:
    """The requests of one strict priority that wait."""

    strict_priority: int
    waiting: int
    waiting_tokens: int  # uncached tokens of their prompts
    longest_wait_s: float

    @classmethod
    def from_proto(cls, message: admin_pb2.QueueClass) -> "QueueClass":
        """Convert."""
        longest_wait_s = message.longest_wait.ToTimedelta().total_seconds()
        return cls(message.strict_priority, message.waiting, message.waiting_tokens, longest_wait_s)


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """The requests of one endpoint that wait, and what became of those that did."""

    endpoint: str
    classes: tuple[QueueClass, ...]  # highest strict priority first; empty when nobody waits
    estimated_wait_s: float
    admitted: int
    refused: int
    timed_out: int
    gone: int

    @classmethod
    def from_proto(cls, message: admin_pb2.QueueStatus) -> "QueueStatus":
        """Convert."""
        return cls(
            endpoint=message.endpoint,
            classes=tuple(QueueClass.from_proto(each) for each in message.classes),
            estimated_wait_s=message.estimated_wait.ToTimedelta().total_seconds(),
            admitted=message.admitted,
            refused=message.refused,
            timed_out=message.timed_out,
            gone=message.gone,
        )


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Loads above which a target of an endpoint gets nothing new; None for no limit."""

    active_decode_blocks: float | None = None  # fraction of the blocks of its KV cache
    active_prefill_tokens: int | None = None
    active_prefill_tokens_frac: float | None = None  # of the tokens that its engine computes in one step

    def to_proto(self) -> admin_pb2.Thresholds:
        """Convert."""
        return admin_pb2.Thresholds(
            active_decode_blocks=self.active_decode_blocks,
            active_prefill_tokens=self.active_prefill_tokens,
            active_prefill_tokens_frac=self.active_prefill_tokens_frac,
        )

    @classmethod
    def from_proto(cls, message: admin_pb2.Thresholds) -> "Thresholds":
        """Convert."""
        return cls(**{field.name: value for field, value in message.ListFields()})


@dataclass(frozen=True, slots=True)
class Loads:
    """Loads, sorted by endpoint, name and rank, and one index per endpoint."""

    loads: tuple[WorkerLoad, ...]
    indexes: tuple[IndexStats, ...]
    prefills: tuple[PrefillCount, ...] = ()
    queues: tuple[QueueStatus, ...] = ()  # of endpoints whose requests wait while workers are busy

    @classmethod
    def from_proto(cls, message: admin_pb2.GetLoadsResponse) -> "Loads":
        """Convert."""
        return cls(
            tuple(WorkerLoad.from_proto(each) for each in message.loads),
            tuple(IndexStats.from_proto(each) for each in message.indexes),
            tuple(PrefillCount.from_proto(each) for each in message.prefills),
            tuple(QueueStatus.from_proto(each) for each in message.queues),
        )
