"""The mock's cache against real vLLM: the requests of a capture must yield the events of that capture."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrouter_grpc.mock_worker.block_hash import CacheScope
from kvrouter_grpc.mock_worker.blocks import BlockManager, BlockTable
from kvrouter_grpc.mock_worker.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, event_hash
from kvrouter_grpc.mock_worker.scheduler import Scheduler
from kvrouter_grpc.mock_worker.sequence import Sequence, StopRules

CAPTURES = Path(__file__).parent / "captures"
LORA = CacheScope(lora_id=1, lora_name="tiny-lora", lora_path="adapters/tiny-lora")

Batch = list[dict[str, Any]]


class Script:
    """Answers with given tokens, then with filler: what a real model said cannot be guessed."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = iter(tokens)

    def next(self) -> int:
        return next(self._tokens, 7)


def episodes(path: Path) -> Iterator[tuple[dict[str, Any], list[Batch]]]:
    """(what was done, the batches of events that followed)."""
    mark: dict[str, Any] | None = None
    batches: list[Batch] = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "frames" in entry:
            batches.append(entry["decoded"][1])
        elif "mark" in entry:
            if mark is not None:
                yield mark, batches
            mark, batches = entry, []
    assert mark is not None
    yield mark, batches


def requests_of(mark: dict[str, Any], batches: list[Batch]) -> list[Sequence]:
    request = mark["req"]
    prompts = request["prompt"]
    prompts = prompts if isinstance(prompts[0], list) else [prompts]
    stored = [token for batch in batches for event in batch for token in event.get("token_ids", ())]
    scope = LORA if request["model"] == LORA.lora_name else CacheScope(cache_salt=request.get("cache_salt"))
    return [
        Sequence(
            table=BlockTable(list(prompt), scope, session_id=request.get("session_id")),
            prompt_tokens=len(prompt),
            rules=StopRules(request["max_tokens"], ignore_eos=True),
            walk=Script(stored[len(prompt) :] if request["max_tokens"] > 1 else []),
            notify=lambda _: None,
            report_hits=request.get("vllm_xargs", {}).get("kv_cache_report_mode") == "full",
        )
        for prompt in prompts
    ]


def run(scheduler: Scheduler, sequences: list[Sequence]) -> list[list[KvEvent]]:
    """The event batches, one per step that had any."""
    for sequence in sequences:
        scheduler.add(sequence)
    batches = []
    while (step := scheduler.schedule()) is not None:
        scheduler.complete(step)
        if events := scheduler.blocks.take_events():
            batches.append(events)
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    return batches


class HashNames:
    """Pairs the hashes of engine and mock one to one."""

    def __init__(self, *, equal: bool) -> None:
        self._equal = equal
        self._mock_of: dict[int, int] = {}
        self._engine_of: dict[int, int] = {}

    def check(self, engine: int | None, mock: bytes | None, *, comparable: bool = True) -> None:
        assert (engine is None) == (mock is None)
        if engine is None or mock is None:
            return
        short = event_hash(mock, "int")
        assert isinstance(short, int)
        assert self._mock_of.setdefault(engine, short) == short
        assert self._engine_of.setdefault(short, engine) == engine
        if self._equal and comparable:
            assert short == engine


def check_event(engine: dict[str, Any], mock: KvEvent, names: HashNames, lora_hashes: set[int]) -> None:
    assert type(mock).__name__ == engine["type"]
    match mock:
        case BlockStored():
            lora = mock.lora_name is not None
            assert engine["token_ids"] == mock.tokens
            assert engine["block_size"] == mock.block_size
            assert engine["lora_id"] == mock.lora_id
            assert engine["lora_name"] == mock.lora_name
            assert engine["extra_keys"] == mock.extra_keys
            assert len(engine["block_hashes"]) == len(mock.hashes)
            names.check(engine["parent_block_hash"], mock.parent, comparable=not lora)
            for theirs, ours in zip(engine["block_hashes"], mock.hashes, strict=True):
                names.check(theirs, ours, comparable=not lora)
                if lora:
                    lora_hashes.add(theirs)
        case BlockRemoved():
            (theirs,) = engine["block_hashes"]
            names.check(theirs, mock.hash, comparable=theirs not in lora_hashes)
        case AllBlocksCleared():
            pass


@pytest.mark.parametrize(
    ("capture", "block_size", "requests", "comparable_hashes", "sessions"),
    [
        # Since 0.29 the hash chain has a fixed root, so the very hashes must agree (not under LoRA: its path is hashed).
        ("v0.32.0-int-bs32-lora.jsonl", 32, 51, True, True),
        ("v0.28.0-int-bs16.jsonl", 16, 49, False, False),
    ],
)
def test_the_same_requests_yield_the_same_events(
    capture: str, block_size: int, requests: int, comparable_hashes: bool, sessions: bool
) -> None:
    scheduler = Scheduler(BlockManager(64, block_size), max_num_seqs=8, max_num_batched_tokens=2048)
    names = HashNames(equal=comparable_hashes)
    lora_hashes: set[int] = set()
    seen = 0
    for mark, expected in episodes(CAPTURES / capture):
        if mark["mark"].startswith("POST /reset_prefix_cache"):
            assert scheduler.blocks.reset()
            assert expected == []
        if mark.get("status") != 200 or "req" not in mark:
            continue
        sequences = requests_of(mark, expected)
        got = run(scheduler, sequences)
        flat_expected = [event for batch in expected for event in batch]
        flat_got = [event for batch in got for event in batch]
        assert [event["type"] for event in flat_expected] == [type(event).__name__ for event in flat_got], mark["mark"]
        for theirs, ours in zip(flat_expected, flat_got, strict=True):
            check_event(theirs, ours, names, lora_hashes)
            if sessions and isinstance(ours, BlockStored):
                assert theirs.get("session_id") == ours.session_id
        if len(sequences) == 1:  # two prompts of one request may or may not meet in one step
            assert [len(batch) for batch in expected] == [len(batch) for batch in got], mark["mark"]
        assert mark["usage"]["prompt_tokens_details"]["cached_tokens"] == sequences[-1].cached_tokens, mark["mark"]
        seen += 1
    assert seen == requests


def test_a_chunked_prompt_is_stored_chunk_by_chunk() -> None:
    (_, batches) = next(episodes(CAPTURES / "v0.32.0-chunked-concurrent-bs32.jsonl"))
    stored = [event for batch in batches for event in batch]
    tail = [random.Random(3).randrange(5, 512) for _ in range(20)]  # 500 tokens, of which 15 blocks of 32 are on record
    prompt = [token for event in stored for token in event["token_ids"]]
    scheduler = Scheduler(BlockManager(64, 32), max_num_seqs=2, max_num_batched_tokens=128)
    sequence = Sequence(
        table=BlockTable(prompt + tail, session_id="sess-hdr"),
        prompt_tokens=500,
        rules=StopRules(1),
        walk=Script([]),
        notify=lambda _: None,
    )
    assert len(sequence.table.tokens) == 500
    got = run(scheduler, [sequence])
    names = HashNames(equal=True)
    assert len(got) == len(batches) == 4
    for theirs, (ours,) in zip(stored, got, strict=True):
        check_event(theirs, ours, names, set())
