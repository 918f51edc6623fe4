"""What a mock worker is: its model, its memory, its speed and its dialect. All checked before a port binds."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from kvrouter_grpc.errors import ConfigError

EventFormat = Literal["map", "array", "batch-map"]
HashFormat = Literal["int", "bytes"]

BYTE_TOKENS = 256
FIRST_BYTE_TOKEN = 5  # below lie the special tokens, as in most tokenizers
FIRST_WORD_TOKEN = FIRST_BYTE_TOKEN + BYTE_TOKENS
DEFAULT_MAX_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class MockWorkerConfig:
    """Everything that makes one mock worker; the defaults are a small engine of one rank with KV events on.

    Attributes:
        host: Interface of the HTTP, event and replay sockets.
        port: HTTP port; 0 picks a free one.
        model: Served model name.
        loras: Adapter names served beside the model, each `name` or `name=path`.
        version: vLLM version that is reported.
        block_size: Tokens per KV block.
        num_blocks: Physical blocks per rank; block 0 is the null block, so one less is usable.
        max_model_len: Tokens of prompt and output together; None takes what fits, at most 8192.
        max_num_seqs: Requests computed at once per rank.
        max_num_batched_tokens: Tokens computed in one step; longer prompts are prefilled in chunks.
        max_num_queued_reqs: Requests (running and waiting) above which new ones get a 503; None is no limit.
        dp_size: Data-parallel ranks, each with its own cache and event stream.
        vocab_size: Token ids are below this.
        kv_events: Publish KV events.
        events_port: PUB port of rank 0, rank r is at port + r; 0 picks free ones.
        replay_port: Replay port of rank 0, rank r is at port + r; 0 picks free ones.
        topic: First frame of every event message.
        buffer_steps: Event batches kept for replay.
        replay_lossy_after: Messages of one replay after which every 16th is lost. vLLM up to 0.32 loses about as
            many after 1000, because its replay socket has a small send buffer. None loses none, like 0.33.
        replay_frames: 4 frames per replayed batch, or 3 (without topic) like vLLM up to 0.25.
        event_format: `map` (since 0.24), `array` (0.22 and 0.23) or `batch-map` (the batch is a map as well).
        hash_format: Block hashes as 64-bit integers or as 32 bytes.
        hash_seed: Root of the hash chain. vLLM before 0.29 draws it at random, so its workers never agree.
        kv_event_sources: Serve `GET /kv_event_sources`; older versions answer 404.
        prefix_caching: Keep what was computed; without it nothing is ever found again, and there are no events.
        clock_skew_s: Seconds by which the timestamps of its events are ahead of the clock.
        prompt_tokens_details: Report `cached_tokens`, like `--enable-prompt-tokens-details`.
        kv_transfer: Act on `kv_transfer_params` like an engine with a NIXL connector; without one they are ignored.
        advertise_host: Where other workers reach this one; by default `host`, or the host name for a wildcard.
        kv_transfer_timeout_s: Seconds a prefilled request's blocks wait for the decode worker.
        prefill_tokens_per_s: Prompt tokens computed per second.
        itl_ms: Milliseconds per decoding step.
        speedup: Divides every duration; 0 computes as fast as the machine can.
        seed: Changes every answer; workers with the same seed answer alike.
        natural_eos: Let answers end by themselves, on average after `natural_eos_after` tokens.
        natural_eos_after: Mean answer length in tokens with `natural_eos`.
        drain_s: Seconds open requests may finish in after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 0
    model: str = "mock"
    loras: tuple[str, ...] = ()
    version: str = "0.32.0"
    block_size: int = 16
    num_blocks: int = 2048
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_num_queued_reqs: int | None = None
    dp_size: int = 1
    vocab_size: int = 32_768
    kv_events: bool = True
    events_port: int = 0
    replay_port: int = 0
    topic: str = "kv-events"
    buffer_steps: int = 10_000
    replay_lossy_after: int | None = None
    replay_frames: int = 4
    event_format: EventFormat = "map"
    hash_format: HashFormat = "int"
    hash_seed: str = "vllm-none-hash"
    kv_event_sources: bool = True
    prefix_caching: bool = True
    clock_skew_s: float = 0.0
    prompt_tokens_details: bool = True
    kv_transfer: bool = False
    advertise_host: str = ""
    kv_transfer_timeout_s: float = 480.0
    prefill_tokens_per_s: float = 16_000.0
    itl_ms: float = 15.0
    speedup: float = 1.0
    seed: int = 0
    natural_eos: bool = False
    natural_eos_after: int = 64
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what no engine could run.

        Raises:
            ConfigError: With every fault that was found.
        """
        faults = [
            f"{name} must be at least {least} and finite, got {value}"
            for name, value, least in self._floors()
            if not least <= value < inf
        ]
        if self.vocab_size <= FIRST_WORD_TOKEN:
            faults.append(f"vocab_size must be above {FIRST_WORD_TOKEN}, got {self.vocab_size}")
        for name, port in (("port", self.port), ("events_port", self.events_port), ("replay_port", self.replay_port)):
            if not 0 <= port <= 65_536 - max(self.dp_size, 1):
                faults.append(f"{name} must leave room for {self.dp_size} rank(s) below 65536, got {port}")
        if self.replay_frames not in (3, 4):
            faults.append(f"replay_frames must be 3 or 4, got {self.replay_frames}")
        if not self.model or not all(name for name, _ in self.adapters):
            faults.append("model and adapter names must not be empty")
        names = [self.model, *(name for name, _ in self.adapters)]
        if len(set(names)) != len(names):
            faults.append(f"model and adapter names must differ, got {', '.join(names)}")
        if self.max_model_len is not None and self.max_model_len > self.capacity_tokens:
            faults.append(
                f"max_model_len {self.max_model_len} needs more than the {self.capacity_tokens} tokens that "
                f"{self.num_blocks} blocks of {self.block_size} hold: raise num_blocks or lower max_model_len"
            )
        if faults:
            raise ConfigError([f"mock worker: {fault}" for fault in faults])

    def _floors(self) -> list[tuple[str, float, float]]:
        return [
            ("block_size", self.block_size, 1),
            ("num_blocks", self.num_blocks, 2),
            ("max_model_len", 2 if self.max_model_len is None else self.max_model_len, 2),
            ("max_num_seqs", self.max_num_seqs, 1),
            ("max_num_batched_tokens", self.max_num_batched_tokens, 1),
            ("max_num_queued_reqs", self.max_num_queued_reqs or 0, 0),
            ("dp_size", self.dp_size, 1),
            ("buffer_steps", self.buffer_steps, 1),
            ("replay_lossy_after", self.replay_lossy_after or 0, 0),
            ("kv_transfer_timeout_s", self.kv_transfer_timeout_s, 0),
            ("prefill_tokens_per_s", self.prefill_tokens_per_s, 1),
            ("itl_ms", self.itl_ms, 0),
            ("speedup", self.speedup, 0),
            ("natural_eos_after", self.natural_eos_after, 1),
            ("drain_s", self.drain_s, 0),
        ]

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the usable blocks of one rank hold."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def context_tokens(self) -> int:
        """Most tokens that one request may have, prompt and output together."""
        return self.max_model_len or min(self.capacity_tokens, DEFAULT_MAX_MODEL_LEN)

    @property
    def adapters(self) -> tuple[tuple[str, str], ...]:
        """(name, path) of every LoRA adapter, in the order of their engine ids 1, 2, ..."""
        pairs = (spec.partition("=") for spec in self.loras)
        return tuple((name, path or f"adapters/{name}") for name, _, path in pairs)
