"""Who a router's workers are, and how they are: frozen values, one per message of `proto/kvrouter/v1/admin.proto`."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ._gen import admin_pb2, common_pb2


class WorkerRole(StrEnum):
    """What a worker is for in disaggregated serving; `BOTH` is an ordinary worker."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(StrEnum):
    """Whether a worker may be picked."""

    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    MISCONFIGURED = "misconfigured"
    DRAINING = "draining"
    UNKNOWN = "unknown"  # a state that this version of the client does not know


class StreamState(StrEnum):
    """How true the router's picture of one rank's KV cache is."""

    COLD = "cold"
    SYNCING = "syncing"
    LIVE = "live"
    STALE = "stale"
    OFF = "off"
    PREDICTED = "predicted"  # it publishes no events; what it holds is predicted from the requests it was given
    UNKNOWN = "unknown"  # a state that this version of the client does not know


_ROLES: Mapping[WorkerRole, common_pb2.WorkerRole.ValueType] = {
    WorkerRole.BOTH: common_pb2.WORKER_ROLE_BOTH,
    WorkerRole.PREFILL: common_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: common_pb2.WORKER_ROLE_DECODE,
}
_ROLE_OF: Mapping[int, WorkerRole] = {value: role for role, value in _ROLES.items()}
_WORKER_STATES: Mapping[int, WorkerState] = {
    common_pb2.WORKER_STATE_STARTING: WorkerState.STARTING,
    common_pb2.WORKER_STATE_READY: WorkerState.READY,
    common_pb2.WORKER_STATE_UNHEALTHY: WorkerState.UNHEALTHY,
    common_pb2.WORKER_STATE_MISCONFIGURED: WorkerState.MISCONFIGURED,
    common_pb2.WORKER_STATE_DRAINING: WorkerState.DRAINING,
}
_STREAM_STATES: Mapping[int, StreamState] = {
    common_pb2.STREAM_STATE_COLD: StreamState.COLD,
    common_pb2.STREAM_STATE_SYNCING: StreamState.SYNCING,
    common_pb2.STREAM_STATE_LIVE: StreamState.LIVE,
    common_pb2.STREAM_STATE_STALE: StreamState.STALE,
    common_pb2.STREAM_STATE_OFF: StreamState.OFF,
    common_pb2.STREAM_STATE_PREDICTED: StreamState.PREDICTED,
}


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker. Fields left at their default are asked of the worker itself."""

    url: str  # http://host:port of its OpenAI surface
    name: str = ""  # host:port of the url when empty
    endpoint: str = ""  # namespace.component.endpoint; may be left out when the router serves one
    models: tuple[str, ...] = ()
    events: str = ""  # tcp://host:port of rank 0's PUB socket; rank r is at port + r
    replay: str = ""  # tcp://host:port of rank 0's replay socket; rank r is at port + r
    topic: str = ""
    kv_events: bool | None = None  # False when it publishes none
    dp_size: int | None = None
    block_size: int | None = None
    role: WorkerRole = WorkerRole.BOTH
    taints: tuple[str, ...] = ()
    total_kv_blocks: int | None = None  # per rank
    max_num_batched_tokens: int | None = None

    def to_proto(self) -> admin_pb2.WorkerSpec:
        """Convert."""
        return admin_pb2.WorkerSpec(
            name=self.name,
            url=self.url,
            endpoint=self.endpoint,
            models=self.models,
            events=self.events,
            replay=self.replay,
            topic=self.topic,
            kv_events=self.kv_events,
            dp_size=self.dp_size,
            block_size=self.block_size,
            role=_ROLES[self.role],
            taints=self.taints,
            total_kv_blocks=self.total_kv_blocks,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )

    @classmethod
    def from_proto(cls, message: admin_pb2.WorkerSpec) -> "WorkerSpec":
        """Convert."""
        return cls(
            url=message.url,
            name=message.name,
            endpoint=message.endpoint,
            models=tuple(message.models),
            events=message.events,
            replay=message.replay,
            topic=message.topic,
            kv_events=message.kv_events if message.HasField("kv_events") else None,
            dp_size=message.dp_size if message.HasField("dp_size") else None,
            block_size=message.block_size if message.HasField("block_size") else None,
            role=_ROLE_OF.get(message.role, WorkerRole.BOTH),
            taints=tuple(message.taints),
            total_kv_blocks=message.total_kv_blocks if message.HasField("total_kv_blocks") else None,
            max_num_batched_tokens=(
                message.max_num_batched_tokens if message.HasField("max_num_batched_tokens") else None
            ),
        )


@dataclass(frozen=True, slots=True)
class FreshnessParts:
    """What freshness is the product of, each 0 to 1."""

    coverage: float  # of the history
    lag: float  # behind the engine
    silence: float  # where events were due
    orphans: float  # blocks that cannot be placed
    reading: float  # events that could not be read
    accuracy: float  # of what was foretold

    @classmethod
    def from_proto(cls, message: admin_pb2.FreshnessParts) -> "FreshnessParts":
        """Convert."""
        return cls(message.coverage, message.lag, message.silence, message.orphans, message.reading, message.accuracy)


@dataclass(frozen=True, slots=True)
class HitPrediction:
    """Cache hits as foretold, against those that the engine reports with its answers."""

    exact: int  # requests
    over: int  # requests of which the engine found less than foretold
    under: int  # requests of which it found more
    foretold_tokens: int
    found_tokens: int
    error_tokens: float  # running mean
    accuracy: float  # 0 to 1, over the last requests
    told: bool | None  # whether the engine reports cached tokens; None while that is open
    drifting: bool  # the picture is wrong
    alarms: int

    @classmethod
    def from_proto(cls, message: admin_pb2.HitPrediction) -> "HitPrediction":
        """Convert."""
        return cls(
            exact=message.exact,
            over=message.over,
            under=message.under,
            foretold_tokens=message.foretold_tokens,
            found_tokens=message.found_tokens,
            error_tokens=message.error_tokens,
            accuracy=message.accuracy,
            told=message.told if message.HasField("told") else None,
            drifting=message.drifting,
            alarms=message.alarms,
        )


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """The state of one rank's event stream."""

    dp_rank: int
    state: StreamState
    last_seq: int | None
    batches: int
    gaps: int
    missed: int
    replays: int
    restarts: int
    decode_failures: int
    skipped_events: int
    partial: bool  # blocks cached before the first event seen are unknown
    last_event_age_s: float | None
    blocks: int
    orphans: int
    freshness: float  # 0 to 1
    detail: str  # what is wrong, when something is
    freshness_parts: FreshnessParts
    lost: int  # messages lost from the present picture
    behind: int  # messages published and not applied yet
    resyncs: int  # times the picture was doubted and fetched again because it had foretold wrongly
    hits: HitPrediction
    orphans_adopted: int  # blocks whose parent appeared after them
    orphans_dropped: int  # blocks given up because too many waited

    @classmethod
    def from_proto(cls, message: admin_pb2.StreamStatus) -> "StreamStatus":
        """Convert."""
        heard = message.HasField("last_event_age")
        return cls(
            dp_rank=message.dp_rank,
            state=_STREAM_STATES.get(message.state, StreamState.UNKNOWN),
            last_seq=message.last_seq if message.HasField("last_seq") else None,
            batches=message.batches,
            gaps=message.gaps,
            missed=message.missed,
            replays=message.replays,
            restarts=message.restarts,
            decode_failures=message.decode_failures,
            skipped_events=message.skipped_events,
            partial=message.partial,
            last_event_age_s=message.last_event_age.ToTimedelta().total_seconds() if heard else None,
            blocks=message.blocks,
            orphans=message.orphans,
            freshness=message.freshness,
            detail=message.detail,
            freshness_parts=FreshnessParts.from_proto(message.freshness_parts),
            lost=message.lost,
            behind=message.behind,
            resyncs=message.resyncs,
            hits=HitPrediction.from_proto(message.hits),
            orphans_adopted=message.orphans_adopted,
            orphans_dropped=message.orphans_dropped,
        )


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker and its state."""

    worker_id: int
    spec: WorkerSpec  # its configuration, completed by what it said itself
    state: WorkerState
    reason: str  # why it may not be picked, and what to change
    streams: tuple[StreamStatus, ...]  # one per rank
    registration_ttl_s: float | None  # None for configured workers
    engine_version: str
    loras: tuple[str, ...]
    max_model_len: int | None
    degraded: tuple[str, ...]  # why what it caches is not known as well as it could be

    @classmethod
    def from_proto(cls, message: admin_pb2.WorkerStatus) -> "WorkerStatus":
        """Convert."""
        leased = message.HasField("registration_ttl")
        return cls(
            worker_id=message.worker_id,
            spec=WorkerSpec.from_proto(message.spec),
            state=_WORKER_STATES.get(message.state, WorkerState.UNKNOWN),
            reason=message.reason,
            streams=tuple(StreamStatus.from_proto(each) for each in message.streams),
            registration_ttl_s=message.registration_ttl.ToTimedelta().total_seconds() if leased else None,
            engine_version=message.engine_version,
            loras=tuple(message.loras),
            max_model_len=message.max_model_len if message.HasField("max_model_len") else None,
            degraded=tuple(message.degraded),
        )


@dataclass(frozen=True, slots=True)
class Fleet:
    """Every worker, and whether the router takes requests."""

    workers: tuple[WorkerStatus, ...]  # sorted by endpoint and name
    ready: bool
    findings: tuple[str, ...]  # what keeps it from being ready or deserves attention

    @classmethod
    def from_proto(cls, message: admin_pb2.ListWorkersResponse) -> "Fleet":
        """Convert."""
        workers = tuple(WorkerStatus.from_proto(each) for each in message.workers)
        return cls(workers, message.ready, tuple(message.findings))
