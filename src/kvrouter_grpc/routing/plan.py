"""How an endpoint chooses: its configuration, as one request may change it."""

from dataclasses import dataclass, replace
from typing import Self

from kvrouter_grpc.config import RouterConfig
from kvrouter_grpc.core import Policy
from kvrouter_grpc.routing.cost import Weights
from kvrouter_grpc.routing.mode import Knobs
from kvrouter_grpc.types import RouterOverride, RoutingRequest


@dataclass(frozen=True, slots=True)
class Plan:
    """Cost, mode, their knobs and the temperature, and the same as the compiled core takes it."""

    weights: Weights
    knobs: Knobs
    cost: str
    mode: str
    temperature: float
    policy: Policy

    @classmethod
    def make(cls, weights: Weights, knobs: Knobs, cost: str, mode: str, temperature: float) -> Self:
        """Compile a plan."""
        policy = Policy(weights, knobs, cost=cost, mode=mode, temperature=temperature)
        return cls(weights, knobs, cost, mode, temperature, policy)

    @classmethod
    def of(cls, config: RouterConfig) -> Self:
        """The plan of requests that change nothing."""
        weights = Weights(
            new_work_weight=config.new_work_weight,
            request_weight=config.request_weight,
            overlap_score_credit=config.kv_overlap_score_credit,
            overlap_score_credit_decay=config.kv_overlap_score_credit_decay,
            prefill_load_scale=config.prefill_load_scale,
            decode_active_request_weight=config.decode_active_request_weight,
            host_cache_hit_weight=config.host_cache_hit_weight,
            disk_cache_hit_weight=config.disk_cache_hit_weight,
            remote_cache_hit_weight=config.remote_cache_hit_weight,
            shared_cache=config.shares_cache,
            track_active_blocks=config.track_active_blocks,
            track_prefill_tokens=config.track_prefill_tokens,
            assume_kv_reuse=config.assume_kv_reuse,
        )
        knobs = Knobs(
            session_load_bound=config.session_load_bound,
            prefix_threshold=config.prefix_threshold,
            kv_aware_threshold=config.kv_aware_threshold,
            accelerator_to_cpu_ratio=config.accelerator_to_cpu_ratio,
        )
        return cls.make(weights, knobs, config.cost, config.mode, config.temperature)

    def changed(self, override: RouterOverride) -> "Plan":
        """This plan as a request changes it."""
        weights = {
            field: value
            for field in ("overlap_score_credit", "prefill_load_scale", "assume_kv_reuse", "track_prefill_tokens")
            if (value := getattr(override, field)) is not None
        }
        if self.weights.shared_cache and override.shared_cache_multiplier is not None:
            weights["remote_cache_hit_weight"] = override.shared_cache_multiplier
        temperature = override.temperature if override.temperature is not None else self.temperature
        weights_now = replace(self.weights, **weights)
        return Plan.make(weights_now, self.knobs, override.cost or self.cost, self.mode, temperature)

    def decoding(self) -> "Plan":
        """This plan for a request whose prompt another worker computes.

        What decides then is the room for its blocks: no prompt waits here, and what is cached here saves a transfer,
        not a computation. The Dynamo router uses the same formula for decode pools.
        """
        weights = replace(
            self.weights,
            overlap_score_credit=0.0,
            host_cache_hit_weight=0.0,
            disk_cache_hit_weight=0.0,
            remote_cache_hit_weight=0.0,
            track_prefill_tokens=False,
        )
        return Plan.make(weights, self.knobs, "dynamo", self.mode, self.temperature)


class Plans:
    """The plans of an endpoint's requests.

    Args:
        config: Of the endpoint.

    Attributes:
        usual: Of requests that change nothing.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.usual = Plan.of(config)
        self._decoding = self.usual.decoding()

    def of(self, request: RoutingRequest) -> Plan:
        """The plan that a request is decided and booked by."""
        override = request.hints.override
        if override is None:
            return self._decoding if request.prefilled else self.usual
        plan = self.usual.changed(override)
        return plan.decoding() if request.prefilled else plan
