"""What a vLLM server says of itself, read out of its probe answers; pure."""

import re
from typing import NamedTuple, TypeVar

import msgspec

from kvrouter_grpc.types import EngineReport
from kvrouter_grpc.upstream.chunk import MalformedAnswerError
from kvrouter_grpc.upstream.metrics_text import samples

_T = TypeVar("_T")

CACHE_CONFIG = "vllm:cache_config_info"
START_TIME = "process_start_time_seconds"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
_ZMQ_TCP = re.compile(r"tcp://(?P<host>\*|\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9_.-]+|::):(?P<port>\d{1,5})")
_ANY_ADDRESS = frozenset({"*", "0.0.0.0", "::", "[::]"})
_MAX_PORT = 65535
_COUNT_END = 2**53  # up to which a float counts exactly


class ServedModels(NamedTuple):
    """`GET /v1/models`."""

    models: tuple[str, ...]  # base model names
    loras: tuple[str, ...]
    max_model_len: int | None


class CacheConfig(NamedTuple):
    """What `GET /metrics` tells of the server; `engines` counts its data-parallel ranks."""

    block_size: int | None
    blocks_per_engine: int | None
    engines: int
    process_start_time: float | None
    prefix_caching: bool | None = None


class EventSources(NamedTuple):
    """`GET /kv_event_sources`: where the lowest rank publishes, as seen from here; how many ranks do."""

    enabled: bool
    events: str | None = None
    replay: str | None = None
    topic: str = ""
    ranks: int = 0


class EngineSettings(NamedTuple):
    """`GET /server_info`, which engines answer in development mode only; None where it does not tell."""

    block_size: int | None = None
    dp_size: int | None = None
    kv_events: bool | None = None


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _EventSource(msgspec.Struct):
    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str | None = None
    replay_endpoint: str | None = None
    topic: str | None = None


class _CacheSettings(msgspec.Struct):
    block_size: int | None = None


class _ParallelSettings(msgspec.Struct):
    data_parallel_size: int | None = None


class _Settings(msgspec.Struct):
    cache_config: _CacheSettings = msgspec.field(default_factory=_CacheSettings)
    parallel_config: _ParallelSettings = msgspec.field(default_factory=_ParallelSettings)
    kv_events_config: _EventSource | msgspec.UnsetType | None = msgspec.UNSET


class _ServerInfo(msgspec.Struct):
    vllm_config: _Settings


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Version(msgspec.Struct):
    version: str


_models = msgspec.json.Decoder(_Models)
_event_sources = msgspec.json.Decoder(dict[str, _EventSource])
_version = msgspec.json.Decoder(_Version)
_server_info = msgspec.json.Decoder(_ServerInfo)
_tokens = msgspec.json.Decoder(_Tokens)


def served_models(body: bytes) -> ServedModels:
    """Read the model list; an entry with a parent is a LoRA adapter.

    Raises:
        MalformedAnswerError: It is not a model list, or it is empty.
    """
    listed = _decoded(_models, body).data
    base = [model for model in listed if model.parent is None]
    if not base:
        raise MalformedAnswerError
    return ServedModels(
        tuple(model.id for model in base),
        tuple(model.id for model in listed if model.parent is not None),
        base[0].max_model_len,
    )


def cache_config(page: bytes) -> CacheConfig:
    """Read the KV cache's shape out of a metrics page; what it does not tell is None, `engines` at least 1.

    Engines of unequal size count as the smallest, so that the memory of none is overrated.
    """
    engines: set[str] = set()
    block_sizes: set[int] = set()
    blocks: set[int] = set()
    caching: set[str] = set()
    start_time = None
    for sample in samples(page, (CACHE_CONFIG, START_TIME)):
        if sample.name == START_TIME:
            start_time = sample.value
            continue
        engines.add(sample.labels.get("engine", ""))
        block_sizes |= _positive(sample.labels.get("block_size"))
        blocks |= _positive(sample.labels.get("num_gpu_blocks"))
        caching.add(sample.labels.get("enable_prefix_caching", ""))
    return CacheConfig(
        block_size=min(block_sizes, default=None),
        blocks_per_engine=min(blocks, default=None),
        engines=max(1, len(engines)),
        process_start_time=start_time,
        prefix_caching="False" not in caching if caching & {"True", "False"} else None,
    )


def engine_reports(page: bytes) -> list[EngineReport]:
    """Read what every rank says of its work out of a metrics page, in the order of the ranks.

    Ranks are told apart by the label `engine`. One that does not tell its requests is left out; what else it does not
    tell is None.
    """
    told: dict[str, dict[str, float]] = {}
    start_time = None
    for sample in samples(page, (START_TIME, RUNNING, WAITING, KV_USAGE, PREFIX_QUERIES, PREFIX_HITS)):
        if not 0 <= sample.value < _COUNT_END:
            continue
        if sample.name == START_TIME:
            start_time = sample.value
        else:
            told.setdefault(sample.labels.get("engine", ""), {})[sample.name] = sample.value
    ranks = sorted(
        (label for label in told if {RUNNING, WAITING} <= told[label].keys()), key=lambda label: (len(label), label)
    )
    return [_report(told[label], start_time) for label in ranks]


def _report(told: dict[str, float], start_time: float | None) -> EngineReport:
    queries, hits = told.get(PREFIX_QUERIES), told.get(PREFIX_HITS)
    return EngineReport(
        running=int(told[RUNNING]),
        waiting=int(told[WAITING]),
        kv_usage=min(told[KV_USAGE], 1.0) if KV_USAGE in told else None,
        prefix_queries=int(queries) if queries is not None else None,
        prefix_hits=int(hits) if hits is not None else None,
        process_start_time=start_time,
    )


def event_sources(body: bytes, host: str) -> EventSources:
    """Read where a server publishes its KV events.

    Args:
        body: Data-parallel rank to publisher settings, a JSON object.
        host: The server's host as the router reaches it: an engine that binds all addresses names none.

    Raises:
        MalformedAnswerError: It is not such an object.
    """
    sources = {rank: source for rank, source in _decoded(_event_sources, body).items() if rank.isdecimal()}
    if not sources:
        return EventSources(enabled=False)
    lowest = sources[min(sources, key=lambda rank: (len(rank), rank))]
    # Only the zmq publisher can be subscribed to.
    if not lowest.enable_kv_cache_events or lowest.publisher not in {None, "zmq"}:
        return EventSources(enabled=False, ranks=len(sources))
    return EventSources(
        enabled=True,
        events=_reachable(lowest.endpoint, host),
        replay=_reachable(lowest.replay_endpoint, host),
        topic=lowest.topic or "",
        ranks=len(sources),
    )


def server_version(body: bytes) -> str:
    """Read `GET /version`.

    Raises:
        MalformedAnswerError: It is not that.
    """
    return _decoded(_version, body).version


def engine_settings(body: bytes) -> EngineSettings:
    """Read `GET /server_info?config_format=json`.

    Raises:
        MalformedAnswerError: It is not that.
    """
    config = _decoded(_server_info, body).vllm_config
    events = config.kv_events_config
    return EngineSettings(
        block_size=config.cache_config.block_size,
        dp_size=config.parallel_config.data_parallel_size,
        kv_events=None if events is msgspec.UNSET else events is not None and events.enable_kv_cache_events,
    )


def tokens_of(body: bytes) -> list[int]:
    """Read the answer of `POST /tokenize`.

    Raises:
        MalformedAnswerError: It is not that.
    """
    return _decoded(_tokens, body).tokens


def _reachable(endpoint: str | None, host: str) -> str | None:
    """Turn the address that an engine bound into one to connect to; None for what is not TCP."""
    match = _ZMQ_TCP.fullmatch(endpoint or "")
    if match is None or not 0 < int(match["port"]) <= _MAX_PORT:
        return None
    if match["host"] not in _ANY_ADDRESS:
        return endpoint
    return f"tcp://[{host}]:{match['port']}" if ":" in host else f"tcp://{host}:{match['port']}"


def _positive(text: str | None) -> set[int]:
    """The number, as a set that is empty where an engine writes `None`."""
    digits = text is not None and text.isascii() and text.isdecimal() and len(text) < len(str(2**63))
    return {int(text or 0)} - {0} if digits else set()


def _decoded(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError) as error:  # ValueError: msgspec's own errors and UnicodeDecodeError
        raise MalformedAnswerError from error
