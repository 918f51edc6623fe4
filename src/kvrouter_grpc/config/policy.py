"""How one endpoint decides where it differs from the others, as people write it: like a worker, inline or in YAML."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kvrouter_grpc.config.router import RouterConfig


class EndpointPolicy(NamedTuple):
    """The settings of the section `router` that one endpoint has for itself."""

    endpoint: str
    settings: Mapping[str, Any]  # field of RouterConfig to its value


OF_THE_PROCESS = frozenset(
    {
        "kv_events",
        "load_aware",
        "min_initial_workers",
        "reset_states",
        "snapshot_dir",
        "snapshot_from",
        "snapshot_threshold",
    }
)
"""Settings of the section `router` that hold for all endpoints."""


def applied(base: RouterConfig, policies: Iterable[EndpointPolicy], endpoint: str) -> RouterConfig:
    """The policy of one endpoint."""
    own = {name: value for policy in policies if policy.endpoint == endpoint for name, value in policy.settings.items()}
    return base.model_copy(update=own) if own else base
