"""`kvrouter mock-worker`: one mock worker as a process."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, get_args

import click
import msgspec
import uvloop

from kvrouter_grpc.errors import ConfigError
from kvrouter_grpc.mock_worker.config import EventFormat, HashFormat, MockWorkerConfig
from kvrouter_grpc.mock_worker.worker import MockWorker

_EXIT_CONFIG = 64  # EX_USAGE
_EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE: a port is taken
_DEFAULTS = {name: field.default for name, field in MockWorkerConfig.__dataclass_fields__.items()}

# (field of MockWorkerConfig, type, help): the options whose name is the field's and which take one value.
_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("host", str, "Interface for HTTP, events and replay; 0.0.0.0 for all."),
    ("port", int, "HTTP port; 0 picks a free one."),
    ("model", str, "Model name, as in requests and /v1/models."),
    ("version", str, "vLLM version to report."),
    ("block_size", int, "Tokens per KV block. The router must use the same."),
    ("num_blocks", int, "KV blocks per rank. Small values evict early: good for watching overlap go down again."),
    ("max_model_len", int, "Tokens of prompt and output together; by default what fits, at most 8192."),
    ("max_num_seqs", int, "Requests computed at once per rank; further ones wait."),
    ("max_num_batched_tokens", int, "Tokens computed per step; longer prompts are prefilled in chunks."),
    ("max_num_queued_reqs", int, "Running and waiting requests above which new ones get 503; no limit by default."),
    ("dp_size", int, "Data-parallel ranks, each with its own cache; choose one with X-data-parallel-rank."),
    ("vocab_size", int, "Token ids must be below this."),
    ("events_port", int, "KV event (PUB) port of rank 0, rank r at port + r; 0 picks free ones."),
    ("replay_port", int, "Replay port of rank 0, rank r at port + r; 0 picks free ones."),
    ("topic", str, "Topic frame of the events."),
    ("buffer_steps", int, "Event batches kept for replay. A small ring shows what a router does when it is too late."),
    ("clock_skew_s", float, "Seconds by which the timestamps of its events are ahead of the clock."),
    (
        "replay_lossy_after",
        int,
        "Lose every 16th message of a replay after this many, as vLLM up to 0.32 does after 1000.",
    ),
    ("hash_seed", str, "Root of the block hashes. Before 0.29, vLLM's differ per process: give each worker its own."),
    ("advertise_host", str, "Where other workers reach this one, for KV transfer; by default the host."),
    ("kv_transfer_timeout_s", float, "Seconds a prefilled request's blocks wait to be fetched."),
    ("prefill_tokens_per_s", float, "Speed of prefill: uncached prompt tokens per second."),
    ("itl_ms", float, "Milliseconds between two tokens of a stream."),
    ("speedup", float, "Divides every duration; 0 is full speed."),
    ("seed", int, "Changes every answer. Equal seeds answer equally, whatever the worker."),
    ("natural_eos_after", int, "Mean length in tokens of an answer that ends by itself."),
    ("drain_s", float, "Seconds that open requests may take after SIGTERM."),
)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for name, kind, text in reversed(_OPTIONS):
        default = _DEFAULTS[name]
        option = f"--{name.replace('_', '-')}"
        shown = default not in (None, "")
        command = click.option(option, name, type=kind, default=default, show_default=shown, help=text)(command)
    return command


@click.command("mock-worker")
@_options
@click.option("--lora", "loras", multiple=True, metavar="NAME[=PATH]", help="LoRA adapter to serve; repeatable.")
@click.option("--full-speed", is_flag=True, help="Compute as fast as this machine can: --speedup 0.")
@click.option(
    "--event-format",
    type=click.Choice(get_args(EventFormat)),
    default="map",
    show_default=True,
    help="Spelling of the events: map since vLLM 0.24, array before, batch-map with the batch as a map, too.",
)
@click.option(
    "--hash-format",
    type=click.Choice(get_args(HashFormat)),
    default="int",
    show_default=True,
    help="Block hashes as 64-bit integers or as 32 bytes (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0).",
)
@click.option(
    "--replay-frames",
    type=click.Choice(["3", "4"]),
    default="4",
    show_default=True,
    help="Frames per replayed batch: 4, or 3 (no topic) like vLLM up to 0.25.",
)
@click.option("--kv-events/--no-kv-events", default=True, show_default=True, help="Publish KV events.")
@click.option(
    "--kv-event-sources/--no-kv-event-sources",
    default=True,
    show_default=True,
    help="Serve GET /kv_event_sources; older versions have none, so their ports must be configured.",
)
@click.option("--prefix-caching/--no-prefix-caching", default=True, show_default=True, help="Keep what was computed.")
@click.option(
    "--prompt-tokens-details/--no-prompt-tokens-details",
    default=True,
    show_default=True,
    help="Report cached_tokens; vLLM does with --enable-prompt-tokens-details.",
)
@click.option("--kv-transfer", is_flag=True, help="Act on kv_transfer_params like an engine with a NIXL connector.")
@click.option("--natural-eos", is_flag=True, help="Let answers end by themselves, not only at max_tokens.")
def mock_worker_command(*, full_speed: bool, replay_frames: str, **fields: Any) -> None:
    r"""Run a vLLM worker without a model.

    It has vLLM's HTTP surface, KV events, replay and cache (paged blocks, prefix hits, LRU eviction); only the answers
    are made up, the same for the same prompt everywhere. Once it serves, it prints one line of JSON: url, events and
    replay endpoint per rank, model, block_size, pid.

    SIGTERM or SIGINT drains it (--drain-s); a second one ends it at once.

    \b
    A worker, and a router in front of it (add workers on other ports for a fleet):
      kvrouter mock-worker --port 8000 --events-port 5557 --replay-port 5657 &
      kvrouter serve --worker name=w0,url=http://127.0.0.1:8000
    """
    if full_speed:
        fields["speedup"] = 0.0
    try:
        config = MockWorkerConfig(replay_frames=int(replay_frames), **fields)
    except ConfigError as error:
        for fault in error.faults:
            click.echo(fault, err=True)
        sys.exit(_EXIT_CONFIG)
    try:
        uvloop.run(_serve(config))
    except OSError as error:
        click.echo(f"mock worker: cannot listen: {error.strerror or error}; choose other ports or 0", err=True)
        sys.exit(_EXIT_UNAVAILABLE)


async def _serve(config: MockWorkerConfig) -> None:
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    async with MockWorker(config) as worker:
        ready = {
            "url": worker.url,
            "events": worker.events_endpoints,
            "replay": worker.replay_endpoints,
            "model": config.model,
            "block_size": config.block_size,
            "pid": os.getpid(),
        }
        with contextlib.suppress(BrokenPipeError):
            click.echo(msgspec.json.encode(ready))
        await stop.wait()
        await worker.drain()
