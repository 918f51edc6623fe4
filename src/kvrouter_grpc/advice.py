"""What can be wrong between the router and its workers, each fault in one sentence with its remedy and its effect.

One place, so that the running router (readiness, ListWorkers, GetLoads, metrics, log) and `kvrouter check` say the same
of the same fault; docs/troubleshooting.md has a row for each.
"""

from collections.abc import Collection
from enum import Enum
from typing import NamedTuple


class Effect(Enum):
    """What a running router makes of a fault. All of them are told."""

    EXCLUDES = "excludes"  # its worker gets no requests, and a router that was never ready does not become so
    HOLDS = "holds"  # a router that was never ready does not become so; later as `DEGRADES`
    DEGRADES = "degrades"  # its worker gets requests, but what it caches is not known as well as it could be
    TOLD = "told"  # nothing


class Advice(NamedTuple):
    """A fault and what to do about it; as a text, one sentence.

    Attributes:
        fault: Its name, for metrics.
        effect: What it does to readiness and to its worker.
        seen: What is wrong, as it was seen.
        fix: What to change.
    """

    fault: str
    effect: Effect
    seen: str
    fix: str

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.seen}: {self.fix}"


def events_off() -> Advice:
    """The worker says that it publishes nothing."""
    return Advice(
        "events_off", Effect.DEGRADES, "its engine publishes no KV events", "start it with --kv-events-config"
    )


def events_nowhere() -> Advice:
    """Neither the worker nor its entry says where the events are."""
    return Advice(
        "events_nowhere",
        Effect.DEGRADES,
        "its engine does not say where its KV events are",
        "give events=tcp://host:port in its entry",
    )


def events_unreached(address: str) -> Advice:
    """Nobody has ever answered at the address of the events. Engines that still start are like that, too."""
    return Advice(
        "events_unreached",
        Effect.DEGRADES,
        f"nobody answers at {address}",
        "correct events= in its entry and the endpoint in --kv-events-config, and open the port",
    )


def not_zeromq(address: str) -> Advice:
    """Something else listens at the address of the events."""
    return Advice("not_zeromq", Effect.HOLDS, f"{address} does not speak ZeroMQ", "is it the port of the KV events?")


def no_address(address: str) -> Advice:
    """The address of the events cannot be connected to."""
    return Advice("no_address", Effect.HOLDS, f"{address} is no address of KV events", "write events=tcp://host:port")


def wrong_topic(wanted: str, heard: Collection[str]) -> Advice:
    """Events come, but not with the topic that is subscribed to."""
    told = " and ".join(repr(topic) for topic in sorted(heard))
    return Advice(
        "wrong_topic",
        Effect.HOLDS,
        f"its events have the topic {told}, so none passes the topic {wanted!r} of its entry",
        "correct topic= in its entry, or leave it out to take all",
    )


def block_sizes_differ(name: str, size: int, source: str, router_size: int) -> Advice:
    """The worker caches blocks of another size than the router hashes."""
    return Advice(
        "block_size",
        Effect.EXCLUDES,
        f"{name} caches blocks of {size} tokens ({source}) but the router hashes blocks of {router_size}",
        f"set --router-block-size {size}, or start the worker with --block-size {router_size}",
    )


def block_size_misconfigured(name: str, configured: int, reported: int) -> Advice:
    """The worker's entry states a block size that it does not have."""
    return Advice(
        "configured_block_size",
        Effect.EXCLUDES,
        f"{name} is configured with block size {configured} but reports {reported}",
        "correct or remove block-size in its entry",
    )


def no_prefix_caching() -> Advice:
    """The engine caches nothing between requests. Some models leave it no choice."""
    return Advice(
        "no_prefix_caching",
        Effect.DEGRADES,
        "its engine runs without prefix caching, so nothing is ever cached there",
        "start it with --enable-prefix-caching",
    )


def cached_tokens_untold() -> Advice:
    """Answers do not say how much of the prompt was cached, as is vLLM's default."""
    return Advice(
        "cached_tokens_untold",
        Effect.TOLD,
        "its engine does not report cached_tokens, so that predictions are checked by its metrics alone",
        "start it with --enable-prompt-tokens-details",
    )


def reports_reused(evidence: str) -> Advice:
    """Blocks are stored more often than they are removed."""
    return Advice(
        "reports_reused",
        Effect.DEGRADES,
        f"its events store blocks again that it merely reuses ({evidence}), so blocks seem to be held that are gone",
        "do not send kv_cache_report_mode=full to engines that a router follows",
    )


def group_unjudged(numbers: Collection[int]) -> Advice:
    """KV cache groups of a hybrid model whose part in prefix hits is not known."""
    return Advice(
        "group_unjudged",
        Effect.TOLD,
        f"KV cache group {', '.join(map(str, numbers))} of its model is of a kind whose part in prefix hits its events "
        "do not tell (chunked local attention, or vLLM before 0.22)",
        "expect hits shorter than predicted, which the other groups alone foretell",
    )
