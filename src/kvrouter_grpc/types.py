"""The nouns that the rooms of the router exchange: plain, frozen values without behaviour or I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

Json = Any  # a JSON value: None, bool, int, float, str, list or dict


class Tokens(Protocol):
    """Token ids: a C-contiguous buffer of u32, such as `array("I")` or those that lie in a message."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def tolist(self) -> list[int]:
        """The ids as a list."""


class Role(Enum):
    """What a worker is for in disaggregated serving; `BOTH` is an ordinary, aggregated worker."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class Tier(Enum):
    """Where a KV block lies, nearest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


class Target(NamedTuple):
    """One schedulable engine: a worker and one of its data-parallel ranks."""

    worker_id: int  # u64
    dp_rank: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker as it was configured, found or registered. None means: ask the worker."""

    name: str
    url: str  # http://host:port of the engine's OpenAI surface, without a trailing slash
    endpoint: str  # namespace.component.endpoint
    models: tuple[str, ...] | None = None  # served model and LoRA adapter names
    events: str | None = None  # tcp://host:port of rank 0's PUB socket; rank r is at port + r
    replay: str | None = None  # tcp://host:port of rank 0's replay ROUTER; rank r is at port + r
    kv_events: bool = True  # False: this worker publishes none and none are expected
    topic: str = ""
    dp_size: int | None = None
    block_size: int | None = None
    role: Role = Role.BOTH
    taints: frozenset[str] = frozenset()
    total_kv_blocks: int | None = None  # per rank
    max_num_batched_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker says of itself over HTTP; None where its version does not tell."""

    models: tuple[str, ...]
    loras: tuple[str, ...] = ()
    max_model_len: int | None = None
    block_size: int | None = None
    total_kv_blocks: int | None = None
    dp_size: int = 1
    events: str | None = None
    replay: str | None = None
    topic: str = ""
    kv_events: bool | None = None  # None: the worker cannot tell
    process_start_time: float | None = None
    version: str | None = None
    prefix_caching: bool | None = None


class EngineReport(NamedTuple):
    """What one rank says of itself at this moment, over `/metrics`; the totals count from the start of its process."""

    running: int  # requests in its batch
    waiting: int  # requests that it has queued
    kv_usage: float | None = None  # part of its KV cache that requests in flight hold, 0..1
    prefix_queries: int | None = None  # prompt tokens looked up in its cache, in total
    prefix_hits: int | None = None  # ... and found there
    process_start_time: float | None = None  # seconds since the epoch; another one than before: it restarted


class WorkerState(Enum):
    """Whether a worker may be picked."""

    STARTING = "starting"  # not probed yet
    READY = "ready"
    UNHEALTHY = "unhealthy"  # its health check or its last request failed
    MISCONFIGURED = "misconfigured"  # e.g. another block size; `reason` says what to change
    DRAINING = "draining"  # finishes what it has, gets nothing new


class StreamState(Enum):
    """How true the router's picture of one rank's cache is."""

    COLD = "cold"  # nothing heard yet
    SYNCING = "syncing"  # replaying what was missed
    LIVE = "live"  # every event since the start of coverage was applied
    STALE = "stale"  # a gap that could not be repaired
    OFF = "off"  # this worker publishes no events
    PREDICTED = "predicted"  # neither, and the router's own decisions tell what it should hold


@dataclass(frozen=True, slots=True)
class RouterOverride:
    """Per-request change of the policy; None leaves the configured value."""

    overlap_score_credit: float | None = None
    prefill_load_scale: float | None = None
    temperature: float | None = None
    assume_kv_reuse: bool | None = None
    track_prefill_tokens: bool | None = None
    shared_cache_multiplier: float | None = None
    cost: str | None = None


@dataclass(frozen=True, slots=True)
class RoutingHints:
    """What the caller asks of the decision beside the prompt itself."""

    worker_id: int | None = None  # pin
    dp_rank: int | None = None  # rank of the pin
    allowed_worker_ids: frozenset[int] | None = None
    required_taints: frozenset[str] = frozenset()
    preferred_taints: Mapping[str, float] = field(default_factory=dict)
    expected_output_tokens: int | None = None
    strict_priority: int = 0
    priority_jump_s: float = 0.0
    override: RouterOverride | None = None
    prefill_worker_id: int | None = None  # pin of the prefill leg, where the endpoint has a prefill pool
    prefill_dp_rank: int | None = None
    session_id: str = ""  # of the conversation it belongs to; "" for none
    tenant: str = ""  # on whose account it waits
    may_wait: bool = True  # False: fail rather than wait until a target is less busy


class Prompt(NamedTuple):
    """What decides which cached blocks fit: the tokens, and all that is folded into their hashes.

    Attributes:
        tokens: Token ids.
        lora_name: Adapter name, "" for the base model.
        cache_salt: Tenant salt, "" for none.
        mm_hashes: Block index to the multimodal hashes (u64) of the objects in that block.
    """

    tokens: Tokens
    lora_name: str = ""
    cache_salt: str = ""
    mm_hashes: Mapping[int, Sequence[int]] = MappingProxyType({})


class RoutingRequest(NamedTuple):
    """What is asked of a router: the prompt, and all else that its decision goes by.

    Attributes:
        prompt: The prompt and what is folded into its hashes.
        hints: Pins, filters and overrides.
        model: Model or LoRA adapter that the worker must serve; "" for any.
        request_id: By which the decision is remembered and the booking named; "" where neither is wanted.
        prefilled: Another worker computes the prompt: only decoding counts, for the choice and for the load.
        exclude: Targets that failed this request already.
        explain: Fill `Decision.candidates`.
    """

    prompt: Prompt
    hints: RoutingHints = RoutingHints()
    model: str = ""
    request_id: str = ""
    prefilled: bool = False
    exclude: frozenset[Target] = frozenset()
    explain: bool = False


class Overlap(NamedTuple):
    """Blocks of a prompt that one target holds, each tier continuing where the one before ends."""

    device: int = 0
    host: int = 0
    disk: int = 0
    remote: int = 0

    @property
    def total(self) -> int:
        """Blocks over all tiers."""
        return self.device + self.host + self.disk + self.remote


@dataclass(frozen=True, slots=True)
class Candidate:
    """One target as the decision saw it."""

    target: Target
    worker_name: str
    overlap: Overlap
    cost: float | None  # None when the target was dropped
    terms: Mapping[str, float] = field(default_factory=dict)  # cost term name to value
    dropped: str = ""  # why the target was not eligible, "" when it was
    freshness: float = 0.0  # 0..1
    active_requests: int = 0  # foreign ones too, here and below
    waiting_requests: int = 0
    queued_prefill_tokens: int = 0
    active_blocks: int = 0
    total_blocks: int = 0  # 0 when not known
    in_flight_blocks: int = 0  # leading blocks of the prompt
    preference: float = 0.0  # for its taints
    score: float | None = None  # what the mode compares; None when it passed the target over
    chance: float = 0.0  # of being picked


@dataclass(frozen=True, slots=True)
class Explanation:
    """One decision and everything that it read."""

    endpoint: str
    request_id: str  # "" when it had none
    at: float  # seconds since the epoch
    target: Target
    worker_name: str
    reason: str  # what decided, in words
    mode: str
    cost: str
    temperature: float
    prompt_tokens: int
    prompt_blocks: int
    block_size: int
    output_tokens: int
    candidates: tuple[Candidate, ...]  # cheapest first, those that were not eligible last
    prefilled: bool  # another worker computed the prompt: it was for decoding only


@dataclass(slots=True)
class Decision:
    """Where a request goes and why.

    Not frozen like its neighbours: one is made per request, and freezing it takes longer than deciding.
    """

    target: Target
    worker_name: str
    url: str
    overlap: Overlap
    block_size: int  # tokens per block; 0 while the endpoint has not learned it
    prompt_tokens: int
    prompt_blocks: int  # full blocks in the prompt
    expected_cached_tokens: int  # what the engine's `cached_tokens` should say
    cost: float
    freshness: float  # 0..1
    candidates: tuple[Candidate, ...] = ()
    new_tokens: int = 0  # of the prompt that must be computed, as the cost counts them
    queued_s: float = 0.0  # that the request waited for it


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as an engine client sends it. `params` uses vLLM's field names."""

    request_id: str
    model: str
    tokens: Tokens
    params: Mapping[str, Json]
    cache_salt: str = ""
    priority: int | None = None
    kv_transfer_params: Json = None

    @property
    def streams(self) -> bool:
        """Whether the answer is streamed: a remote-decode prefill leg is not, nor is one with `prompt_logprobs`.

        vLLM returns `kv_transfer_params` and `prompt_logprobs` only with a non-streamed answer.
        """
        return not self._remote_decode and self.params.get("prompt_logprobs") is None

    @property
    def tells_hits(self) -> bool:
        """Whether `cached_tokens` of its answer says how much of the prompt the engine's own cache held.

        vLLM does not look prompts up whose log-probabilities are asked for, looks one up several times for several
        answers, and takes the blocks of a transfer from elsewhere.
        """
        params, fetches = self.params, self.kv_transfer_params is not None and not self._remote_decode
        return params.get("n", 1) == 1 and params.get("prompt_logprobs") is None and not fetches

    @property
    def prefilled(self) -> bool:
        """Whether its prompt was computed by another engine, from which its blocks are fetched."""
        params = self.kv_transfer_params
        return isinstance(params, dict) and bool(params.get("do_remote_prefill"))

    @property
    def _remote_decode(self) -> bool:
        """Whether its prompt is computed to be fetched by another engine."""
        params = self.kv_transfer_params
        return isinstance(params, dict) and bool(params.get("do_remote_decode"))


class Usage(NamedTuple):
    """Token counts of the engine; `cached_tokens` is None unless the engine reports it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One alternative at one position."""

    token_id: int | None
    token: str
    logprob: float
    rank: int | None = None


@dataclass(slots=True)  # not frozen: that triples what making one costs, and a stream makes one per token
class EngineChunk:
    """One step of an engine's answer: deltas, except `usage`, which is a running total."""

    index: int = 0
    token_ids: Sequence[int] = ()
    text: str = ""
    finish_reason: str | None = None  # stop | length | abort | error | repetition | content_filter
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    logprobs: Sequence[TokenLogprob] = ()  # one per token: the chosen one
    top_logprobs: Sequence[Sequence[TokenLogprob]] = ()  # one list per token
    usage: Usage | None = None
    kv_transfer_params: Json = None
    prompt_logprobs: Json = None  # one entry per prompt token, as the engine gave them; non-streamed answers only
