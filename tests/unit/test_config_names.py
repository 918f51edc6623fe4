"""Every name of the Dynamo contract is understood, and means what it means there.

The tables are written out here, and not taken from the model, so that a name cannot get lost with its setting.
"""

import pytest

from kvrouter_grpc.config import Config, RouterConfig, load
from kvrouter_grpc.config.pending import PendingRouterConfig
from kvrouter_grpc.config.settings import SETTINGS
from kvrouter_grpc.config.source import FlagValue

ENDPOINT = {"--endpoint": ["dynamo.prefill.generate"]}

# flag, environment variable ("" for none), text, field of `router`, value
VALUES = [
    ("--router-mode", "DYN_ROUTER_MODE", "round_robin", "mode", "round-robin"),
    ("--router-mode", "DYN_ROUTER_MODE", "random", "mode", "random"),
    ("--router-block-size", "DYN_ROUTER_BLOCK_SIZE", "64", "block_size", 64),
    (
        "--router-kv-overlap-score-credit",
        "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
        "0.5",
        "kv_overlap_score_credit",
        0.5,
    ),
    (
        "--router-kv-overlap-score-credit-decay",
        "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY",
        "1",
        "kv_overlap_score_credit_decay",
        1.0,
    ),
    ("--router-prefill-load-scale", "DYN_ROUTER_PREFILL_LOAD_SCALE", "2", "prefill_load_scale", 2.0),
    (
        "--router-decode-active-request-weight",
        "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
        "3",
        "decode_active_request_weight",
        3.0,
    ),
    ("--router-host-cache-hit-weight", "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT", "0.5", "host_cache_hit_weight", 0.5),
    ("--router-disk-cache-hit-weight", "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT", "0.1", "disk_cache_hit_weight", 0.1),
    ("--shared-cache-multiplier", "DYN_SHARED_CACHE_MULTIPLIER", "0.5", "shared_cache_multiplier", 0.5),
    ("--shared-cache-type", "DYN_SHARED_CACHE_TYPE", "hicache", "shared_cache_type", "hicache"),
    ("--router-temperature", "DYN_ROUTER_TEMPERATURE", "0.7", "temperature", 0.7),
    ("--router-ttl-secs", "DYN_ROUTER_TTL_SECS", "60", "ttl_secs", 60.0),
    (
        "--router-approximate-cache-policy",
        "DYN_ROUTER_APPROXIMATE_CACHE_POLICY",
        "lru",
        "approximate_cache_policy",
        "lru",
    ),
    ("--router-predicted-ttl-secs", "DYN_ROUTER_PREDICTED_TTL_SECS", "5", "predicted_ttl_secs", 5.0),
    ("--router-prefill-load-model", "DYN_ROUTER_PREFILL_LOAD_MODEL", "aic", "prefill_load_model", "aic"),
    ("--router-queue-threshold", "DYN_ROUTER_QUEUE_THRESHOLD", "4.0", "queue_threshold", 4.0),
    ("--router-queue-policy", "DYN_ROUTER_QUEUE_POLICY", "wspt", "queue_policy", "wspt"),
    ("--router-policy-config", "DYN_ROUTER_POLICY_CONFIG", "policy.yaml", "policy_config", "policy.yaml"),
    ("--router-prefill-policy", "DYN_ROUTER_PREFILL_POLICY", "default", "prefill_policy", "default"),
    ("--router-decode-policy", "DYN_ROUTER_DECODE_POLICY", "default", "decode_policy", "default"),
    ("--router-event-threads", "DYN_ROUTER_EVENT_THREADS", "8", "event_threads", 8),
    ("--router-tracking-hash", "DYN_ROUTER_TRACKING_HASH", "keyed-xxh3-v1", "tracking_hash", "keyed-xxh3-v1"),
    ("--router-tracking-key-file", "DYN_ROUTER_TRACKING_KEY_FILE", "/key", "tracking_key_file", "/key"),
    ("--router-tracking-key-id", "DYN_ROUTER_TRACKING_KEY_ID", "7", "tracking_key_id", "7"),
    (
        "--router-conditional-disagg-config",
        "DYN_ROUTER_CONDITIONAL_DISAGG_CONFIG",
        "{}",
        "conditional_disagg_config",
        "{}",
    ),
    ("--router-snapshot-threshold", "DYN_ROUTER_SNAPSHOT_THRESHOLD", "10", "snapshot_threshold", 10),
    ("--router-max-tree-size", "DYN_ROUTER_MAX_TREE_SIZE", "1024", "max_tree_size", 1024),
    ("--router-prune-target-ratio", "DYN_ROUTER_PRUNE_TARGET_RATIO", "0.5", "prune_target_ratio", 0.5),
    (
        "--router-session-affinity-ttl-secs",
        "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
        "600",
        "session_affinity_ttl_secs",
        600.0,
    ),
    (
        "--active-decode-blocks-threshold",
        "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
        "0.9",
        "active_decode_blocks_threshold",
        0.9,
    ),
    (
        "--active-prefill-tokens-threshold",
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
        "10000",
        "active_prefill_tokens_threshold",
        10000,
    ),
    (
        "--active-prefill-tokens-threshold-frac",
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
        "1.5",
        "active_prefill_tokens_threshold_frac",
        1.5,
    ),
    ("--aic-backend", "", "vllm", "aic_backend", "vllm"),
    ("--aic-backend-version", "", "0.12", "aic_backend_version", "0.12"),
    ("--aic-system", "", "h200_sxm", "aic_system", "h200_sxm"),
    ("--aic-model-path", "", "Qwen/Qwen3-32B", "aic_model_path", "Qwen/Qwen3-32B"),
    ("--aic-tp-size", "", "2", "aic_tp_size", 2),
    ("--discovery-backend", "", "etcd", "discovery_backend", "etcd"),
    ("--request-plane", "", "nats", "request_plane", "nats"),
    ("--event-plane", "", "zmq", "event_plane", "zmq"),
]

SWITCHES = [  # flag, environment variable, field of `router`, default
    ("--router-kv-events", "DYN_ROUTER_USE_KV_EVENTS", "kv_events", True),
    ("--router-track-active-blocks", "DYN_ROUTER_TRACK_ACTIVE_BLOCKS", "track_active_blocks", True),
    ("--router-track-output-blocks", "DYN_ROUTER_TRACK_OUTPUT_BLOCKS", "track_output_blocks", False),
    ("--router-track-prefill-tokens", "DYN_ROUTER_TRACK_PREFILL_TOKENS", "track_prefill_tokens", True),
    ("--router-assume-kv-reuse", "DYN_ROUTER_ASSUME_KV_REUSE", "assume_kv_reuse", True),
    ("--router-replica-sync", "DYN_ROUTER_REPLICA_SYNC", "replica_sync", False),
    ("--router-reset-states", "DYN_ROUTER_RESET_STATES", "reset_states", False),
    ("--router-durable-kv-events", "DYN_ROUTER_DURABLE_KV_EVENTS", "durable_kv_events", False),
    ("--router-conditional-disagg", "DYN_ROUTER_CONDITIONAL_DISAGG", "conditional_disagg", False),
    ("--router-predict-on-route", "DYN_ROUTER_PREDICT_ON_ROUTE", "predict_on_route", False),
    ("--serve-indexer", "DYN_SERVE_INDEXER", "serve_indexer", False),
    ("--use-remote-indexer", "DYN_USE_REMOTE_INDEXER", "use_remote_indexer", False),
    ("--load-aware", "DYN_ROUTER_LOAD_AWARE", "load_aware", False),
    (
        "--enable-session-prefix-index",
        "DYN_ENABLE_SESSION_PREFIX_INDEX",
        "enable_session_prefix_index",
        False,
    ),
]

ENV_ONLY = [  # environment variable, text, path, value
    ("DYN_ROUTER_MIN_INITIAL_WORKERS", "3", "router.min_initial_workers", 3),
    ("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS", "60", "router.request_expiry_s", 60.0),
    ("DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS", "0", "router.overlap_refresh_after_s", 0.0),
    ("DYN_ROUTER_ACTIVE_SEQUENCE_DIRECT_ZMQ", "1", "router.active_sequence_direct_zmq", True),
    ("DYN_ROUTER_DRAIN_PROPAGATION_SECONDS", "1.5", "server.drain_propagation_s", 1.5),
    ("DYN_ROUTER_DRAIN_TIMEOUT_SECONDS", "30", "server.drain_timeout_s", 30.0),
]

LEGACY = [  # deprecated flag, text (None: a switch), its successor
    ("--block-size", "64", "--router-block-size"),
    ("--temperature", "0.5", "--router-temperature"),
    ("--snapshot-threshold", "10", "--router-snapshot-threshold"),
    ("--queue-threshold", "4", "--router-queue-threshold"),
    ("--ttl-secs", "60", "--router-ttl-secs"),
    ("--max-tree-size", "10", "--router-max-tree-size"),
    ("--kv-events", None, "--router-kv-events"),
    ("--replica-sync", None, "--router-replica-sync"),
    ("--reset-states", None, "--router-reset-states"),
    ("--durable-kv-events", None, "--router-durable-kv-events"),
    ("--track-active-blocks", None, "--router-track-active-blocks"),
    ("--track-output-blocks", None, "--router-track-output-blocks"),
    ("--assume-kv-reuse", None, "--router-assume-kv-reuse"),
]


def router_value(config: Config, field: str) -> object:
    return config.model_dump(mode="json")["router"][field]


def named(config: Config, name: str) -> list[str]:
    return [warning for warning in config.warnings if name in warning]


@pytest.mark.parametrize(("flag", "variable", "text", "field", "value"), VALUES)
def test_value_by_flag_and_variable(flag: str, variable: str, text: str, field: str, value: object) -> None:
    assert router_value(load({**ENDPOINT, flag: text}, {}), field) == value
    if variable:
        assert router_value(load(ENDPOINT, {variable: text}), field) == value


@pytest.mark.parametrize(("flag", "variable", "field", "default"), SWITCHES)
def test_switch_by_flag_and_variable(flag: str, variable: str, field: str, default: bool) -> None:
    assert router_value(load(ENDPOINT, {}), field) is default
    for value in (True, False):
        assert router_value(load({**ENDPOINT, flag: value}, {}), field) is value
        for text in ("true", "1", "on") if value else ("false", "0", "off"):
            assert router_value(load(ENDPOINT, {variable: text}), field) is value


@pytest.mark.parametrize(("variable", "text", "path", "value"), ENV_ONLY)
def test_variable_without_flag_of_its_name(variable: str, text: str, path: str, value: object) -> None:
    section, field = path.split(".")
    assert load(ENDPOINT, {variable: text}).model_dump()[section][field] == value


@pytest.mark.parametrize(("old", "text", "new"), LEGACY)
def test_legacy_flag_warns_once_and_counts(old: str, text: str | None, new: str) -> None:
    value = True if text is None else text
    by_old, by_new = load({**ENDPOINT, old: value}, {}), load({**ENDPOINT, new: value}, {})
    assert by_old.model_dump() == by_new.model_dump()
    assert named(by_old, "deprecated") == [f"flag {old} is deprecated: write {new}."]
    assert not named(by_new, "deprecated")


def test_endpoint_by_variable() -> None:
    assert load({}, {"DYN_ROUTER_ENDPOINT": "a.b.c"}).endpoints == ("a.b.c",)
    assert load({}, {"KVROUTER_ENDPOINTS": "a.b.c, a.d.c"}).endpoints == ("a.b.c", "a.d.c")


def test_command_line_of_the_dynamo_readme() -> None:
    config = load(
        {
            "--endpoint": ["dynamo.prefill.generate"],
            "--router-block-size": "64",
            "--router-reset-states": True,
            "--router-track-active-blocks": False,
        },
        {},
    )
    assert config.router.block_size == 64
    assert not config.router.track_active_blocks
    assert config.router.reset_states
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("flags", "env", "origin"),
    [
        ({"--router-kv-overlap-score-weight": "0"}, {}, "flag --router-kv-overlap-score-weight"),
        ({"--kv-overlap-score-weight": "0"}, {}, "flag --kv-overlap-score-weight"),
        ({}, {"DYN_OVERLAP_SCORE_WEIGHT": "0"}, "environment DYN_OVERLAP_SCORE_WEIGHT"),
        (
            {},
            {"DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT": "0"},
            "environment DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT",
        ),
    ],
)
def test_overlap_weight_of_zero_clears_the_credit(flags: dict[str, str], env: dict[str, str], origin: str) -> None:
    config = load({**ENDPOINT, **flags}, env)
    assert (config.router.prefill_load_scale, config.router.kv_overlap_score_credit) == (0.0, 0.0)
    assert config.warnings == (
        f"{origin} is deprecated: write --router-prefill-load-scale 0 and --router-kv-overlap-score-credit 0.",
    )


def test_overlap_weight_sets_the_prefill_scale() -> None:
    config = load({**ENDPOINT, "--router-kv-overlap-score-weight": "2.5"}, {})
    assert (config.router.prefill_load_scale, config.router.kv_overlap_score_credit) == (2.5, 1.0)
    assert config.warnings == (
        "flag --router-kv-overlap-score-weight is deprecated: write --router-prefill-load-scale 2.5.",
        "flag --router-kv-overlap-score-weight: no effect without --router-cost dynamo.",
    )
    config = load({**ENDPOINT, "--router-kv-overlap-score-weight": "2.5", "--router-cost": "dynamo"}, {})
    assert len(config.warnings) == 1


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ({"--router-prefill-load-scale": "2"}, "--router-cost dynamo"),
        ({"--router-prefill-load-scale": "1"}, ""),  # the default
        ({"--router-kv-overlap-score-credit-decay": "1"}, "--router-cost dynamo"),
        ({"--router-decode-active-request-weight": "1"}, "--router-cost dynamo"),
        ({"--router-new-work-weight": "1"}, ""),
        ({"--router-new-work-weight": "1", "--router-cost": "dynamo"}, "--router-cost default"),
        ({"--router-request-weight": "1", "--router-cost": "lmetric"}, "--router-cost default"),
        (
            {"--router-prefill-load-scale": "2", "--endpoint-policy": ["endpoint=dynamo.prefill.generate,cost=dynamo"]},
            "",
        ),
        ({"--shared-cache-multiplier": "0.5"}, "--shared-cache-type events"),
        ({"--shared-cache-multiplier": "0.5", "--shared-cache-type": "hicache"}, ""),
        ({"--router-kv-overlap-score-credit": "0"}, ""),
    ],
)
def test_settings_of_choices_that_were_not_made_are_named(flags: dict[str, FlagValue], idle: str) -> None:
    warnings = load({**ENDPOINT, **flags}, {}).warnings
    assert warnings == ((f"flag {next(iter(flags))}: no effect without {idle}.",) if idle else ())


def test_overlap_weight_of_none_changes_nothing() -> None:
    config = load({**ENDPOINT, "--router-kv-overlap-score-weight": "none"}, {})
    assert config.router == RouterConfig()
    assert config.warnings == ()


def test_defaults_are_those_of_the_contract() -> None:
    router = load(ENDPOINT, {}).router
    assert router.mode == "kv"
    assert router.block_size is None
    assert router.kv_overlap_score_credit == 1.0
    assert router.prefill_load_scale == 1.0
    assert router.temperature == 0.0
    assert router.host_cache_hit_weight == 0.75
    assert router.disk_cache_hit_weight == 0.25
    assert router.request_expiry_s == 300.0
    assert router.queue_threshold is None
    assert router.ttl_secs == 120.0


def test_load_aware_is_a_preset() -> None:
    router = load({**ENDPOINT, "--load-aware": True}, {}).router
    assert router.kv_overlap_score_credit == 0.0
    assert not router.kv_events
    assert not router.assume_kv_reuse
    assert router.track_active_blocks
    assert router.track_prefill_tokens


def test_no_name_means_two_settings() -> None:
    for names in (
        [flag for setting in SETTINGS.values() for flag in (setting.flag, *setting.legacy_flags)],
        [name for setting in SETTINGS.values() for name in (*setting.env, *setting.names.legacy_env)],
    ):
        assert sorted(names) == sorted(set(names))


def test_pending_settings_have_no_reader_among_the_others() -> None:
    assert not set(PendingRouterConfig.model_fields) & set(RouterConfig.__annotations__)


@pytest.mark.parametrize("path", [path for path, setting in SETTINGS.items() if setting.pending])
def test_pending_setting_warns_unless_at_its_default(path: str) -> None:
    setting = SETTINGS[path]
    values = {flag: text for flag, _, text, field, _ in VALUES if path == f"router.{field}"}
    values |= {flag: not default for flag, _, field, default in SWITCHES if path == f"router.{field}"}
    env = {variable: text for variable, text, target, _ in ENV_ONLY if path == target}
    assert values or env, "the tables above do not know this setting"
    (warning,) = named(load({**ENDPOINT, **values}, env), setting.key)
    assert "accepted for compatibility, no effect in this version" in warning
    if setting.default is not None:
        default = setting.default if setting.switch else str(setting.default)
        assert load({**ENDPOINT, setting.flag: default}, {}).warnings == ()
