"""The index of an endpoint as bytes, so that a router that starts knows what one before it knew.

    head   magic, version, block size, seconds since the epoch, endpoint; checksum
    part   of each target: length, checksum, then where its event stream stood, its KV cache groups and what they held
    tail   length 0, number of parts

Each part is true of one moment of its own stream: it is made in one step, between two batches. A router that has read
it asks the engine what happened since, and the same question proves that the engine is still the same process; see
`events/sequence.py`. Engine hashes are in it, for removals name blocks by them. Orphans are not: their target's
coverage is partial then. All numbers are little-endian, checksums XXH3-64, and a damaged byte anywhere makes the whole
unreadable.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from kvrouter_grpc.core import hash_bytes
from kvrouter_grpc.routing.groups import KINDS, GroupFacts, HeldSlot
from kvrouter_grpc.routing.index import KvIndex
from kvrouter_grpc.routing.stream import StreamPosition
from kvrouter_grpc.types import Target, Tier

MAGIC = b"KVROUTER"
VERSION = 1
HIGHEST_SEQ = 2**63 - 1  # the engines' numbers are signed
MOST_PARTS = 1 << 20
MOST_SLOTS = 256  # of one part, and groups

_TIERS = tuple(Tier)
_HEAD = struct.Struct("<8sIIdI")  # magic, version, block size, created at, bytes of the endpoint
_FRAME = struct.Struct("<QQ")  # length, checksum
# Worker, rank, slots, groups; next seq, content, known, lost << 1 | partial; started at.
_STREAM = struct.Struct("<QIIQQQQQd")
_GROUP = struct.Struct("<III")  # kind, window and block size in tokens
_SLOT = struct.Struct("<IIQ")  # tier, group, length
_CHECKSUM = struct.Struct("<Q")


class SnapshotError(Exception):
    """The snapshot cannot be used; the text says why."""


class Part(NamedTuple):
    """What was known of one target at one moment."""

    target: Target
    position: StreamPosition
    groups: tuple[GroupFacts, ...]  # the KV cache groups of its model
    started_at: float | None  # of the engine's process, as it said itself
    slots: tuple[HeldSlot, ...]

    @classmethod
    def of(cls, index: KvIndex, target: Target, started_at: float | None) -> Self | None:
        """The target as it is now; None when its stream could not be taken up again."""
        status = index.stream_if_known(target)
        position = status.position() if status is not None else None
        if position is None:
            return None
        if index.orphans(target):
            position = position._replace(partial=True)
        groups, slots = index.write(target)
        return cls(target, position, groups, started_at, slots)

    def restore(self, index: KvIndex, started_at: float | None) -> None:
        """Let the target, which holds nothing yet, hold this, and its stream go on from there.

        Raises:
            SnapshotError: It is of another process, or damaged; nothing was changed.
        """
        if None not in (started_at, self.started_at) and started_at != self.started_at:
            raise SnapshotError("the engine was restarted since")
        try:
            index.restore(self.target, self.position, self.groups, self.slots)
        except ValueError:
            raise SnapshotError("it is damaged") from None

    def encode(self) -> bytes:
        """The part as bytes."""
        position = self.position
        pieces = [
            _STREAM.pack(
                *self.target,
                len(self.slots),
                len(self.groups),
                position.next_seq,
                position.content,
                position.known,
                position.lost << 1 | position.partial,
                math.nan if self.started_at is None else self.started_at,
            )
        ]
        pieces += [_GROUP.pack(KINDS.index(kind), window, size) for kind, window, size in self.groups]
        for group, tier, data in self.slots:
            pieces += (_SLOT.pack(_TIERS.index(tier), group, len(data)), data)
        return b"".join(pieces)

    @classmethod
    def decode(cls, body: memoryview) -> Self:
        """Read a part.

        Raises:
            SnapshotError: It is none.
        """
        cursor = _Cursor(body)
        worker_id, rank, count, group_count, next_seq, content, known, faults, started_at = cursor.take(_STREAM)
        if max(count, group_count) > MOST_SLOTS or not 0 < known <= next_seq <= HIGHEST_SEQ:
            raise SnapshotError("it is damaged")
        groups = []
        for _ in range(group_count):
            kind, window, block_size = cursor.take(_GROUP)
            if kind >= len(KINDS):
                raise SnapshotError("it is damaged")
            groups.append(GroupFacts(KINDS[kind], window, block_size))
        slots = []
        for _ in range(count):
            tier, group, length = cursor.take(_SLOT)
            if tier >= len(_TIERS):
                raise SnapshotError("it is damaged")
            slots.append(HeldSlot(group, _TIERS[tier], bytes(cursor.bytes(length))))
        cursor.end()
        return cls(
            Target(worker_id, rank),
            StreamPosition(next_seq, content, known, partial=bool(faults & 1), lost=faults >> 1),
            tuple(groups),
            None if math.isnan(started_at) else started_at,
            tuple(slots),
        )


@dataclass(slots=True)
class Snapshot:
    """The parts that were read and that no target has taken yet."""

    endpoint: str
    block_size: int
    created_at: float  # seconds since the epoch
    parts: dict[Target, Part]

    def restore(self, index: KvIndex, target: Target, started_at: float | None) -> bool:
        """Let a target hold what it held, once; see `Part.restore`. False: the snapshot has nothing of it.

        Args:
            index: Knows the target, and nothing of what it holds.
            target: The target.
            started_at: When its engine's process started, as it says itself; None when it does not.

        Raises:
            SnapshotError: What it held is of no use.
        """
        part = self.parts.pop(target, None)
        if part is None:
            return False
        if self.block_size != index.block_size:
            known = f"the router hashes blocks of {index.block_size}" if index.block_size else "it is not known yet"
            raise SnapshotError(f"its block size is {self.block_size}, but {known}")
        part.restore(index, started_at)
        return True

    @classmethod
    def read(cls, data: bytes, endpoint: str) -> Self:
        """Read a whole snapshot.

        Args:
            data: The bytes; they may come from anywhere.
            endpoint: Whose it must be.

        Raises:
            SnapshotError: It is damaged, of another version or of another endpoint.
        """
        cursor = _Cursor(memoryview(data))
        magic, version, block_size, created_at, size = cursor.take(_HEAD)
        if magic != MAGIC:
            raise SnapshotError("it is no snapshot")
        if version != VERSION:
            raise SnapshotError(f"it has version {version}, this router reads version {VERSION}")
        name = bytes(cursor.bytes(size))
        if cursor.take(_CHECKSUM)[0] != hash_bytes(_HEAD.pack(magic, version, block_size, created_at, size) + name):
            raise SnapshotError("it is damaged")
        if name != endpoint.encode():
            raise SnapshotError("it is of another endpoint")
        parts = [Part.decode(body) for body in _bodies(cursor)]
        return cls(endpoint, block_size, created_at, {part.target: part for part in parts})


def head(endpoint: str, block_size: int, created_at: float) -> bytes:
    """How a snapshot begins."""
    name = endpoint.encode()
    whole = _HEAD.pack(MAGIC, VERSION, block_size, created_at, len(name)) + name
    return whole + _CHECKSUM.pack(hash_bytes(whole))


def framed(part: Part) -> bytes:
    """A part, as it stands in a snapshot."""
    body = part.encode()
    return _FRAME.pack(len(body), hash_bytes(body)) + body


def tail(parts: int) -> bytes:
    """How a snapshot of that many parts ends."""
    return _FRAME.pack(0, parts)


def _bodies(cursor: "_Cursor") -> Iterator[memoryview]:
    count = 0
    while True:
        length, checksum = cursor.take(_FRAME)
        if not length:
            break
        body = cursor.bytes(length)
        if hash_bytes(body) != checksum:
            raise SnapshotError("it is damaged")
        count += 1
        yield body
    if checksum != count or count > MOST_PARTS:
        raise SnapshotError("it is damaged")
    cursor.end()


class _Cursor:
    """Reads from the front of some bytes."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, form: struct.Struct) -> tuple:  # type: ignore[type-arg]  # of what the form says
        return form.unpack(self.bytes(form.size))

    def bytes(self, length: int) -> memoryview:
        if length > len(self._data) - self._at:
            raise SnapshotError("it is cut off")
        self._at += length
        return self._data[self._at - length : self._at]

    def end(self) -> None:
        if self._at != len(self._data):
            raise SnapshotError("it is damaged")
