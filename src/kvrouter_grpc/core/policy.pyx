"""`Policy`: which formula, mode and knobs decide."""

cimport cython

from types import MappingProxyType

from kvrouter_grpc.core.cost cimport DYNAMO, DYNAMO_EXAMPLE, LMETRIC, MOST_TERMS, PREFILL_FIRST, is_own
from kvrouter_grpc.core.mode cimport (
    BY_CHANCE,
    DEVICE_AWARE,
    IN_TURN,
    KV_AWARE,
    LEAST_LOADED,
    LOWEST_COST,
    LONGEST_PREFIX,
    POWER_OF_TWO,
    SESSION,
)

cdef dict FORMULAS = {
    "default": PREFILL_FIRST,
    "dynamo": DYNAMO,
    "dynamo-example": DYNAMO_EXAMPLE,
    "lmetric": LMETRIC,
}

COSTS = MappingProxyType(
    {
        "default": ("queued_prefill", "new_prefill", "replication", "active_requests", "memory_shortage"),
        "dynamo": ("prefill", "decode", "active_requests"),
        "dynamo-example": ("uncached", "kv_usage", "waiting"),
        "lmetric": ("prefill", "batch"),
    }
)

cdef dict MODES = {
    "kv": LOWEST_COST,
    "round-robin": IN_TURN,
    "random": BY_CHANCE,
    "power-of-two": POWER_OF_TWO,
    "least-loaded": LEAST_LOADED,
    "device-aware-weighted": DEVICE_AWARE,
    "session": SESSION,
    "prefix": LONGEST_PREFIX,
    "kv-aware": KV_AWARE,
    "direct": LOWEST_COST,  # of the rows that a pin leaves
}


@cython.final
cdef class Policy:
    """How to choose; the full description is in `policy.pyi`."""

    def __init__(self, weights, knobs, *, cost="default", mode="kv", double temperature=0.0):
        if cost not in FORMULAS or mode not in MODES:
            raise ValueError(f"cost must be one of {', '.join(FORMULAS)} and mode one of {', '.join(MODES)}")
        self.weights.formula = FORMULAS[cost]
        self.weights.new_work_weight = weights.new_work_weight
        self.weights.request_weight = weights.request_weight
        self.weights.overlap_score_credit = weights.overlap_score_credit
        self.weights.held_worth = min(1.0, weights.overlap_score_credit)
        self.weights.overlap_score_credit_decay = weights.overlap_score_credit_decay
        self.weights.prefill_load_scale = weights.prefill_load_scale
        self.weights.decode_active_request_weight = weights.decode_active_request_weight
        self.weights.host_cache_hit_weight = weights.host_cache_hit_weight
        self.weights.disk_cache_hit_weight = weights.disk_cache_hit_weight
        self.weights.remote_cache_hit_weight = weights.remote_cache_hit_weight
        self.weights.shared_cache = weights.shared_cache
        self.weights.track_active_blocks = weights.track_active_blocks
        self.weights.track_prefill_tokens = weights.track_prefill_tokens
        self.weights.assume_kv_reuse = weights.assume_kv_reuse
        self.knobs.session_load_bound = knobs.session_load_bound
        self.knobs.prefix_threshold = knobs.prefix_threshold
        self.knobs.kv_aware_threshold = knobs.kv_aware_threshold
        self.knobs.accelerator_to_cpu_ratio = knobs.accelerator_to_cpu_ratio
        self.mode = MODES[mode]
        self.temperature = temperature
        self.terms = COSTS[cost]
        self.cost = cost
        self.mode_name = mode
        self.fewest_requests = self.mode in (LONGEST_PREFIX, KV_AWARE) or (
            self.mode == LOWEST_COST and is_own(self.weights.formula)
        )
        assert len(self.terms) <= MOST_TERMS
