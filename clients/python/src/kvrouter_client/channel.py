"""The connection to a router: one HTTP/2 channel, reused for every call."""

import json
from typing import Any

import grpc
import grpc.aio

DEFAULT_TIMEOUT_S = 5.0
"""Deadline of a unary call: it costs the router well under a millisecond, the rest is network and retries."""

DEFAULT_GENERATE_TIMEOUT_S = 600.0
"""Deadline of a whole Generate stream."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message in either direction: 16 million prompt tokens, and the router's own default."""

_SERVICE_CONFIG: dict[str, Any] = {
    # One replica at a time, a random one for each client: a reservation lives in the router that made it, so
    # the calls that belong together must not be spread.
    "loadBalancingConfig": [{"pick_first": {"shuffleAddressList": True}}],
    "methodConfig": [
        {
            # Unary calls only, and only when the router did not take them: a stream that has begun cannot be
            # repeated.
            "name": [
                {"service": "kvrouter.v1.KvRouter", "method": "BestWorkerId"},
                {"service": "kvrouter.v1.KvRouter", "method": "BestWorkerIdBatch"},
                {"service": "kvrouter.v1.KvRouter", "method": "GetOverlapScores"},
                {"service": "kvrouter.v1.KvRouter", "method": "MarkPrefillComplete"},
                {"service": "kvrouter.v1.KvRouter", "method": "ReportOutput"},
                {"service": "kvrouter.v1.KvRouter", "method": "Free"},
                {"service": "kvrouter.v1.KvRouterAdmin"},
            ],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # A router that vanished without closing its socket is noticed while calls are open. `ping_timeout_ms`
    # decides how soon: without it gRPC waits a minute, whatever `keepalive_timeout_ms` says.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # Reconnect promptly after a restart of the router; gRPC's own bound is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)


def open_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """Open a channel to a router; it connects with the first call.

    Args:
        address: gRPC target, e.g. `router:50051`, `dns:///router-headless:50051` or `unix:/run/router.sock`.
        credentials: TLS credentials; None for plain text, which belongs inside a trusted network only.
    """
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
