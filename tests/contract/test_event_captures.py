"""Every recorded message decodes to what the engine said, worked out here a second time from the recording's JSON."""

from array import array
from collections import Counter

import pytest

from contract.captured import FILES, lines, messages
from kvrouter_grpc.types import Tier
from reference.feeds import FeedPair
from reference.kv_codec import decode_batch
from reference.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvBatch, KvEvent

# Positions of an event in array form, which only ever grew at the end.
STORED = (
    "type",
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
    "kv_cache_spec_sliding_window",
)
REMOVED = ("type", "block_hashes", "medium", "group_idx")
U64 = 2**64


def named(event: list | dict) -> dict:
    if isinstance(event, dict):
        return event
    return dict(zip(STORED if event[0] == "BlockStored" else REMOVED, event, strict=False))


def u64(value: int | str) -> int:
    if isinstance(value, str):
        return int(value.removeprefix("hex:"), 16) % U64
    return value % U64


def expected(event: dict) -> KvEvent:
    if event["type"] == "AllBlocksCleared":
        return CacheCleared()
    hashes = array("Q", [u64(value) for value in event["block_hashes"]])
    assert event.get("medium") in (None, "GPU")
    if event["type"] == "BlockRemoved":
        return BlocksRemoved(hashes, Tier.DEVICE, event.get("group_idx") or 0)
    assert event["type"] == "BlockStored"
    lora_name = event.get("lora_name") or ("" if event["lora_id"] is None else f"lora_id:{event['lora_id']}")
    first, *others = event.get("extra_keys") or [None]
    beside_lora = [key for key in first or [] if key != lora_name]
    assert all(keys in (None, [lora_name]) for keys in others), "these recordings know no other key"
    assert len(event["token_ids"]) == len(hashes) * event["block_size"]
    parent = event["parent_block_hash"]
    return BlocksStored(
        hashes=hashes,
        parent=None if parent is None else u64(parent),
        tokens=array("I", event["token_ids"]),
        block_size=event["block_size"],
        lora_name=lora_name,
        cache_salt=beside_lora[0] if beside_lora else "",
        kind=event.get("kv_cache_spec_kind") or "",
        group=event.get("group_idx") or 0,
    )


@pytest.mark.parametrize("name", FILES)
def test_every_message_of(name: str) -> None:
    count = 0
    for message in messages(name):
        ts, events, dp_rank = message.decoded
        assert decode_batch(message.payload) == KvBatch(ts, [expected(named(e)) for e in events], dp_rank, skipped=0)
        count += 1
    assert count >= 5


@pytest.mark.parametrize("name", FILES)
def test_the_index_follows(name: str) -> None:
    """The compiled feed does with every message what the typed twin says that it means."""
    pair = FeedPair(targets=2)
    for message in messages(name):
        assert pair.apply(message.decoded[2], message.payload) == 0
        pair.compare()
    pair.finish()


def test_the_recordings_show_what_they_promise() -> None:
    """Guards the test above against recordings that lost what makes them worth keeping."""
    seen: Counter[str] = Counter()
    for name in FILES:
        for message in messages(name):
            batch = decode_batch(message.payload)
            for event in batch.events:
                seen[type(event).__name__] += 1
                if isinstance(event, BlocksStored):
                    seen["salted"] += event.cache_salt == "s1"
                    seen["adapter"] += event.lora_name == "tiny-lora"
                    seen["child"] += event.parent is not None
            seen[f"rank {batch.dp_rank}"] += 1
    wanted = {"BlocksStored", "BlocksRemoved", "CacheCleared", "salted", "adapter", "child", "rank 0", "rank 1"}
    assert wanted <= {name for name, count in seen.items() if count}


def test_all_layouts_say_the_same() -> None:
    """The old layouts were written from real events of 0.28: what both can say must be equal."""
    real = {message.seq: decode_batch(message.payload) for message in messages("v0.28.0-int-bs16.jsonl")}
    releases: Counter[str] = Counter()
    for message in messages("reencoded-old-formats.jsonl"):
        old = decode_batch(message.payload)
        release = message.line["vllm"]
        releases[release] += 1
        new = real[message.seq]
        assert (old.ts, old.dp_rank, old.skipped) == (new.ts, new.dp_rank, new.skipped)
        told = tuple(map(int, release.split(".")))
        assert old.events == [as_told_by(told, event) for event in new.events]
    assert set(releases) == {"0.9.2", "0.10.2", "0.14.0", "0.17.0", "0.20.0", "0.22.0", "0.24.0"}
    assert len(set(releases.values())) == 1


def as_told_by(release: tuple[int, ...], event: KvEvent) -> KvEvent:
    """`event` without what `release` had no field for."""
    if not isinstance(event, BlocksStored):
        return event
    return BlocksStored(
        hashes=event.hashes,
        parent=event.parent,
        tokens=event.tokens,
        block_size=event.block_size,
        cache_salt=event.cache_salt if release >= (0, 17) else "",
        kind=event.kind if release >= (0, 22) else "",
    )


def test_hashes_in_bytes_equal_hashes_as_integers() -> None:
    """The same prompts on 0.32 in both modes: hashes differ by algorithm, what they name does not."""
    as_bytes = list(messages("v0.32.0-bytes-cbor-bs32.jsonl"))
    raw = [value for message in as_bytes for event in message.decoded[1] for value in event.get("block_hashes", ())]
    assert raw
    assert all(isinstance(value, str) and len(value) == len("hex:") + 64 for value in raw)
    decoded = [h for m in as_bytes for e in decode_batch(m.payload).events for h in getattr(e, "hashes", ())]
    assert decoded == [int(value[-16:], 16) for value in raw]
    first_int = next(iter(decode_batch(next(messages("v0.32.0-int-bs32-lora.jsonl")).payload).events))
    first_bytes = next(iter(decode_batch(as_bytes[0].payload).events))
    assert isinstance(first_int, BlocksStored)
    assert isinstance(first_bytes, BlocksStored)
    assert first_int.tokens == first_bytes.tokens


def test_replay_answers_have_the_shape_the_subscriber_reads() -> None:
    """Four frames, the end marker with number -1, and one answer per batch from the start asked for."""
    replays = [line for line in lines("v0.32.0-int-bs32-lora.jsonl") if "seqs" in line]
    assert [line["seqs"][0] for line in replays] == [0, 5, -1]
    for line in replays:
        assert line["end"] == ["", "", "ff" * 8, ""]
        assert len(line["first"]) == 4
        assert line["seqs"] == [*range(line["seqs"][0], len(line["seqs"]) - 1 + line["seqs"][0]), -1] or line[
            "seqs"
        ] == [-1]


def test_a_restart_begins_at_zero_without_a_word() -> None:
    """Of a restart one sees the connection break and the numbers begin again: both are what the subscriber acts on."""
    told = [
        line.get("monitor") or line["seq"]
        for line in lines("v0.32.0-restart-bs32.jsonl")
        if line.get("monitor") in ("DISCONNECTED", "HANDSHAKE_SUCCEEDED") or "seq" in line
    ]
    up, down = "HANDSHAKE_SUCCEEDED", "DISCONNECTED"
    assert told == [up, 0, 1, down, up, 0, 1, down, up, 0, down]
