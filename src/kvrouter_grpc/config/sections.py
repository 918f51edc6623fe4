"""The sections about I/O: the gRPC server, the event subscribers, the engine clients and the log."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from kvrouter_grpc.config.section import (
    MIB,
    Contradiction,
    HostPort,
    Names,
    Section,
    setting,
    split_host_port,
)

TOKEN_BYTES = 4  # token ids travel as packed fixed32
ENVELOPE_BYTES = 64 << 10  # room in a message for all that is not the prompt


def _tokenizer(path: Path) -> Path:
    if not path.exists():
        raise ValueError("nothing is there")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("text prompts need the extra: pip install 'kvrouter-grpc[tokenizer]'")
    return path


class ServerConfig(Section):
    """The gRPC surface: where it listens, what it bounds, how it stops."""

    listen: HostPort = setting(
        "0.0.0.0:50051", "Address of the KvRouter service, host:port; port 0 takes any free port."
    )
    admin_listen: HostPort | None = setting(
        None,
        "Own address of KvRouterAdmin, to keep worker registration off the public port; "
        "none serves it beside KvRouter.",
    )
    metrics_port: int = setting(
        -1,
        "Port of the Prometheus metrics, HTTP /metrics on the host of listen; 0 takes any free port, -1 serves none.",
        ge=-1,
        le=65_535,
        names=Names(env=("DYN_SYSTEM_PORT",)),
    )
    max_concurrent_streams: int = setting(
        1000,
        "Open calls per client connection. A low value tames floods (rapid reset); a client that needs more "
        "opens more connections.",
        ge=1,
        le=1_000_000,
    )
    handshake_timeout_ms: int = setting(
        3000,
        "A connection that has not finished its HTTP/2 handshake by then is closed; gRPC's own default, two "
        "minutes, lets silent peers pile up.",
        ge=100,
        le=120_000,
    )
    max_connection_idle_s: float | None = setting(
        300.0, "Close a connection without calls after this many seconds; none keeps it.", ge=1, le=86_400
    )
    max_connection_age_s: float | None = setting(
        600.0,
        "Ask clients to reconnect after this many seconds, so that they spread over new replicas; none never does.",
        ge=1,
        le=604_800,
    )
    max_connection_age_grace_s: float = setting(
        3600.0,
        "Seconds that open calls get once their connection is too old. Keep it above the longest Generate.",
        ge=1,
        le=604_800,
    )
    keepalive_time_s: float = setting(30.0, "Ping a client that has been silent for this many seconds.", ge=1, le=7200)
    keepalive_timeout_s: float = setting(
        10.0, "Close the connection when a ping stays unanswered for this many seconds.", ge=0.1, le=600
    )
    min_client_ping_interval_s: float = setting(
        5.0, "A client that pings more often than this is disconnected.", ge=0.1, le=3600
    )
    write_timeout_s: float = setting(
        60.0,
        "Give a client up that takes no message of its stream for this long: its request is aborted in the "
        "engine and its load is freed.",
        ge=0.1,
        le=86_400,
    )
    max_receive_message_bytes: int = setting(
        64 * MIB,
        "Largest request accepted; a longer one ends in RESOURCE_EXHAUSTED.",
        ge=MIB,
        le=2048 * MIB - 1,
    )
    reflection: bool = setting(
        True, "Serve gRPC reflection, so that grpcurl and buf curl work without the proto files."
    )
    drain_propagation_s: float = setting(
        5.0,
        "On SIGTERM: seconds between turning NOT_SERVING and refusing calls, for load balancers to notice.",
        ge=0,
        le=3600,
        names=Names(env=("DYN_ROUTER_DRAIN_PROPAGATION_SECONDS",)),
    )
    drain_timeout_s: float = setting(
        300.0,
        "On SIGTERM: seconds until the process stops, the propagation included; streams still open are "
        "ended. Keep terminationGracePeriodSeconds above it.",
        ge=0,
        le=86_400,
        names=Names(env=("DYN_ROUTER_DRAIN_TIMEOUT_SECONDS",)),
    )
    max_prompt_tokens: int = setting(1_048_576, "Longest prompt accepted, in tokens.", ge=1, le=16 * MIB)
    vocab_size: int | None = setting(
        None,
        "Refuse token ids at or above this number; none leaves that check to the engine.",
        ge=1,
        le=2**32,
    )
    tokenizer: Annotated[Path, AfterValidator(_tokenizer)] | None = setting(
        None,
        "Path of a Hugging Face tokenizer, to accept prompts as text. Needs the extra kvrouter-grpc[tokenizer].",
    )

    def contradictions(self) -> Iterator[Contradiction]:
        """Check the two addresses, the drain and the room for the longest prompt."""
        if self.admin_listen is not None and self.admin_listen == self.listen and split_host_port(self.listen)[1]:
            yield Contradiction(
                ("listen", "admin_listen"),
                f"listen and admin-listen are both {self.listen}: give admin-listen its own port, or leave "
                "it out to serve both on one.",
            )
        if self.drain_timeout_s < self.drain_propagation_s:
            yield Contradiction(
                ("drain_timeout_s", "drain_propagation_s"),
                f"drain-timeout-s ({self.drain_timeout_s:g}) includes drain-propagation-s "
                f"({self.drain_propagation_s:g}): make it at least as long.",
            )
        needed = self.max_prompt_tokens * TOKEN_BYTES + ENVELOPE_BYTES
        if needed > self.max_receive_message_bytes:
            yield Contradiction(
                ("max_prompt_tokens", "max_receive_message_bytes"),
                f"max-prompt-tokens ({self.max_prompt_tokens}) does not fit into max-receive-message-bytes "
                f"({self.max_receive_message_bytes}): raise the latter to {needed} or lower the former.",
            )


class EventsConfig(Section):
    """How KV events are received and how lost ones are fetched again."""

    replay_timeout_s: float = setting(
        2.0, "Seconds without an answer after which a replay request has failed.", gt=0, le=300
    )
    replay_backoff_s: float = setting(
        0.2, "First wait before a failed replay is asked for again; it doubles, with jitter.", gt=0, le=60
    )
    replay_backoff_max_s: float = setting(2.0, "Longest wait between two replay requests.", gt=0, le=600)
    max_message_bytes: int = setting(
        64 * MIB, "A larger event message is dropped and counts as lost.", ge=1024, le=1024 * MIB
    )
    max_pending_batches: int = setting(
        10_000,
        "Live batches held back per stream while a replay runs; beyond it the oldest count as lost.",
        ge=1,
        le=1_000_000,
    )
    receive_hwm: int = setting(
        100_000,
        "Messages ZeroMQ queues per stream before it drops: the engine's publisher never waits for us.",
        ge=1,
        le=10_000_000,
    )
    reconnect_ms: int = setting(100, "First wait before reconnecting to a publisher.", ge=1, le=60_000)
    reconnect_max_ms: int = setting(5000, "Longest wait before reconnecting to a publisher.", ge=1, le=600_000)
    stale_after_replays: int = setting(
        8, "Failed replays in a row after which a stream counts as stale.", ge=1, le=1000
    )

    def contradictions(self) -> Iterator[Contradiction]:
        """Check that no back-off starts above its own ceiling."""
        for first, last in (
            ("replay_backoff_s", "replay_backoff_max_s"),
            ("reconnect_ms", "reconnect_max_ms"),
        ):
            if getattr(self, first) > getattr(self, last):
                low, high = first.replace("_", "-"), last.replace("_", "-")
                yield Contradiction(
                    (first, last),
                    f"{high} ({getattr(self, last):g}) is below {low} ({getattr(self, first):g}): make it "
                    "at least as long.",
                )


class UpstreamConfig(Section):
    """How long engines may take, and what follows when they take longer."""

    connect_timeout_s: float = setting(2.0, "Seconds for a connection to an engine.", gt=0, le=60)
    first_token_timeout_s: float = setting(
        300.0, "Seconds from sending a request to its first token: queueing and prefill.", gt=0, le=86_400
    )
    prefill_timeout_s: float = setting(
        60.0,
        "Disaggregated serving: seconds that the prefill worker gets, queueing included, before the prompt is left to "
        "the worker that generates.",
        gt=0,
        le=86_400,
    )
    inter_token_timeout_s: float = setting(60.0, "Longest silence between two tokens.", gt=0, le=86_400)
    health_interval_s: float = setting(0.5, "Seconds between two health checks of a worker.", gt=0, le=300)
    health_timeout_s: float = setting(1.0, "A health check without an answer by then has failed.", gt=0, le=300)
    metrics_interval_s: float = setting(
        2.0,
        "Seconds between two looks at a worker's /metrics: its queues, its cache hits, whether it restarted; 0 never "
        "looks.",
        ge=0,
        le=300,
    )
    retries: int = setting(
        2,
        "Other workers to try when one fails before its first token; after it nothing is retried. Only one, where two "
        "have failed with the request in their hands: by an HTTP 500, a lost connection or silence.",
        ge=0,
        le=10,
    )
    max_response_bytes: int = setting(16 * MIB, "Largest single event of an engine's stream.", ge=1024, le=1024 * MIB)


class LogConfig(Section):
    """What the process says on stderr."""

    level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe messages to write.")
    format: Literal["auto", "console", "json"] = setting(
        "auto", "One JSON object per line, or text for people; auto is console on a terminal, else json."
    )


class DecisionsConfig(Section):
    """What is remembered of decisions."""

    log_size: int = setting(
        1024,
        "Decisions that each endpoint remembers for `kvrouter explain`, with all that they read: about 100 bytes per "
        "worker each, 64 MiB at most. 0 remembers none.",
        names=Names(flag="--decision-log-size"),
        ge=0,
        le=65_536,
    )
    log_file: Path | None = setting(
        None,
        "Also write them to this file, a line of JSON each, for `kvrouter replay`. Never has tokens.",
        names=Names(flag="--decision-log-file"),
    )
    log_file_bytes: int = setting(
        64 * MIB,
        "Size at which the file becomes FILE.1, which replaces the one before, and another one is begun.",
        names=Names(flag="--decision-log-file-bytes"),
        ge=64 * 1024,
        le=1 << 40,
    )
    log_hashes: bool = setting(
        False,
        "Write the prompts' block hashes to the file, too.",
        names=Names(flag="--decision-log-hashes"),
    )

    def contradictions(self) -> Iterator[Contradiction]:
        """What is written is taken from what is remembered."""
        if self.log_file is not None and not self.log_size:
            yield Contradiction(
                ("decisions.log_file", "decisions.log_size"),
                "the decisions in log-file are those that log-size remembers: let it be at least 1.",
            )
