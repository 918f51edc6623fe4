"""Workers as the administration's messages tell of them."""

import time
from collections.abc import Iterable

from kvrouter_grpc._gen import admin_pb2, common_pb2
from kvrouter_grpc.config import WorkerEntry
from kvrouter_grpc.config.settings import WORKER_SETTINGS
from kvrouter_grpc.discovery.view import StreamView, WorkerView
from kvrouter_grpc.routing.loads import ForeignPart
from kvrouter_grpc.routing.prediction import HitPrediction
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.stream import freshness
from kvrouter_grpc.server import duration
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.types import EngineReport, Json, Role, StreamState, WorkerSpec, WorkerState

_ROLES = {
    Role.BOTH: common_pb2.WORKER_ROLE_BOTH,
    Role.PREFILL: common_pb2.WORKER_ROLE_PREFILL,
    Role.DECODE: common_pb2.WORKER_ROLE_DECODE,
}
_ROLE_NAMES = {number: role.value for role, number in _ROLES.items()}
_WORKER_STATES = {
    WorkerState.STARTING: common_pb2.WORKER_STATE_STARTING,
    WorkerState.READY: common_pb2.WORKER_STATE_READY,
    WorkerState.UNHEALTHY: common_pb2.WORKER_STATE_UNHEALTHY,
    WorkerState.MISCONFIGURED: common_pb2.WORKER_STATE_MISCONFIGURED,
    WorkerState.DRAINING: common_pb2.WORKER_STATE_DRAINING,
}
_STREAM_STATES = {
    StreamState.COLD: common_pb2.STREAM_STATE_COLD,
    StreamState.SYNCING: common_pb2.STREAM_STATE_SYNCING,
    StreamState.LIVE: common_pb2.STREAM_STATE_LIVE,
    StreamState.STALE: common_pb2.STREAM_STATE_STALE,
    StreamState.OFF: common_pb2.STREAM_STATE_OFF,
    StreamState.PREDICTED: common_pb2.STREAM_STATE_PREDICTED,
}
_MOST = 2**64 - 1
_ENTRY_NAMES = {"models": "model", "dp_size": "dp"}  # where the configuration names a setting differently


def read_spec(message: admin_pb2.WorkerSpec, endpoint: str, violations: Violations) -> WorkerSpec | None:
    """Read and check a worker by the rules of the configuration; None when it is wrong.

    Args:
        message: The worker.
        endpoint: Endpoint of a worker that names none.
        violations: Takes what is wrong.
    """
    values: dict[str, Json] = {}
    if not message.url:
        violations.add("spec.url", f"is empty; write {WORKER_SETTINGS['url'].syntax}")
    for descriptor, value in message.ListFields():
        name = _ENTRY_NAMES.get(descriptor.name, descriptor.name)
        setting = WORKER_SETTINGS[name]
        plain = list(value) if setting.repeated else value
        if name == "role":
            plain = _ROLE_NAMES.get(value, value)
        try:
            values[name] = setting.parse_yaml(plain)
        except ValueError as error:
            violations.add(f"spec.{descriptor.name}", str(error))
    return None if violations else WorkerEntry(**values).spec(endpoint)


def worker_status(view: WorkerView) -> admin_pb2.WorkerStatus:
    """A worker and its state."""
    facts = view.facts
    status = admin_pb2.WorkerStatus(
        worker_id=view.worker_id,
        spec=spec_message(view.spec),
        state=_WORKER_STATES[view.state],
        reason=view.reason,
        streams=[_stream_status(stream) for stream in view.streams],
        engine_version=(facts.version or "") if facts else "",
        loras=facts.loras if facts else (),
        max_model_len=facts.max_model_len if facts else None,
        degraded=map(str, view.degraded),
    )
    if view.registration_ttl_s is not None:
        duration.write(status.registration_ttl, view.registration_ttl_s)
    return status


def spec_message(spec: WorkerSpec) -> admin_pb2.WorkerSpec:
    """What is known of a worker's configuration."""
    return admin_pb2.WorkerSpec(
        name=spec.name,
        url=spec.url,
        endpoint=spec.endpoint,
        models=spec.models or (),
        events=spec.events or "",
        replay=spec.replay or "",
        topic=spec.topic,
        kv_events=spec.kv_events,
        dp_size=spec.dp_size,
        block_size=spec.block_size,
        role=_ROLES[spec.role],
        taints=sorted(spec.taints),
        total_kv_blocks=spec.total_kv_blocks,
        max_num_batched_tokens=spec.max_num_batched_tokens,
    )


def _counter(value: int) -> int:
    """What fits into the field: sequence numbers are the publisher's, and may be anything."""
    return min(value, _MOST)


def _stream_status(view: StreamView) -> admin_pb2.StreamStatus:
    stream, trust = view.status, freshness(view.evidence)
    status = admin_pb2.StreamStatus(
        dp_rank=view.dp_rank,
        state=_STREAM_STATES[stream.state],
        last_seq=_counter(stream.last_seq) if stream.last_seq >= 0 else None,
        batches=stream.batches,
        gaps=stream.gaps,
        missed=_counter(stream.missed),
        replays=stream.replays,
        restarts=stream.restarts,
        decode_failures=stream.decode_failures,
        skipped_events=stream.skipped,
        partial=stream.partial,
        blocks=view.blocks,
        orphans=view.orphans,
        orphans_adopted=view.orphans_adopted,
        orphans_dropped=view.orphans_dropped,
        freshness=trust.value,
        detail=stream.told(view.evidence),
        freshness_parts=admin_pb2.FreshnessParts(
            coverage=trust.coverage,
            lag=trust.lag,
            silence=trust.silence,
            orphans=trust.orphans,
            reading=trust.reading,
            accuracy=trust.accuracy,
        ),
        lost=_counter(stream.lost),
        behind=_counter(stream.behind),
        resyncs=stream.resyncs,
        hits=_hit_prediction(view.hits),
    )
    if stream.last_event_at:
        duration.write(status.last_event_age, time.monotonic() - stream.last_event_at)
    return status


def worker_loads(views: Iterable[WorkerView], router: Router) -> list[admin_pb2.WorkerLoad]:
    """The work booked on every rank of one endpoint's workers."""
    loads = []
    for view in views:
        worker = router.workers.get(view.worker_id)
        for target in worker.targets if worker is not None else ():
            load = router.load(target)
            loads.append(
                admin_pb2.WorkerLoad(
                    worker_id=target.worker_id,
                    dp_rank=target.dp_rank,
                    worker_name=view.spec.name,
                    endpoint=router.endpoint,
                    active_requests=load.active_requests,
                    queued_prefill_tokens=load.queued_prefill_tokens,
                    active_blocks=load.active_blocks,
                    cached_blocks=router.index.blocks(target),
                    total_blocks=view.spec.total_kv_blocks,
                    engine=_engine_report(router.feedback.engine_report(target)),
                    hits=_hit_prediction(router.index.hits(target)),
                    foreign=_foreign_load(router.loads.foreign(target)),
                    degraded=map(str, view.degraded),
                )
            )
    return loads


def _hit_prediction(hits: HitPrediction | None) -> admin_pb2.HitPrediction | None:
    if hits is None:
        return None
    return admin_pb2.HitPrediction(
        exact=hits.exact,
        over=hits.over,
        under=hits.under,
        foretold_tokens=hits.foretold_tokens,
        found_tokens=hits.found_tokens,
        error_tokens=hits.error_tokens,
        accuracy=hits.accuracy,
        told=hits.tells,
        drifting=hits.drifting,
        alarms=hits.alarms,
    )


def _foreign_load(foreign: ForeignPart) -> admin_pb2.ForeignLoad | None:
    if not any(foreign):
        return None
    return admin_pb2.ForeignLoad(
        requests=foreign.requests,
        waiting_requests=foreign.waiting_requests,
        prefill_tokens=foreign.prefill_tokens,
        blocks=foreign.blocks,
    )


def _engine_report(report: EngineReport | None) -> admin_pb2.EngineReport | None:
    if report is None:
        return None
    return admin_pb2.EngineReport(
        running=report.running,
        waiting=report.waiting,
        kv_usage=report.kv_usage,
        prefix_queries=report.prefix_queries,
        prefix_hits=report.prefix_hits,
    )


def index_stats(router: Router) -> admin_pb2.IndexStats:
    """What the index of an endpoint costs."""
    stats = router.index.stats()
    return admin_pb2.IndexStats(
        endpoint=router.endpoint,
        block_size=router.index.block_size,
        blocks=stats.get("blocks", 0),
        edges=stats.get("edges", 0),
        bytes=stats.get("bytes", 0),
    )
