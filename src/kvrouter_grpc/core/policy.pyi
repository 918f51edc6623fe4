from collections.abc import Mapping
from typing import Protocol

class Weights(Protocol):
    """The knobs of the costs; see `routing/cost.py`."""

    @property
    def new_work_weight(self) -> float: ...
    @property
    def request_weight(self) -> float: ...
    @property
    def overlap_score_credit(self) -> float: ...
    @property
    def overlap_score_credit_decay(self) -> float: ...
    @property
    def prefill_load_scale(self) -> float: ...
    @property
    def decode_active_request_weight(self) -> float: ...
    @property
    def host_cache_hit_weight(self) -> float: ...
    @property
    def disk_cache_hit_weight(self) -> float: ...
    @property
    def remote_cache_hit_weight(self) -> float: ...
    @property
    def shared_cache(self) -> bool: ...
    @property
    def track_active_blocks(self) -> bool: ...
    @property
    def track_prefill_tokens(self) -> bool: ...
    @property
    def assume_kv_reuse(self) -> bool: ...

class Knobs(Protocol):
    """The knobs of the modes; see `routing/mode.py`."""

    @property
    def session_load_bound(self) -> float: ...
    @property
    def prefix_threshold(self) -> float: ...
    @property
    def kv_aware_threshold(self) -> float: ...
    @property
    def accelerator_to_cpu_ratio(self) -> float: ...

COSTS: Mapping[str, tuple[str, ...]]
"""The terms of each cost, by the name that `--router-cost` and `router_config_override.cost` use."""

class Policy:
    """How to choose.

    Args:
        weights: Of the cost.
        knobs: Of the mode.
        cost: One of `COSTS`.
        mode: One of those in `docs/modes.md`.
        temperature: 0 takes the lowest score; above, scores are drawn from by a softmax.

    Raises:
        ValueError: No such cost or mode.
    """

    terms: tuple[str, ...]
    """Names of the terms of the cost."""
    cost: str
    mode_name: str
    temperature: float

    def __init__(
        self, weights: Weights, knobs: Knobs, *, cost: str = "default", mode: str = "kv", temperature: float = 0.0
    ) -> None: ...
