"""Typed asyncio client of kvrouter-grpc."""

from ._gen.common_pb2 import BlockMultimodalHashes
from ._gen.router_pb2 import (
    BestWorkerIdRequest,
    ChoiceList,
    OutputOptions,
    RouterConfigOverride,
    RoutingHints,
    SamplingOptions,
    StopConditions,
    StructuredOutput,
)
from .admin import KvRouterAdminClient
from .client import BatchItem, KvRouterClient, Prompt
from .errors import KvRouterError, Violation
from .fleet import (
    EngineReport,
    Fleet,
    IndexStats,
    Loads,
    StreamState,
    StreamStatus,
    WorkerLoad,
    WorkerRole,
    WorkerSpec,
    WorkerState,
    WorkerStatus,
)
from .replies import (
    Candidate,
    FinishReason,
    GenerateChunk,
    Overlap,
    OverlapScore,
    OverlapScores,
    PrefillData,
    RoutingData,
    TargetLoad,
    TokenLogprob,
    Usage,
    WorkerChoice,
)
from .reservation import Reservation
from .stream import GenerateStream

__all__ = [
    "BatchItem",
    "BestWorkerIdRequest",
    "BlockMultimodalHashes",
    "Candidate",
    "ChoiceList",
    "EngineReport",
    "FinishReason",
    "Fleet",
    "GenerateChunk",
    "GenerateStream",
    "IndexStats",
    "KvRouterAdminClient",
    "KvRouterClient",
    "KvRouterError",
    "Loads",
    "OutputOptions",
    "Overlap",
    "OverlapScore",
    "OverlapScores",
    "PrefillData",
    "Prompt",
    "Reservation",
    "RouterConfigOverride",
    "RoutingData",
    "RoutingHints",
    "SamplingOptions",
    "StopConditions",
    "StreamState",
    "StreamStatus",
    "StructuredOutput",
    "TargetLoad",
    "TokenLogprob",
    "Usage",
    "Violation",
    "WorkerChoice",
    "WorkerLoad",
    "WorkerRole",
    "WorkerSpec",
    "WorkerState",
    "WorkerStatus",
]
