"""The section about the decision: cost, load model and index."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from kvrouter_grpc.config.disagg import LocalPrefill, checked_local_prefill, read_local_prefill
from kvrouter_grpc.config.pending import PendingRouterConfig
from kvrouter_grpc.config.section import Contradiction, Endpoint, HostPort, Names, Syntax, setting


def _mode(value: Any) -> Any:
    return value.replace("_", "-") if isinstance(value, str) else value


def _checked_class_sizes(value: str) -> str:
    if not value.split() or not all(re.fullmatch(r"[0-9]{1,9}=[0-9]{1,9}", item) for item in value.split()):
        raise ValueError("strict priorities and numbers of requests, as in 0=500 2=100")
    return value


PREDICT_AHEAD_S = 2.0
"""Seconds that `predict_on_route` stands for: events arrive within a fraction of one."""

SHARED_CACHE_MULTIPLIER = 0.5
"""Worth of a block in shared storage unless `shared_cache_multiplier` says another."""

_OF_COST = {
    "default": ("new_work_weight", "request_weight"),
    "dynamo": ("prefill_load_scale", "kv_overlap_score_credit_decay", "decode_active_request_weight"),
}
"""Settings that only one cost has."""

METADATA_KEY = r"^[a-z0-9_.-]{1,64}$"
OWN = Names(dynamo=False)  # settings which Dynamo does not have
Mode = Annotated[
    Literal[
        "kv",
        "round-robin",
        "random",
        "power-of-two",
        "least-loaded",
        "device-aware-weighted",
        "session",
        "prefix",
        "kv-aware",
        "direct",
    ],
    BeforeValidator(_mode),
]


class RouterConfig(PendingRouterConfig):
    """How a worker is chosen. Flags, environment variables and defaults are those of the Dynamo router.

    Except: `mode` starts as kv, `block_size` is learned from the workers, and `cost` names the formula.
    """

    mode: Mode = setting(
        "kv",
        "How to choose: by cached prefix and load (kv), in turn (round-robin), by chance (random), the less busy of "
        "two (power-of-two), the least busy (least-loaded, device-aware-weighted), by conversation (session), by "
        "longest prefix (prefix, kv-aware), or as each request says (direct). docs/modes.md has the details.",
    )
    block_size: int | None = setting(
        None,
        "Tokens per KV block. None learns it from the workers; a number must equal the engines' "
        "--block-size, else the router does not become ready and says so.",
        ge=1,
        le=65_536,
    )
    cost: Literal["default", "dynamo", "dynamo-example", "lmetric"] = setting(
        "default",
        "Formula of mode kv. default counts tokens: queued prefill, new work (see new-work-weight), requests in "
        "flight and lack of KV memory. dynamo counts blocks, with the credits and weights below. dynamo-example adds "
        "up shares: of the prompt, of KV memory and of waiting requests. lmetric multiplies prefill tokens by "
        "requests.",
        names=OWN,
    )
    new_work_weight: float = setting(
        3.0,
        "Cost default: how much a token that must be prefilled, and need not be elsewhere, weighs above one already "
        "queued. Higher follows the cache, lower the load.",
        ge=0,
        le=1000,
        names=OWN,
    )
    request_weight: float = setting(
        500.0,
        "Cost default: prompt tokens that a request in flight counts for, since it shares a worker's steps.",
        ge=0,
        le=1_000_000,
        names=OWN,
    )
    temperature: float = setting(
        0.0,
        "0 takes the cheapest worker. Above, a softmax over the costs, or what else the mode goes by, spreads the "
        "choice.",
        ge=0,
        le=1000,
    )
    seed: int | None = setting(
        None, "Seed of every random choice, for a repeatable run; none is random.", ge=0, lt=2**63, names=OWN
    )
    session_affinity_ttl_secs: float | None = setting(
        None,
        "Keep a session on its worker, in every mode, until it was idle for this many seconds; none keeps none. "
        "A worker that fails or leaves loses its sessions.",
        gt=0,
        le=604_800,
    )
    session_metadata: str = setting(
        "x-session-id",
        "Metadata key of the calls that names the session of requests whose routing.session_id is empty.",
        pattern=METADATA_KEY,
        names=OWN,
    )
    session_load_bound: float = setting(
        1.25,
        "Mode session: a worker with more than this many times the mean number of requests passes new ones on to the "
        "session's next worker.",
        ge=1,
        le=1_000_000,
        names=OWN,
    )
    prefix_threshold: int = setting(
        0,
        "Mode prefix: tokens that the longest match must have; else the least busy worker is taken.",
        ge=0,
        le=1 << 30,
        names=OWN,
    )
    kv_aware_threshold: int = setting(
        2000,
        "Mode kv-aware: tokens of the prompt that the longest match may lack; else it goes by session.",
        ge=0,
        le=1 << 30,
        names=OWN,
    )
    accelerator_to_cpu_ratio: float = setting(
        8.0,
        "Mode device-aware-weighted: how many workers with the taint 'cpu' one worker without it is worth.",
        ge=1,
        le=1_000_000,
        names=Names(env=("DYN_ENCODER_CUDA_TO_CPU_RATIO",), dynamo=False),
    )
    kv_events: bool = setting(
        True,
        "Follow the workers' KV events. Off, what they cache is predicted from this router's own decisions; so it is "
        "for each worker that publishes none. See ttl-secs.",
        names=Names(env=("DYN_ROUTER_USE_KV_EVENTS",)),
    )
    load_aware: bool = setting(
        False,
        "Preset: decide by load alone, and predict nothing. Sets kv-overlap-score-credit=0, kv-events=false, "
        "assume-kv-reuse=false, track-active-blocks=true and track-prefill-tokens=true.",
        names=Names(flag="--load-aware", env=("DYN_ROUTER_LOAD_AWARE",)),
    )
    ttl_secs: float = setting(
        120.0,
        "Predicted blocks, where no events tell: how many seconds after the end of the last request that used it a "
        "block counts as cached.",
        gt=0,
        le=86_400,
    )
    approximate_cache_policy: Literal["ttl", "lru"] = setting(
        "ttl",
        "Predicted blocks, where no events tell: ttl forgets a block after ttl-secs, lru only when there are too many "
        "of them or when the engine turns out to have evicted it.",
    )
    predicted_ttl_secs: float | None = setting(
        None,
        "Predicted blocks, ahead of events: a request's blocks count as cached from its decision until this many "
        "seconds after its end, whether or not their events have arrived; none waits for the events.",
        gt=0,
        le=3600,
    )
    predict_on_route: bool = setting(False, f"Earlier name of predicted-ttl-secs: on stands for {PREDICT_AHEAD_S:g}.")
    max_tree_size: int = setting(
        1 << 20,
        "Predicted blocks of an endpoint above which the least recently used are forgotten. A worker's own are also "
        "bounded by its number of KV blocks, where that is known.",
        ge=1,
        le=1 << 28,
    )
    prune_target_ratio: float = setting(0.8, "Part of max-tree-size that is left then.", gt=0, le=1)
    kv_overlap_score_credit: float = setting(
        1.0,
        "Cost dynamo: blocks taken off the prefill term per block cached on the device. Costs default and lmetric: the "
        "part of a cached block, up to 1, that need not be computed; 0 decides by load alone.",
        ge=0,
        le=1000,
    )
    kv_overlap_score_credit_decay: float = setting(
        0.0,
        "Cost dynamo: how fast that credit falls while a worker has more prefill load than the least "
        "loaded one: 0 never, 1 halves it per request of this size.",
        ge=0,
        le=1000,
    )
    prefill_load_scale: float = setting(
        1.0, "Cost dynamo: weight of the prefill term. Higher favours the first token.", ge=0, le=1000
    )
    decode_active_request_weight: float = setting(
        0.0, "Cost dynamo: blocks added per request that is active on the worker.", ge=0, le=1_000_000
    )
    host_cache_hit_weight: float = setting(
        0.75, "Worth of a block cached in host memory, against 1 for one on the device.", ge=0, le=1
    )
    disk_cache_hit_weight: float = setting(
        0.25, "Worth of a block cached on disk or farther, against 1 for one on the device.", ge=0, le=1
    )
    shared_cache_type: Literal["none", "events", "hicache"] = setting(
        "none",
        "Whether the workers share the remote storage of their KV cache. With events, a block that one worker's KV "
        "events place there counts for all workers of its model; hicache means the same. With none it counts for that "
        "worker alone.",
        names=Names(flag="--shared-cache-type", env=("DYN_SHARED_CACHE_TYPE",)),
    )
    shared_cache_multiplier: float | None = setting(
        None,
        f"Worth of a block in shared remote storage, against 1 for one on the device; none stands for "
        f"{SHARED_CACHE_MULTIPLIER:g}. Only with shared-cache-type.",
        ge=0,
        le=1,
        names=Names(flag="--shared-cache-multiplier", env=("DYN_SHARED_CACHE_MULTIPLIER",)),
    )
    track_active_blocks: bool = setting(
        True,
        "Count the blocks of running requests as load. Off suits prefill-only workers.",
    )
    track_output_blocks: bool = setting(
        False,
        "Count the blocks that running requests generate as load, too. A request that tells its "
        "expected_output_tokens counts less and less towards its end.",
    )
    track_prefill_tokens: bool = setting(
        True,
        "Count prompt tokens that wait for their first token as load. Off suits decode-only workers.",
    )
    assume_kv_reuse: bool = setting(
        True,
        "Count a prefix that several running requests share once. Off where engines do not share blocks.",
    )
    prefill_endpoint: Endpoint | None = setting(
        None,
        "Disaggregated serving: the endpoint, served by this router too, whose workers compute the prompts of Generate "
        "requests to the other endpoints. They need a KV connector on both sides (docs/disaggregated.md). Any failure "
        "leaves the prompt to the worker that generates.",
        names=OWN,
    )
    conditional_disagg: bool = setting(
        False,
        "With prefill-endpoint: leave a prompt to the worker that generates where another one would save little, by "
        "what that worker has cached; see conditional-disagg-config.",
    )
    conditional_disagg_config: Annotated[str, AfterValidator(checked_local_prefill), Syntax("a JSON object")] | None = (
        setting(
            None,
            "The limits of conditional-disagg: a prompt stays where fewer than eff_isl_threshold (2048) of its tokens "
            "are uncached, or where these are less than eff_isl_ratio_threshold (0.3) of it; with Dynamo's policy "
            "isl_bounding, where both hold (0.7).",
        )
    )
    request_expiry_s: float = setting(
        300.0,
        "A booked request that nobody frees is forgotten after this many seconds.",
        gt=0,
        le=86_400,
        names=Names(env=("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS",), dynamo=False),
    )
    queue_threshold: float | None = setting(
        None,
        "Let requests wait in a queue of the router while every worker that could take them has more prefill tokens "
        "than this fraction of its batch budget (max-num-batched-tokens); none never does. docs/queue.md.",
        ge=0,
        le=1_000_000,
    )
    queue_policy: Literal["fcfs", "wspt", "lcfs"] = setting(
        "fcfs",
        "Order of the requests of one tenant and strict priority that wait: by arrival (fcfs), the shortest uncached "
        "prompt first (wspt) or the newest first (lcfs).",
    )
    queue_size: int = setting(
        1024,
        "Most requests of an endpoint that wait. Of more, the tenant with the most loses its last one.",
        ge=0,
        le=1_000_000,
        names=OWN,
    )
    queue_class_sizes: (
        Annotated[str, AfterValidator(_checked_class_sizes), Syntax("priority=requests, several separated by spaces")]
        | None
    ) = setting(
        None,
        "Most requests of one strict priority that wait, for priorities that have a bound of their own.",
        names=OWN,
    )
    queue_tenant_metadata: str | None = setting(
        None,
        "Metadata key of the calls that names the tenant, where a gateway in front sets it by who the caller is: "
        "routing.tenant is then not read. None believes routing.tenant.",
        pattern=METADATA_KEY,
        names=OWN,
    )
    queue_timeout_s: float = setting(
        60.0,
        "Longest that a request waits; then it ends with RESOURCE_EXHAUSTED.",
        gt=0,
        le=86_400,
        names=OWN,
    )
    overlap_refresh_after_s: float = setting(
        10.0,
        "Accepted for compatibility: what a request that waited finds cached is looked up again whenever it leaves the "
        "queue.",
        ge=0,
        names=Names(env=("DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS",), dynamo=False),
    )
    active_decode_blocks_threshold: float | None = setting(
        None,
        "Leave out workers of whose KV cache requests in flight hold more than this fraction.",
        ge=0,
        le=1,
        names=Names(flag="--active-decode-blocks-threshold", env=("DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",)),
    )
    active_prefill_tokens_threshold: int | None = setting(
        None,
        "Leave out workers with more prefill tokens than this.",
        ge=0,
        le=1 << 40,
        names=Names(flag="--active-prefill-tokens-threshold", env=("DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",)),
    )
    active_prefill_tokens_threshold_frac: float | None = setting(
        None,
        "Leave out workers with more prefill tokens than this fraction of their batch budget.",
        ge=0,
        le=1_000_000,
        names=Names(flag="--active-prefill-tokens-threshold-frac", env=("DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",)),
    )
    snapshot_dir: Path | None = setting(
        None,
        "Directory for snapshots of the index, from which a restarted router takes up where it was; none writes none.",
        names=OWN,
    )
    snapshot_threshold: int = setting(
        1_000_000,
        "Event messages between two snapshots. One is also written when the router is stopped.",
        ge=1,
    )
    snapshot_from: HostPort | None = setting(
        None,
        "Another router's KvRouterAdmin, host:port, from which to take a snapshot at start; when it does not answer, "
        "that of snapshot-dir is read.",
        names=OWN,
    )
    reset_states: bool = setting(False, "Read no snapshot at start: begin cold.")
    min_initial_workers: int = setting(
        0,
        "Workers that must be ready before the router is.",
        ge=0,
        le=100_000,
        names=Names(env=("DYN_ROUTER_MIN_INITIAL_WORKERS",), dynamo=False),
    )

    @property
    def shares_cache(self) -> bool:
        """Whether blocks in remote storage count for all workers."""
        return self.shared_cache_type != "none"

    @property
    def remote_cache_hit_weight(self) -> float:
        """Worth of a block in remote storage."""
        if not self.shares_cache:
            return self.disk_cache_hit_weight
        return SHARED_CACHE_MULTIPLIER if self.shared_cache_multiplier is None else self.shared_cache_multiplier

    @property
    def class_sizes(self) -> Mapping[int, int]:
        """Strict priority to its bound in the queue."""
        pairs = (item.split("=") for item in (self.queue_class_sizes or "").split())
        return {int(priority): int(size) for priority, size in pairs}

    @property
    def prediction_ahead_s(self) -> float | None:
        """Life of predictions beside events; None makes none."""
        return self.predicted_ttl_secs or (PREDICT_AHEAD_S if self.predict_on_route else None)

    @property
    def local_prefill(self) -> LocalPrefill | None:
        """The condition under which a prompt is computed where it is decoded; None for never by choice."""
        return read_local_prefill(self.conditional_disagg_config or "{}") if self.conditional_disagg else None

    def idle(self) -> Iterator[tuple[str, str, str]]:
        """Settings without effect for want of another: (field, the other one, and what to write of it)."""
        if self.shared_cache_multiplier is not None and not self.shares_cache:
            yield "shared_cache_multiplier", "shared_cache_type", "--shared-cache-type events"
        for cost, fields in _OF_COST.items():
            for field in fields if cost != self.cost else ():
                # A scale and a credit of 0 ask to decide by load alone: with a credit of 0 every cost does that.
                if getattr(self, field) != RouterConfig.model_fields[field].default and self.kv_overlap_score_credit:
                    yield field, "cost", f"--router-cost {cost}"

    def contradictions(self) -> Iterator[Contradiction]:
        """Check that the index is not both served and borrowed."""
        if self.serve_indexer and self.use_remote_indexer:
            yield Contradiction(
                ("serve_indexer", "use_remote_indexer"),
                "serve-indexer and use-remote-indexer exclude each other: keep one.",
            )
