"""Engine events as values: what the compiled reader makes of a message without ever building it."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvrouter_grpc.types import Tier


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """An engine now holds these blocks; `tokens` covers all of them, `parent` is the engine hash before the first."""

    hashes: "array[int]"  # u64 engine hashes, opaque names
    parent: int | None
    tokens: "array[int]"  # u32, at least len(hashes) * block_size; empty when the engine gave none
    block_size: int
    lora_name: str = ""
    cache_salt: str = ""  # given on the first block of a chain only; children inherit it through `parent`
    mm_hashes: Mapping[int, Sequence[int]] = field(default_factory=dict)  # block index in this event to u64s
    tier: Tier = Tier.DEVICE
    group: int = 0  # KV cache group of hybrid models
    kind: str = ""  # kv_cache_spec_kind, "" when not told
    window: int | None = None  # sliding window in tokens

    @property
    def lane(self) -> tuple[int, Tier]:
        return self.group, self.tier


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """An engine gave up one physical copy of each of these blocks."""

    hashes: "array[int]"
    tier: Tier = Tier.DEVICE
    group: int = 0

    @property
    def lane(self) -> tuple[int, Tier]:
        return self.group, self.tier


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """An engine gave up all blocks of the rank."""


KvEvent = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(frozen=True, slots=True)
class KvBatch:
    """One message of an engine's event stream."""

    ts: float  # seconds since the epoch, the engine's clock
    events: Sequence[KvEvent]
    dp_rank: int | None = None
    skipped: int = 0  # events of unknown kind or broken shape, left out one by one
