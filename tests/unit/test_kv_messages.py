"""Messages that the recordings do not show: every field's rule, every limit, and bytes that are no batch.

The typed twin says here what a message means; each message also goes through the compiled feed, which must do the same.
"""

import struct
from array import array
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter_grpc.core import BatchError, KvFeed
from kvrouter_grpc.types import Tier
from reference.feeds import FeedPair
from reference.kv_codec import TIERS, CodecError
from reference.kv_codec import decode_batch as twin_decode_batch
from reference.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvBatch

encode = msgspec.msgpack.encode
HEX = "00ff00ff00ff00ff" + "ab" * 24


def decode_batch(payload: bytes) -> KvBatch:
    """What the twin makes of a message, after the compiled feed has been seen to do the same with it."""
    pair = FeedPair(targets=1)
    pair.apply(0, payload)
    pair.apply(0, payload)  # everything is a duplicate now, or an orphan for the second time
    pair.finish()
    return twin_decode_batch(payload)


def decode(*events: Any) -> KvBatch:
    return decode_batch(encode([1.5, list(events), 0]))


def stored(blocks: int = 2, **changes: Any) -> dict[str, Any]:
    event = {
        "type": "BlockStored",
        "block_hashes": list(range(1, blocks + 1)),
        "parent_block_hash": None,
        "token_ids": list(range(4 * blocks)),
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * blocks,
        "group_idx": 0,
        **changes,
    }
    return {key: value for key, value in event.items() if value != "absent"}


def one(event: Any) -> BlocksStored:
    batch = decode(event)
    assert batch.skipped == 0
    (decoded,) = batch.events
    assert isinstance(decoded, BlocksStored)
    return decoded


# --- the batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "dp_rank"),
    [
        ([2.5, [["AllBlocksCleared"]]], None),
        ([2.5, [["AllBlocksCleared"]], None], None),
        ([2.5, [["AllBlocksCleared"]], 3], 3),
        ([2.5, [["AllBlocksCleared"]], 3, "a later field"], 3),
        ({"ts": 2.5, "events": [{"type": "AllBlocksCleared"}]}, None),
        ({"ts": 2.5, "events": [{"type": "AllBlocksCleared"}], "data_parallel_rank": 3, "later": 1}, 3),
    ],
)
def test_batch_shapes(batch: Any, dp_rank: int | None) -> None:
    assert decode_batch(encode(batch)) == KvBatch(2.5, [CacheCleared()], dp_rank)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode(None),
        encode([]),
        encode([1.0]),
        encode([1.0, None]),
        encode([1.0, {}]),
        encode([1.0, "events"]),
        encode(["now", []]),
        encode([float("nan"), []]),
        encode([float("inf"), []]),
        encode([1.0, [], "rank"]),
        encode({"ts": 1.0}),
        encode({"events": []}),
        encode([1.0, []]) + b"\x00",
        encode([1.0, []])[:-1],
        b"\x92" + encode(1.0) + b"\xdd\xff\xff\xff\xff",
        b"\x91" * 200_000,
        b"\x81\xa2\xff\xfe\x01",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
    ids=range(20),
)
def test_what_is_no_batch(payload: bytes) -> None:
    with pytest.raises(CodecError):
        decode_batch(payload)
    feed = KvFeed(lambda *_: None, lambda *_: 0, lambda _: None)
    with pytest.raises(BatchError) as caught:
        feed.apply(payload)
    assert "HTTP" not in str(caught.value)


def test_a_limit_on_events() -> None:
    cleared = b"\x91\xb0AllBlocksCleared"
    most = 1 << 16
    payload = b"\x92\x01\xdd" + most.to_bytes(4) + cleared * most
    assert len(decode_batch(payload).events) == most
    with pytest.raises(CodecError, match="65537 events, more than 65536"):
        decode_batch(b"\x92\x01\xdd" + (most + 1).to_bytes(4) + cleared * (most + 1))


def test_a_claim_of_many_events_is_refused_before_they_are_built() -> None:
    count = 1 << 24
    with pytest.raises(CodecError, match="16777216 events"):
        decode_batch(b"\x92" + encode(1.0) + b"\xdd" + count.to_bytes(4) + b"\xc0" * count)


# --- events are left out one by one --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        None,
        7,
        "BlockStored",
        [],
        {},
        ["BlockMoved", [1]],
        {"type": "BlockMoved", "block_hashes": [1]},
        {"block_hashes": [1]},
        {"type": 3},
        {"type": "BlockRemoved"},
        {"type": "BlockRemoved", "block_hashes": 1},
        {"type": "BlockRemoved", "block_hashes": ["1"]},
        {"type": "BlockRemoved", "block_hashes": [1.5]},
        {"type": "BlockRemoved", "block_hashes": [True]},
        {"type": "BlockRemoved", "block_hashes": [b"7 bytes"]},
        {"type": "BlockRemoved", "block_hashes": [1], "medium": "TAPE"},
        {"type": "BlockRemoved", "block_hashes": [1], "locality": "ELSEWHERE"},
        stored(token_ids=[[1, 2], [2, 3]] * 4),  # pairs, as speculative decoding would tell them
        stored(token_ids=[-1] * 8),
        stored(token_ids=[2**32] * 8),
        stored(token_ids=[1, 2, 3]),
        stored(token_ids={"1": 2}),
        stored(block_size=0),
        stored(block_size=-4),
        stored(block_size=2**30),
        stored(medium=5),
        stored(parent_block_hash=b"short"),
        stored(extra_keys=[None]),
        stored(extra_keys=[None] * 3),
        stored(extra_keys=5),
        stored(extra_keys=["s1", None]),
        stored(extra_keys=[["x" * 70_000], None]),
        stored(lora_name="n" * 5_000),
        stored(extra_keys=[["n" * 5_000], None]),
    ],
    ids=str,
)
def test_a_broken_event_leaves_the_others(broken: Any) -> None:
    removed = ["BlockRemoved", [9]]
    batch = decode(removed, broken, removed)
    assert batch.events == [BlocksRemoved(array("Q", [9]))] * 2
    assert batch.skipped == 1


def test_depth_costs_nothing() -> None:
    """The twin's parser recurses and refuses the message; the compiled one leaves out the event."""
    deep = b"\x91" * 200_000 + b"\x90"
    feed = KvFeed(lambda *_: None, lambda *_: 0, lambda _: None)
    applied = feed.apply(b"\x92\x01\x93" + b"\x91\xb0AllBlocksCleared" + deep + encode(["BlockRemoved", [9]]))
    assert (applied.cleared, applied.skipped, applied.removed) == (True, 1, 1)
    with pytest.raises(BatchError):
        feed.apply(b"\x92\x01" + b"\x91" * 200_000)


def test_an_event_that_is_not_utf8_is_left_out() -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"}
    payload = encode([1.0, [removed, removed], 0]).replace(b"GPU", b"\xff\xfe\xfd", 1)
    assert decode_batch(payload) == KvBatch(1.0, [BlocksRemoved(array("Q", [1]))], 0, skipped=1)


def test_a_block_limit() -> None:
    names = b"\xdd" + ((1 << 20) + 1).to_bytes(4) + b"\x01" * ((1 << 20) + 1)
    batch = decode_batch(b"\x92\x01\x92" + b"\x92\xacBlockRemoved" + names + encode(stored()))
    assert (len(batch.events), batch.skipped) == (1, 1)


def test_later_fields_are_ignored() -> None:
    plain = one(stored())
    assert one(stored(session_id="s", ownership="fs", lookahead_token_ids=[1], anything={"a": [1]})) == plain
    positional = ["BlockStored", [1, 2], None, list(range(8)), 4, None, "GPU", None, [None] * 2, 0, None, None, None]
    assert one(positional) == plain
    assert one([*positional, "later", {"a": 1}]) == plain


def test_the_shortest_layouts() -> None:
    assert one(["BlockStored", [1, 2], None, list(range(8)), 4, None]) == one(stored())
    assert decode(["BlockRemoved", [1]]).events == [BlocksRemoved(array("Q", [1]))]


# --- fields --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        (0, 0),
        (2**64 - 1, 2**64 - 1),
        (-1, 2**64 - 1),
        (-(2**63), 2**63),
        ((123456789).to_bytes(8), 123456789),
        (b"\xff" * 24 + (123456789).to_bytes(8), 123456789),
        (b"\x01" + (5).to_bytes(8), 5),
    ],
)
def test_hashes_are_64_bits_whatever_their_form(told: int | bytes, meant: int) -> None:
    event = one(stored(block_hashes=[told, 1], parent_block_hash=told))
    assert event.hashes == array("Q", [meant, 1])
    assert event.parent == meant
    assert decode(["BlockRemoved", [told]]).events == [BlocksRemoved(array("Q", [meant]))]


@pytest.mark.parametrize("medium", [*TIERS, "gpu", "cpu"])
def test_tiers(medium: str | None) -> None:
    tier = TIERS[medium if medium is None else medium.upper()]
    assert one(stored(medium=medium)).tier is tier
    assert decode({"type": "BlockRemoved", "block_hashes": [1], "medium": medium}).events == [
        BlocksRemoved(array("Q", [1]), tier)
    ]


def test_locality() -> None:
    assert one(stored(medium="STORAGE", locality="LOCAL")).tier is Tier.DISK
    assert one(stored(medium="STORAGE", locality="REMOTE")).tier is Tier.REMOTE
    assert one(stored(medium="GPU", locality=None)).tier is Tier.DEVICE


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [(8, 2), (7, 1), (4, 1), (9, 2), (11, 2)],
)
def test_only_blocks_whose_tokens_are_told_are_stored(tokens: int, blocks: int) -> None:
    event = one(stored(token_ids=list(range(tokens))))
    assert event.hashes == array("Q", range(1, blocks + 1))
    assert event.tokens == array("I", range(4 * blocks))


def test_more_tokens_than_blocks_name_no_block() -> None:
    """Of a sliding window only the end is stored, and which end is not told."""
    event = one(stored(token_ids=list(range(12)), kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=6))
    assert event.hashes == array("Q", [1, 2])
    assert event.tokens == array("I")
    assert (event.kind, event.window) == ("sliding_window", 6)


@pytest.mark.parametrize("changes", [{"block_size": 0}, {"block_size": None}, {"block_size": "absent"}, {}])
@pytest.mark.parametrize("tokens", [[], None, "absent"])
def test_blocks_without_tokens(changes: dict, tokens: Any) -> None:
    event = one(stored(token_ids=tokens, medium="CPU", extra_keys=None, **changes))
    assert event.hashes == array("Q", [1, 2])
    assert event.tokens == array("I")
    assert event.block_size == (0 if changes else 4)
    assert event.tier is Tier.HOST


def test_an_offloaded_block_whose_salt_is_not_told_is_not_named_by_its_tokens() -> None:
    assert one(stored(medium="CPU", extra_keys=None)).tokens == array("I")
    assert one(stored(medium="CPU", extra_keys="absent")).tokens == array("I")
    assert one(stored(medium="CPU")).tokens == array("I", range(8))


def test_adapters() -> None:
    assert one(stored(lora_id=3)).lora_name == "lora_id:3"
    named = one(stored(lora_id=3, lora_name="a", extra_keys=[["a"], ["a"]]))
    assert (named.lora_name, named.cache_salt, named.mm_hashes) == ("a", "", {})


# --- extra keys ----------------------------------------------------------------------------------------------------


def mm(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(), 0)


@pytest.mark.parametrize(
    ("changes", "salt", "mm_hashes"),
    [
        ({"extra_keys": [["s1"], None]}, "s1", {}),
        ({"extra_keys": [["a", "s1"], ["a"]], "lora_name": "a"}, "s1", {}),
        ({"extra_keys": [["a", "a"], ["a"]], "lora_name": "a"}, "a", {}),  # a salt spelled like the adapter
        ({"extra_keys": [["s1"], None], "parent_block_hash": 9}, "", {0: [mm("s1")]}),  # no first block, so no salt
        ({"extra_keys": [None, ["s1"]]}, "", {1: [mm("s1")]}),
        ({"extra_keys": [["s1", "s2"], None]}, "s1", {0: [mm("s2")]}),
        (
            {"extra_keys": [[["img", 0]], [["img", -4], ["other", 1]]]},
            "",
            {0: [mm("img")], 1: [mm("img"), mm("other")]},
        ),
        ({"extra_keys": [[[HEX, 3], "s1"], None]}, "s1", {0: [0x00FF00FF00FF00FF]}),
        ({"extra_keys": [[[HEX.upper(), 3]], None]}, "", {0: [0x00FF00FF00FF00FF]}),
        ({"extra_keys": [[HEX], None]}, HEX, {}),  # images are pairs in every release that tells the group
        ({"extra_keys": [[HEX], None], "group_idx": "absent"}, "", {0: [0x00FF00FF00FF00FF]}),
        ({"extra_keys": [["s1"], None], "group_idx": "absent"}, "s1", {}),
        ({"extra_keys": [[], None]}, "", {}),
        ({"extra_keys": None}, "", {}),
        ({"extra_keys": "absent"}, "", {}),
    ],
)
def test_extra_keys(changes: dict, salt: str, mm_hashes: dict) -> None:
    event = one(stored(**changes))
    assert (event.cache_salt, event.mm_hashes) == (salt, mm_hashes)


@pytest.mark.parametrize(
    "key", [b"embedding digest", 7, None, ["id"], ["id", 1.5], ["id", 1, 2], {"a": 1}, [[]]], ids=str
)
def test_a_key_of_unknown_kind_makes_its_block_match_nothing(key: Any) -> None:
    event = one(stored(extra_keys=[None, [key]]))
    assert event.mm_hashes == {1: [xxhash.xxh3_64_intdigest(encode(key), 0)]}


def test_a_nil_inside_a_key_is_not_an_absent_key() -> None:
    """Both are the same byte: only the length tells a list of nils from a nested one that ends in nils."""
    assert one(stored(extra_keys=[[None], None])).mm_hashes.keys() == {0}


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 70_000])
def test_every_size_of_array_header(blocks: int) -> None:
    plain = one(stored(blocks))
    assert len(plain.hashes) == blocks
    assert not plain.mm_hashes
    last = one(stored(blocks, parent_block_hash=5, extra_keys=[None] * (blocks - 1) + [["x"]]))
    assert last.mm_hashes == {blocks - 1: [mm("x")]}


FORMS = [
    (1 << 7, lambda number: bytes([number])),
    (1 << 7, lambda number: struct.pack(">Bb", 0xD0, number)),
    (1 << 8, lambda number: struct.pack(">BB", 0xCC, number)),
    (1 << 15, lambda number: struct.pack(">Bh", 0xD1, number)),
    (1 << 16, lambda number: struct.pack(">BH", 0xCD, number)),
    (1 << 31, lambda number: struct.pack(">Bi", 0xD2, number)),
    (1 << 32, lambda number: struct.pack(">BI", 0xCE, number)),
    (1 << 32, lambda number: struct.pack(">BQ", 0xCF, number)),
    (1 << 32, lambda number: struct.pack(">Bq", 0xD3, number)),
]
"""How a number may be written, and below which one."""

TOKENS = st.one_of(
    *[
        st.integers(0, most - 1).map(write)
        for most, write in FORMS + [FORMS[0], FORMS[2], FORMS[4], FORMS[6]] * 4  # the shortest ones: what engines send
    ]
)
NO_TOKENS = [b"\xc0", b"\xc1", b"\xc3", b"\xe0", b"\xff", b"\xca\0\0\0\0", b"\xcf\0\0\0\1\0\0\0\0", b"\xa1x", b"\x91\1"]


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(TOKENS, max_size=70),
    bad=st.none() | st.tuples(st.integers(0, 69), st.sampled_from(NO_TOKENS)),
    lost=st.sampled_from([0, 0, 0, 1, 3, 8, 30]),
    filler=st.sampled_from([0, 1, 9, 40]),
)
def test_tokens_in_every_form_up_to_the_last_byte(
    tokens: list[bytes], bad: tuple[int, bytes] | None, lost: int, filler: int
) -> None:
    """They are read by fours while enough bytes follow, else one by one."""
    if bad is not None:
        tokens.insert(bad[0], bad[1])
    names = array("Q", range(1, len(tokens) // 4 + 1)).tolist()
    event = b"\x96" + encode("BlockStored") + encode(names) + encode(None)
    event += b"\xdc" + len(tokens).to_bytes(2) + b"".join(tokens) + encode(4) + encode(None)
    payload = b"\x93" + encode(1.0) + b"\x91" + event + encode(0)
    if filler:  # of later fields, behind the events
        payload = b"\x94" + payload[1:] + encode("x" * filler)
    payload = payload[: len(payload) - lost]
    pair = FeedPair(targets=1, block_size=4)
    pair.apply(0, payload)
    pair.finish()
