"""The naive twin of the compiled event reader: typed, slow, and with another MessagePack parser.

vLLM has published two generations of events: up to 0.23 an event is an array whose first element names its kind, since
0.24 a map with a `type` key. Fields were only ever appended, so one positional layout covers every release:

    BlockStored   block_hashes, parent_block_hash, token_ids, block_size, lora_id | medium (0.10.2) | lora_name (0.14)
                  | extra_keys (0.17) | group_idx (0.20) | kv_cache_spec_kind, kv_cache_spec_sliding_window (0.22)
                  | locality (0.26)
    BlockRemoved  block_hashes | medium (0.10.2) | group_idx (0.20) | locality (0.26)

The batch around them is `[ts, [event, ...], data_parallel_rank?]` or a map of the same names. What is newer than this
reader is left out: unknown fields silently, unknown kinds and broken events one by one and counted.
"""

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import xxhash
from msgspec.msgpack import Decoder

from kvrouter_grpc.types import Tier
from reference.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvBatch, KvEvent

U64 = 0xFFFF_FFFF_FFFF_FFFF

TIERS: Mapping[str | None, Tier] = {
    None: Tier.DEVICE,
    "GPU": Tier.DEVICE,
    "DEVICE": Tier.DEVICE,
    "CPU": Tier.HOST,
    "CPU_PINNED": Tier.HOST,
    "CPU_TIER1": Tier.HOST,
    "CPU_TIER2": Tier.DISK,
    "DISK": Tier.DISK,
    "NVME": Tier.DISK,
    "STORAGE": Tier.DISK,
    "FS": Tier.DISK,
    "OBJ": Tier.REMOTE,
    "EXTERNAL": Tier.REMOTE,
    "NETWORK": Tier.REMOTE,
    "REMOTE": Tier.REMOTE,
    "SHARED": Tier.REMOTE,
}
"""An event's `medium` to the tier it means. A medium that is not here is no tier: claiming one would promise hits."""


class CodecError(Exception):
    """The engine's fault: a payload that is no event batch. The text names the part and never quotes the payload."""


MOST_EVENTS = 1 << 16  # per batch
MOST_BLOCKS = 1 << 20  # per event
LARGEST_BLOCK = 1 << 20  # tokens
LARGEST_KEYS = 1 << 16  # bytes of extra keys per block
LONGEST_NAME = 4096  # characters of LoRA names and cache salts
GROUPS = 64  # KV cache groups


def decode_batch(payload: bytes) -> KvBatch:
    """Read the third frame of an event message.

    Args:
        payload: msgpack, see the module's description.

    Returns:
        The batch with the events that could be read, in order; the others are counted in `skipped`.

    Raises:
        CodecError: The payload is no event batch.
    """
    if not payload:
        raise CodecError("the payload is empty")
    try:
        batch = (_BATCH_MAP if _is_map(payload[0]) else _BATCH_ARRAY).decode(payload)
        count, _ = _array_header(memoryview(batch.events))
        if count > MOST_EVENTS:
            raise CodecError(f"the batch has {count} events, more than {MOST_EVENTS}")
        raw_events = _RAW_LIST.decode(batch.events)
    except _UNREADABLE:
        # The parser's own text may quote the payload, so it stays here.
        raise CodecError("the payload is not a KV event batch [ts, events, data_parallel_rank]") from None
    if not math.isfinite(batch.ts):
        raise CodecError("ts is not a finite number")
    events: list[KvEvent] = []
    for raw in raw_events:
        try:
            events.append(_read_event(raw))
        except _UNREADABLE:
            continue
    return KvBatch(batch.ts, events, batch.data_parallel_rank, len(raw_events) - len(events))


# --- the wire ------------------------------------------------------------------------------------------------------

# Everything msgspec and array() raise on bytes that do not fit: text that is not UTF-8 (UnicodeDecodeError is a
# ValueError), nesting (RecursionError), numbers out of range (OverflowError), and our own ValueErrors below.
_UNREADABLE = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)

_Hash = int | bytes

# The ranges are told to the parser, which then looks at a field as often as it is said, as the compiled one does.
_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_BlockSize = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_BLOCK)]
_Group = Annotated[int, msgspec.Meta(ge=0, lt=GROUPS)]


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: msgspec.Raw
    data_parallel_rank: int | None = None


class _BatchMap(_Batch, array_like=False):
    pass


class _Stored(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None = None
    token_ids: list[_Token] | None = None
    block_size: _BlockSize | None = None
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: _Group | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _StoredMap(_Stored, array_like=False, tag_field="type", tag="BlockStored"):
    pass


class _Removed(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[_Hash]
    medium: str | None = None
    group_idx: _Group | None = None
    locality: str | None = None


class _RemovedMap(_Removed, array_like=False, tag_field="type", tag="BlockRemoved"):
    pass


class _Cleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class _ClearedMap(_Cleared, array_like=False, tag_field="type", tag="AllBlocksCleared"):
    pass


_BATCH_ARRAY = Decoder(_Batch)
_BATCH_MAP = Decoder(_BatchMap)
_EVENT_ARRAY = Decoder(_Stored | _Removed | _Cleared)
_EVENT_MAP = Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_RAW_LIST = Decoder(list[msgspec.Raw])
_EXTRA_KEY: Decoder[str | tuple[str, int]] = Decoder(str | tuple[str, int])

_NIL = 0xC0
_FIXARRAY, _ARRAY16, _ARRAY32 = 0x90, 0xDC, 0xDD
_FIXMAP, _MAP16, _MAP32 = 0x80, 0xDE, 0xDF


def _is_map(first_byte: int) -> bool:
    return first_byte & 0xF0 == _FIXMAP or first_byte in (_MAP16, _MAP32)


def _array_header(raw: memoryview) -> tuple[int, int]:
    """Elements that a msgpack array claims to have, before any is read, and bytes before the first.

    Raises:
        ValueError: It is no array.
    """
    first = raw[0]
    if first & 0xF0 == _FIXARRAY:
        return first & 0x0F, 1
    if first == _ARRAY16:
        return int.from_bytes(raw[1:3]), 3
    if first == _ARRAY32:
        return int.from_bytes(raw[1:5]), 5
    raise ValueError("not an array")


# --- events --------------------------------------------------------------------------------------------------------


def _xxh3(data: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


def _read_event(raw: msgspec.Raw) -> KvEvent:
    event = (_EVENT_MAP if _is_map(memoryview(raw)[0]) else _EVENT_ARRAY).decode(raw)
    if isinstance(event, _Stored):
        return _stored(event)
    if isinstance(event, _Removed):
        hashes = _hashes(event.block_hashes)
        return BlocksRemoved(hashes, _tier(event.medium, event.locality), _group(event.group_idx))
    return CacheCleared()


def _stored(event: _Stored) -> BlocksStored:
    hashes = _hashes(event.block_hashes)
    tier = _tier(event.medium, event.locality)
    block_size = event.block_size or 0
    if not 0 <= block_size <= LARGEST_BLOCK:
        raise ValueError("block_size")
    tokens = array("I", event.token_ids or ())
    if tokens and not block_size:
        raise ValueError("token_ids without block_size")
    lora_name = event.lora_name or ""
    if not lora_name and event.lora_id is not None:
        lora_name = f"lora_id:{event.lora_id}"
    extra = memoryview(event.extra_keys)
    salt, mm_hashes = "", _NO_MM
    if tokens:
        if len(tokens) // block_size > len(hashes) or (tier is not Tier.DEVICE and not _told(extra)):
            # Tokens that would be filed under the wrong name. A sliding-window group stores the blocks of its window
            # but tells the tokens of all, and an offloading tier does not tell the salt of its blocks. Without tokens
            # such blocks are named by what another group or tier said of the same hashes, or not at all.
            tokens = array("I")
        else:
            salt, mm_hashes = _extra_keys(extra, event, len(hashes))
            hashes = hashes[: len(tokens) // block_size]
            if not hashes:
                raise ValueError("token_ids covers no block")
            del tokens[len(hashes) * block_size :]
    if len(lora_name) > LONGEST_NAME or len(salt) > LONGEST_NAME:
        raise ValueError("lora_name or cache_salt")
    return BlocksStored(
        hashes=hashes,
        parent=None if event.parent_block_hash is None else _hash(event.parent_block_hash),
        tokens=tokens,
        block_size=block_size,
        lora_name=lora_name,
        cache_salt=salt,
        mm_hashes=mm_hashes,
        tier=tier,
        group=_group(event.group_idx),
        kind=event.kv_cache_spec_kind or "",
        window=event.kv_cache_spec_sliding_window,
    )


def _hashes(values: list[_Hash]) -> "array[int]":
    if len(values) > MOST_BLOCKS:
        raise ValueError("block_hashes")
    try:
        return array("Q", values)  # type: ignore[arg-type]  # bytes raise TypeError
    except (TypeError, OverflowError):
        return array("Q", map(_hash, values))


def _hash(value: _Hash) -> int:
    """The 64 bits by which a block is known: an integer's bit pattern, the end of a digest.

    vLLM's integer hashes are the low 64 bits of the digests it sends in bytes mode, so both forms are equal.
    """
    if isinstance(value, int):
        return value & U64
    if len(value) < 8:
        raise ValueError("block hash")
    return int.from_bytes(value[-8:])


def _tier(medium: str | None, locality: str | None) -> Tier:
    if medium is not None and not medium.isascii():  # the long s, for one, is "S" in upper case
        raise ValueError("medium")
    tier = TIERS.get(medium if medium is None else medium.upper())
    if tier is None or locality not in (None, "LOCAL", "REMOTE"):
        raise ValueError("medium or locality")
    return Tier.REMOTE if locality == "REMOTE" else tier


def _group(index: int | None) -> int:
    if not 0 <= (index or 0) < GROUPS:
        raise ValueError("group_idx")
    return index or 0


# --- extra keys ----------------------------------------------------------------------------------------------------

_NO_MM: Mapping[int, Sequence[int]] = {}
_HEX64 = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def _told(extra: memoryview) -> bool:
    """Whether the engine gave `extra_keys` at all."""
    return len(extra) > 0 and extra[0] != _NIL


def _extra_keys(extra: memoryview, event: _Stored, blocks: int) -> tuple[str, Mapping[int, Sequence[int]]]:
    """Take apart what the engine hashed into each block beside its tokens: LoRA name, images, salt, embeddings.

    Returns:
        The cache salt, "" for none, and the hashes of the multimodal objects by block index. A key of unknown kind
        becomes such a hash too: its blocks then match no prompt, rather than a wrong one.
    """
    if not _told(extra):
        return "", _NO_MM
    count, header = _array_header(extra)
    if count != blocks:
        raise ValueError("extra_keys")
    if extra[header:] == b"\xc0" * blocks:  # the common case: nothing beside the tokens
        return "", _NO_MM
    salt = ""
    mm_hashes: dict[int, list[int]] = {}
    # An image has been an (id, offset) pair since 0.18; before it was a bare id. `group_idx` dates the event.
    bare_ids = event.group_idx is None
    for block, raw in enumerate(_RAW_LIST.decode(extra)):
        data = memoryview(raw)
        if data[0] == _NIL:
            continue
        if len(data) > LARGEST_KEYS:
            raise ValueError("extra_keys")
        lora_name = event.lora_name
        for raw_key in _RAW_LIST.decode(raw):
            try:
                key = _EXTRA_KEY.decode(raw_key)
            except _UNREADABLE:
                mm_hashes.setdefault(block, []).append(_xxh3(bytes(raw_key), 0))
                continue
            if not isinstance(key, str):
                mm_hashes.setdefault(block, []).append(_mm_hash(key[0]))
            elif key == lora_name:
                lora_name = None  # once per block: a salt may be spelled like the adapter
            elif (
                block == 0 and event.parent_block_hash is None and not salt and not (bare_ids and _HEX64.fullmatch(key))
            ):
                salt = key
            else:
                mm_hashes.setdefault(block, []).append(_mm_hash(key))
    return salt, mm_hashes


def _mm_hash(identifier: str) -> int:
    """The u64 of a multimodal object: the head of a digest given in hex, else a hash of the name (Dynamo's rule)."""
    if _HEX64.fullmatch(identifier):
        return int(identifier[:16], 16)
    return _xxh3(identifier.encode(), 0)
