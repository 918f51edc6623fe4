"""Settings of the Dynamo router whose feature this version does not have.

They are parsed and checked, so that a command line or an environment written for Dynamo works here unchanged,
and each one set to another value than its default is answered with one warning. Being a field of
`PendingRouterConfig` is what makes a setting one of these: to give it its effect, move it to `RouterConfig`.
"""

from pathlib import Path
from typing import Literal

from kvrouter_grpc.config.section import Names, Section, setting


class RetiredRouterConfig(Section):
    """Settings that now mean others: `load` translates them, no component sees them."""

    kv_overlap_score_weight: float | None = setting(
        None,
        "Deprecated: sets prefill-load-scale, and at 0 kv-overlap-score-credit to 0 as well.",
        ge=0,
        le=1000,
        names=Names(legacy_env=("DYN_OVERLAP_SCORE_WEIGHT",)),
    )


class PendingRouterConfig(Section):
    """Accepted for compatibility, without effect."""

    # Policy classes and policies per phase: endpoint-policy has the settings of each endpoint.
    policy_config: Path | None = setting(None, "YAML file of policy classes.")
    prefill_policy: str | None = setting(None, "Name of the selection policy for prefill workers.")
    decode_policy: str | None = setting(None, "Name of the selection policy for decode workers.")

    # State shared between replicas.
    replica_sync: bool = setting(False, "Share the booked load between router replicas.")
    active_sequence_direct_zmq: bool = setting(
        False,
        "Share the booked load over ZeroMQ.",
        names=Names(env=("DYN_ROUTER_ACTIVE_SEQUENCE_DIRECT_ZMQ",), dynamo=False),
    )
    durable_kv_events: bool = setting(False, "Take KV events from JetStream.")
    serve_indexer: bool = setting(
        False,
        "Serve this router's index to others.",
        names=Names(flag="--serve-indexer", env=("DYN_SERVE_INDEXER",)),
    )
    use_remote_indexer: bool = setting(
        False,
        "Ask another process for the index.",
        names=Names(flag="--use-remote-indexer", env=("DYN_USE_REMOTE_INDEXER",)),
    )

    # Prefill performance model.
    prefill_load_model: Literal["none", "aic"] = setting("none", "Model that predicts how long a prefill takes.")
    aic_backend: str | None = setting(None, "Engine of the performance model.", names=Names(flag="--aic-backend"))
    aic_backend_version: str | None = setting(
        None, "Engine version of the performance model.", names=Names(flag="--aic-backend-version")
    )
    aic_system: str | None = setting(None, "GPU of the performance model.", names=Names(flag="--aic-system"))
    aic_model_path: str | None = setting(None, "Model of the performance model.", names=Names(flag="--aic-model-path"))
    aic_tp_size: int | None = setting(
        None, "Tensor parallelism of the performance model.", ge=1, names=Names(flag="--aic-tp-size")
    )

    # What this design does without.
    event_threads: int = setting(4, "Threads that apply KV events. This router applies them on its event loop.", ge=1)
    tracking_hash: Literal["public-xxh3-v1", "keyed-xxh3-v1"] = setting(
        "public-xxh3-v1", "Hash that names blocks in the load shared between replicas."
    )
    tracking_key_file: Path | None = setting(None, "File with the key of keyed-xxh3-v1.")
    tracking_key_id: str | None = setting(None, "Name of the key of keyed-xxh3-v1.")
    enable_session_prefix_index: bool = setting(
        False,
        "Keep the prefixes of each session.",
        names=Names(flag="--enable-session-prefix-index", env=("DYN_ENABLE_SESSION_PREFIX_INDEX",)),
    )
    discovery_backend: str | None = setting(
        None,
        "Where Dynamo workers register. This router needs no registry.",
        names=Names(flag="--discovery-backend"),
    )
    request_plane: str | None = setting(
        None,
        "How Dynamo sends requests. This router speaks the engines' HTTP.",
        names=Names(flag="--request-plane"),
    )
    event_plane: str | None = setting(
        None,
        "How Dynamo sends events. This router subscribes to the engines.",
        names=Names(flag="--event-plane"),
    )
