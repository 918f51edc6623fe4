"""Finds the decisions that somebody wants to have explained."""

from collections.abc import Collection, Iterator

from kvrouter_grpc._gen import admin_pb2
from kvrouter_grpc.core import Recording
from kvrouter_grpc.errors import UnknownDecisionError
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.server.boundary import check_request_id
from kvrouter_grpc.server.violations import Violations
from kvrouter_grpc.types import Explanation

MOST_DECISIONS = 100
MOST_CANDIDATES = 8192
"""In one reply: some 300 bytes each, and clients take 4 MiB unless they are told otherwise."""


def remembered(routers: Collection[Router], request: admin_pb2.ExplainRequest) -> list[Explanation]:
    """The decisions that a request asks for, newest first.

    Raises:
        InvalidRequestError: It asks for nothing, or for too much.
        UnknownDecisionError: None is remembered.
    """
    violations = Violations()
    most = MOST_DECISIONS
    if request.WhichOneof("decision") == "request_id":
        if not request.request_id:
            violations.add("request_id", "is empty; name the request")
        check_request_id(request.request_id, violations)
    elif not 1 <= request.recent <= MOST_DECISIONS:
        violations.add("recent", f"must be from 1 to {MOST_DECISIONS}; or give a request or a request_id")
    else:
        most = request.recent
    violations.raise_if_any()
    found = [(router, recording) for router in routers for recording in _newest(router, request.request_id, most)]
    if not found:
        raise _unknown(routers, request.request_id)
    found.sort(key=lambda pair: pair[1].at, reverse=True)
    explanations: list[Explanation] = []
    room = MOST_CANDIDATES
    for router, recording in found[:most]:
        explanation = router.explained(recording)
        room -= len(explanation.candidates)
        if room < 0 and explanations:
            break
        explanations.append(explanation)
    return explanations


def _newest(router: Router, request_id: str, most: int) -> Iterator[Recording]:
    """The last decisions of one endpoint; those of one request when it is named."""
    if router.log is None:
        return
    _, recordings = router.log.since(0, len(router.log))
    for recording in reversed(recordings):
        if most and (not request_id or recording.request_id == request_id):
            most -= 1
            yield recording


def _unknown(routers: Collection[Router], request_id: str) -> UnknownDecisionError:
    logs = [router.log for router in routers if router.log is not None]
    if not logs:
        return UnknownDecisionError("no decisions are remembered; start the router with --decision-log-size above 0")
    kept = sum(map(len, logs))
    if not request_id:
        return UnknownDecisionError("no decisions were taken yet")
    return UnknownDecisionError(
        f"request_id: none of the last {kept} decisions was about {request_id!r}; --decision-log-size keeps more",
        metadata={"request_id": request_id},
    )
