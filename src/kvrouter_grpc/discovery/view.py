"""Workers as they are at one moment, for those who tell of them."""

from dataclasses import dataclass

from kvrouter_grpc.advice import Advice, Effect
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.prediction import HitPrediction
from kvrouter_grpc.routing.stream import Evidence, StreamStatus
from kvrouter_grpc.routing.workers import Worker
from kvrouter_grpc.types import WorkerFacts, WorkerSpec, WorkerState


@dataclass(frozen=True, slots=True)
class StreamView:
    """One rank's event stream and what it led to."""

    dp_rank: int
    status: StreamStatus
    evidence: Evidence
    hits: HitPrediction
    blocks: int
    orphans: int
    orphans_adopted: int
    orphans_dropped: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as it is now."""

    worker_id: int
    spec: WorkerSpec
    state: WorkerState
    reason: str
    facts: WorkerFacts | None
    streams: tuple[StreamView, ...]
    registration_ttl_s: float | None
    faults: tuple[Advice, ...] = ()  # each once

    @property
    def degraded(self) -> list[Advice]:
        """Why what it caches is not known as well as it could be; it is picked all the same."""
        return [fault for fault in self.faults if fault.effect is not Effect.EXCLUDES]

    @property
    def doubts(self) -> list[str]:
        """What speaks against the pictures of its caches, a sentence each."""
        told = [str(fault) for fault in self.degraded]
        for stream in self.streams:
            told += [stream.status.told(stream.evidence), stream.hits.told]
        return [sentence for sentence in dict.fromkeys(told) if sentence]


def view_of(worker: Worker, index: KvIndex, registration_ttl_s: float | None) -> WorkerView:
    """A worker of the endpoint whose index this is."""
    streams = tuple(
        StreamView(
            target.dp_rank,
            status,
            index.evidence(target),
            hits,
            index.blocks(target),
            index.orphans(target),
            *index.orphan_fates(target),
        )
        for target in worker.targets
        if (status := index.stream_if_known(target)) is not None and (hits := index.hits(target)) is not None
    )
    return WorkerView(
        worker.worker_id,
        worker.spec,
        worker.state,
        worker.reason,
        worker.facts,
        streams,
        registration_ttl_s,
        tuple(dict.fromkeys(worker.faults.values())),
    )
