"""Requests taken apart on the wire say what protobuf's own parser says of the same bytes, whatever the bytes.

KVROUTER_FUZZ_REQUESTS sets how many (100,000 by default); KVROUTER_FUZZ_SEED which ones.
"""

import os
import random
import struct
from collections.abc import Iterator

import pytest
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from kvrouter_grpc._gen import router_pb2
from kvrouter_grpc.core import read_plain
from kvrouter_grpc.server.incoming import Asked, AskedReader, Batch, Unreadable, batch_reader

REQUESTS = int(os.environ.get("KVROUTER_FUZZ_REQUESTS", "100000"))
SEED = int(os.environ.get("KVROUTER_FUZZ_SEED", "20260101"))

KINDS = (router_pb2.GenerateRequest, router_pb2.BestWorkerIdRequest, router_pb2.GetOverlapScoresRequest)
BATCH = router_pb2.BestWorkerIdBatchRequest
MOST = 6
READ_ONE = AskedReader(router_pb2.BestWorkerIdRequest)

# Bytes that mean something on the wire: tags of field 1 with every wire type, ends of groups, long varints.
TELLING = bytes.fromhex("0008090a0b0c0d1213141a1b1c72757f80818aff")


def varint(rng: random.Random, value: int, most: int = 10) -> bytes:
    """A number, now and then in more bytes than it needs."""
    groups = []
    while True:
        groups.append(value & 0x7F)
        value >>= 7
        if not value:
            break
    if rng.random() < 0.05:
        groups += [0] * rng.randrange(most + 1 - len(groups))
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


def tag(rng: random.Random, number: int, wire_type: int) -> bytes:
    return varint(rng, number << 3 | wire_type, 5)


def sized(rng: random.Random, data: bytes) -> bytes:
    return varint(rng, len(data), 5) + data


def field(rng: random.Random, number: int, depth: int = 0) -> bytes:
    """A field of any wire type, as an unknown one may have."""
    kind = rng.choice((0, 0, 1, 2, 2, 5, 3))
    head = tag(rng, number, kind)
    if kind == 0:
        return head + varint(rng, rng.choice((0, 1, 127, 128, 2**32, 2**64 - 1)))
    if kind == 1:
        return head + rng.randbytes(8)
    if kind == 2:
        return head + sized(rng, rng.randbytes(rng.randrange(12)))
    if kind == 5:
        return head + rng.randbytes(4)
    inner = b""
    if depth < rng.choice((2, 4, 120)):
        inner = b"".join(field(rng, rng.choice((1, 2, 99)), depth + 1) for _ in range(rng.choice((0, 1, 1, 2))))
    return head + inner + tag(rng, number, 4)


def part(rng: random.Random) -> bytes:
    """One field of a request."""
    kind = rng.randrange(10)
    if kind < 3:
        ids = [rng.choice((0, 1, 2**31, 2**32 - 1, rng.getrandbits(32))) for _ in range(rng.choice((0, 1, 2, 9)))]
        return tag(rng, 1, 2) + sized(rng, struct.pack(f"<{len(ids)}I", *ids))
    if kind < 5:
        return tag(rng, 1, 5) + rng.randbytes(4)
    if kind == 5:  # a text: fields 2 to 5 are texts, or bytes that are none
        return tag(rng, rng.randrange(2, 6), 2) + sized(rng, rng.choice((b"", b"a", "é€".encode(), b"\xff")))
    if kind == 6:  # field 1 with another wire type: unknown
        return field(rng, 1)
    return field(rng, rng.choice((3, 6, 7, 15, 16, 18, 100, 2047, 2048, 2**29 - 1)))


def request(rng: random.Random) -> bytes:
    return b"".join(part(rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 6))))


def mutated(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.choice(TELLING)
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 6)]
        elif kind == 3:
            changed[at:at] = bytes([rng.choice(TELLING)]) * rng.choice((1, 2, 11))
        else:
            del changed[at:]
    return bytes(changed)


def messages(count: int, seed: int) -> Iterator[tuple[random.Random, bytes]]:
    rng = random.Random(seed)
    for _ in range(count):
        data = request(rng)
        yield rng, mutated(rng, data) if rng.random() < 0.5 else data


def parsed(kind, data: bytes):
    """What protobuf says: the message without its token ids, and these; None when it is none."""
    try:
        message = kind.FromString(data)
    except DecodeError:
        return None
    ids = list(message.token_ids)
    message.ClearField("token_ids")
    return message.SerializeToString(deterministic=True), ids


def read(asked: Asked | Unreadable):
    """The same of what was read."""
    if isinstance(asked, Unreadable):
        return None
    assert not asked.message.token_ids
    return asked.message.SerializeToString(deterministic=True), asked.token_ids.tolist()


def test_a_request_says_what_protobuf_says() -> None:
    readers = {kind: AskedReader(kind) for kind in KINDS}
    good = with_ids = 0
    for rng, data in messages(REQUESTS, SEED):
        kind = rng.choice(KINDS)
        wanted = parsed(kind, data)
        assert read(readers[kind](data)) == wanted, (kind.DESCRIPTOR.name, data.hex())
        good += wanted is not None
        with_ids += bool(wanted and wanted[1])
    assert REQUESTS // 4 < good < REQUESTS * 9 // 10  # of both kinds are many
    assert with_ids > REQUESTS // 8


PLAIN = {"token_ids", "endpoint", "model", "request_id"}


def right(message) -> bool:
    """Whether nothing is wrong with a request that has plain fields only."""
    name = message.request_id
    return (
        0 < len(message.token_ids) <= 9
        and max(message.token_ids) < 2**31
        and len(message.model.encode()) <= 256
        and (not name or (name.isascii() and name.isprintable() and " " not in name and len(name) <= 256))
    )


def test_a_plain_request_says_what_protobuf_says() -> None:
    kind = router_pb2.BestWorkerIdRequest
    texts = ("", "a", "é€", "two words", "x" * 256, "x" * 257)
    taken = left = 0
    for rng, data in messages(REQUESTS // 2, SEED + 3):
        if rng.random() < 0.3:  # nothing but plain fields, now and then wrong ones
            ids = [rng.choice((0, 7, 2**31 - 1, 2**31)) for _ in range(rng.choice((0, 1, 9, 10)))]
            made = kind(
                token_ids=ids, endpoint=rng.choice(texts), model=rng.choice(texts), request_id=rng.choice(texts)
            )
            data = made.SerializeToString()  # noqa: PLW2901
            assert (read_plain(data, 9, 2**31) is not None) == right(made), data.hex()
        before, after = rng.randbytes(rng.randrange(4)), rng.randbytes(rng.randrange(4))
        found = read_plain(before + data + after, 9, 2**31, len(before), len(before) + len(data))
        if found is None:
            left += 1
            continue
        message = kind.FromString(data)
        said = (list(message.token_ids), message.endpoint, message.model, message.request_id)
        assert (found[0].tolist(), *found[1:]) == said
        assert right(message)
        assert {field.name for field, _ in message.ListFields()} <= PLAIN
        assert not UnknownFieldSet(message)
        taken += 1
    assert taken > REQUESTS // 100
    assert left > REQUESTS // 100


def test_parts_that_are_not_there_are_refused() -> None:
    for start, stop in ((-1, 2), (3, 2), (0, 5), (5, -1)):
        with pytest.raises(ValueError, match="no part"):
            read_plain(b"1234", 1, 1, start, stop)
        with pytest.raises(ValueError, match="no part"):
            READ_ONE(b"1234", start, stop)


def requests_of(batch: Batch) -> list[Asked | Unreadable]:
    return [READ_ONE(batch.data, start, stop) for start, stop in batch.spans]


def test_a_batch_says_what_protobuf_says_of_each_request() -> None:
    reader = batch_reader(MOST)
    good = beyond = 0
    for rng, _ in messages(REQUESTS // 10, SEED + 1):
        requests = [request(rng) for _ in range(rng.randrange(MOST + 3))]
        if rng.random() < 0.3 and requests:
            requests[rng.randrange(len(requests))] = mutated(rng, rng.choice(requests))
        data = b""
        for each in requests:
            if rng.random() < 0.1:
                data += field(rng, rng.choice((2, 16, 3000)))
            data += tag(rng, 1, 2) + sized(rng, each)
        batch = reader(data)
        if isinstance(batch, Unreadable):  # groups in groups, too deep
            assert parsed(BATCH, data) is None, data.hex()
            continue
        assert batch.total == len(requests)
        assert [read(each) for each in requests_of(batch)] == [
            parsed(router_pb2.BestWorkerIdRequest, each) for each in requests[:MOST]
        ], data.hex()
        if all(not isinstance(each, Unreadable) for each in requests_of(batch)) and batch.total <= MOST:
            assert len(BATCH.FromString(data).requests) == batch.total
            good += 1
        beyond += batch.total > MOST
    assert good > REQUESTS // 100
    assert beyond > REQUESTS // 100


def test_bytes_that_are_no_batch_are_refused_as_protobuf_does() -> None:
    reader = batch_reader(MOST)
    refused = 0
    for rng, data in messages(REQUESTS // 10, SEED + 2):
        broken = mutated(rng, tag(rng, 1, 2) + sized(rng, data))
        batch = reader(broken)
        whole = not isinstance(batch, Unreadable) and all(isinstance(each, Asked) for each in requests_of(batch))
        if isinstance(batch, Batch) and batch.total > MOST:
            continue
        try:
            BATCH.FromString(broken)
            assert whole, broken.hex()
        except DecodeError:
            assert not whole, broken.hex()
            refused += 1
    assert refused > REQUESTS // 100
