"""What one rank's event batches amount to. Counts and names are kept, not the batches."""

from dataclasses import dataclass, field
from typing import Any

import msgspec

MAX_NAMES = 16
"""Different topics, adapters, block sizes and the like that are kept: a report names no more."""

MAX_HELD = 1_000_000
"""Block hashes that are followed; beyond, repeated stores are no longer counted."""

FULL_ATTENTION = frozenset({None, "full_attention", "mla_attention"})
# Fields of an array event after its tag, by vLLM's order; see the feed of the core for the same as compiled code.
_STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
)
_REMOVED = ("block_hashes", "medium", "group_idx")
_FIELDS: dict[str, tuple[str, ...]] = {"BlockStored": _STORED, "BlockRemoved": _REMOVED, "AllBlocksCleared": ()}


@dataclass(slots=True)
class EventTally:
    """Counts over the batches of a rank, replayed and live.

    Attributes:
        live: Batches that were published while we listened.
        replayed: Batches that were replayed.
        first_seq: Lowest sequence number of the replay.
        missing: Sequence numbers missing within the replay.
        topics: Topics of the messages, those of replays included.
        unreadable: Payloads that are no batch.
        unknown: Kinds of events that this version does not know.
        block_sizes: Tokens per block of full-attention groups.
        adapters: LoRA adapters that stores name.
        ranks: Ranks that the batches name.
        stored: Blocks stored; one that comes live and replayed counts twice.
        repeated: Stores of two or more blocks that were all held already.
        most_held: Largest number of blocks held on the device at once, duplicates counted, while all of the stream was
            known.
        ahead_s: How far the newest live timestamp is ahead of our clock, in seconds; negative: behind.
    """

    live: int = 0
    replayed: int = 0
    first_seq: int | None = None
    missing: int = 0
    topics: set[str] = field(default_factory=set)
    unreadable: int = 0
    unknown: set[str] = field(default_factory=set)
    block_sizes: set[int] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    stored: int = 0
    repeated: int = 0
    most_held: int = 0
    ahead_s: float | None = None
    _next: int = 0  # number after the highest one
    _held: dict[Any, int] | None = field(default_factory=dict)
    _copies: int = 0
    _awaited: list[int] = field(default_factory=list)

    def await_store(self, tokens: list[int]) -> None:
        """Look for a live store whose tokens begin a prompt of `tokens`."""
        self._awaited = tokens

    @property
    def store_awaited(self) -> bool:
        """Whether that store has not come yet."""
        return bool(self._awaited)

    def take(self, topic: bytes | None, seq: int, payload: bytes, *, replayed: bool, now: float) -> None:
        """Count one batch.

        Args:
            topic: Of its message, None where there is none.
            seq: Its number.
            payload: What it says.
            replayed: Whether it is an old one.
            now: Seconds since the epoch.
        """
        if topic is not None:
            _note(self.topics, topic.decode("utf-8", "replace"))
        followed = self._follow(seq, replayed=replayed)
        try:
            batch = msgspec.msgpack.decode(payload)
            ts, events, rank = _parts(batch)
        except (ValueError, TypeError, LookupError, RecursionError):
            self.unreadable += 1
            return
        if not replayed and isinstance(ts, int | float):
            self.ahead_s = ts - now
        if isinstance(rank, int):
            _note(self.ranks, rank)
        for event in events:
            self._event(event, replayed=replayed, followed=followed)

    def _follow(self, seq: int, *, replayed: bool) -> bool:
        """Count a batch by its number; whether it is the next one, so that it tells what is held."""
        if replayed:
            self.replayed += 1
            if self.first_seq is None:
                self.first_seq = self._next = seq
            if seq > self._next:
                self.missing += seq - self._next
                self._held = None
        else:
            self.live += 1
            if self.first_seq is not None and seq > self._next:
                self._held = None
        followed = seq == self._next
        self._next = max(self._next, seq + 1)
        return followed

    def _event(self, event: Any, *, replayed: bool, followed: bool) -> None:
        kind, said = _said(event)
        if kind not in _FIELDS:
            _note(self.unknown, kind[:64])
            return
        if kind == "AllBlocksCleared":
            if self._held is not None and followed:
                self._held, self._copies = {}, 0
            return
        hashes = said.get("block_hashes")
        if not isinstance(hashes, list):
            self.unreadable += 1
            return
        keys = [(said.get("medium"), said.get("group_idx"), each) for each in hashes if isinstance(each, int | bytes)]
        if kind == "BlockStored":
            self._note_store(said, len(keys), replayed=replayed)
        if self._held is None or not followed:
            return
        if kind == "BlockStored":
            self._hold(self._held, keys)
        else:
            for key in keys:
                self._release(self._held, key)

    def _note_store(self, said: dict[str, Any], blocks: int, *, replayed: bool) -> None:
        self.stored += blocks
        size, adapter, tokens = said.get("block_size"), said.get("lora_name"), said.get("token_ids")
        if isinstance(size, int) and said.get("kv_cache_spec_kind") in FULL_ATTENTION:
            _note(self.block_sizes, size)
        if isinstance(adapter, str) and adapter:
            _note(self.adapters, adapter)
        if not replayed and isinstance(tokens, list) and tokens and self._awaited[: len(tokens)] == tokens:
            self._awaited = []

    def _hold(self, held: dict[Any, int], keys: list[Any]) -> None:
        if len(keys) > 1 and all(key in held for key in keys):
            self.repeated += 1
        for key in keys:
            held[key] = held.get(key, 0) + 1
        self._copies += sum(_on_device(key) for key in keys)
        if self.first_seq == 0:
            self.most_held = max(self.most_held, self._copies)
        if len(held) > MAX_HELD:
            self._held = None

    def _release(self, held: dict[Any, int], key: Any) -> None:
        copies = held.get(key, 0)
        if copies and _on_device(key):
            self._copies -= 1
        if copies > 1:
            held[key] = copies - 1
        else:
            held.pop(key, None)


def _parts(batch: Any) -> tuple[Any, list[Any], Any]:
    """Timestamp, events and rank of a batch, which is a list or, in one version, a map."""
    if isinstance(batch, dict):
        ts, events, rank = batch["ts"], batch["events"], batch.get("data_parallel_rank")
    else:
        ts, events, rank = (*batch, None)[:3]
    if not isinstance(events, list):
        raise TypeError
    return ts, events, rank


def _said(event: Any) -> tuple[str, dict[str, Any]]:
    """Kind and fields of an event: a map since vLLM 0.24, an array before."""
    if isinstance(event, dict):
        return str(event.get("type")), event
    if isinstance(event, list) and event:
        kind = str(event[0])
        return kind, dict(zip(_FIELDS.get(kind, ()), event[1:], strict=False))
    return "no event", {}


def _on_device(key: Any) -> bool:
    """Whether the block of a key, which begins with its medium, takes room on the device."""
    return key[0] in (None, "GPU")


def _note(names: set[Any], name: Any) -> None:
    if len(names) < MAX_NAMES:
        names.add(name)
