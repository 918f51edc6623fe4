"""Workers as ListWorkers tells of them."""

import pytest

from kvrouter_grpc.discovery.view import StreamView, WorkerView
from kvrouter_grpc.routing.prediction import HitPrediction
from kvrouter_grpc.routing.stream import StreamStatus
from kvrouter_grpc.server.worker_messages import worker_status
from kvrouter_grpc.types import StreamState, WorkerSpec, WorkerState


def told(status: StreamStatus, hits: HitPrediction | None = None):
    evidence = status.evidence(100.0, blocks=30, orphans=10, accuracy=1.0)
    stream = StreamView(0, status, evidence, hits or HitPrediction(), 30, 10, 0, 0)
    spec = WorkerSpec("a", "http://a:1", "x.y.z")
    return worker_status(WorkerView(1, spec, WorkerState.READY, "", None, (stream,), None)).streams[0]


def test_freshness_is_told_in_its_parts():
    stream = told(StreamStatus(state=StreamState.SYNCING, known=96, lost=6, behind=32, unsettled_at=90.0))
    parts = stream.freshness_parts
    assert (parts.coverage, parts.lag, parts.orphans) == (0.5, 0.375, 1 - 0.25 * 0.25)
    assert (parts.silence, parts.reading, parts.accuracy) == (1.0, 1.0, 1.0)
    assert stream.freshness == parts.coverage * parts.lag * parts.orphans
    assert (stream.lost, stream.behind, stream.resyncs) == (6, 32, 0)


def test_whether_an_engine_tells_its_hits_may_be_open():
    assert not told(StreamStatus()).hits.HasField("told")
    for tells in (False, True):
        hits = told(StreamStatus(), HitPrediction(tells=tells, over=3, error_tokens=1.5)).hits
        assert (hits.HasField("told"), hits.told, hits.over, hits.error_tokens) == (True, tells, 3, 1.5)


@pytest.mark.parametrize("field", ["last_seq", "missed", "lost", "behind"])
def test_no_number_of_a_publisher_is_too_large(field):
    assert getattr(told(StreamStatus(**{field: 1 << 80})), field) == 2**64 - 1
