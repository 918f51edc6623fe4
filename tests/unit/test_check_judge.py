"""Judgements of a check: what was seen in, findings out."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvrouter_grpc.check.finding import Finding, Severity
from kvrouter_grpc.check.judge import judge, judge_fleet
from kvrouter_grpc.check.observation import ProbeSeen, RankSeen, WorkerSeen
from kvrouter_grpc.check.report import Report, WorkerReport
from kvrouter_grpc.check.tally import MAX_NAMES, EventTally
from kvrouter_grpc.events.probe import Line
from kvrouter_grpc.types import Usage, WorkerFacts, WorkerSpec
from kvrouter_grpc.upstream.facts import EngineSettings
from kvrouter_grpc.upstream.vllm_http import Health

OK, NOTE, WARNING, FAILURE = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.FAILURE
SPEC = WorkerSpec("w", "http://w:8000", "a.b.c", events="tcp://w:5557", replay="tcp://w:5562", block_size=16)
FACTS = WorkerFacts(models=("m",), loras=("poet",), block_size=16, version="0.32.0", total_kv_blocks=100)


def worker(**fields: Any) -> WorkerSeen:
    """A worker that is well, but for `fields`."""
    return WorkerSeen(
        **({"given": SPEC, "spec": SPEC, "health": Health.GOOD, "facts": FACTS, "ranks": [rank()]} | fields)
    )


def rank(**fields: Any) -> RankSeen:
    """A rank that is well, but for `fields`; those of its tally are among them."""
    tally = EventTally()
    names = {name: fields.pop(name) for name in list(fields) if hasattr(tally, name)}
    for name, value in names.items():
        setattr(tally, name, value)
    good = {"live_line": Line.OPEN, "replay_line": Line.OPEN, "replay_ended": True}
    return RankSeen(**({"rank": 0, "events": SPEC.events, "replay": SPEC.replay, "tally": tally} | good | fields))


def of(seen: WorkerSeen, check: str) -> list[Finding]:
    return [each for each in judge(seen) if each.check == check]


@pytest.mark.parametrize(
    ("fields", "check", "severity"),
    [
        ({}, "http", OK),
        ({"health": Health.SLOW}, "http", FAILURE),
        ({"facts": None, "error": "no vLLM"}, "http", FAILURE),
        ({"facts": replace(FACTS, version=None)}, "version", NOTE),
        ({"facts": replace(FACTS, version="dev")}, "version", NOTE),
        ({"facts": replace(FACTS, version="0.10.1")}, "version", FAILURE),
        ({"facts": replace(FACTS, version="0.10.2.dev1+g3")}, "version", OK),
        ({"facts": replace(FACTS, version="0.99")}, "version", NOTE),
        ({"facts": replace(FACTS, version="1.0.0")}, "version", NOTE),
        ({"settings": EngineSettings(dp_size=2), "given": replace(SPEC, dp_size=1)}, "ranks", WARNING),
        ({"given": replace(SPEC, dp_size=2)}, "ranks", FAILURE),
        ({"settings": EngineSettings(block_size=32)}, "block size", FAILURE),
        ({"router_block_size": 32}, "block size", FAILURE),
        ({"router_block_size": 16}, "block size", OK),
        ({"given": replace(SPEC, block_size=32)}, "block size", FAILURE),
        ({"ranks": [rank(block_sizes={32})]}, "block size", FAILURE),
        (
            {"facts": replace(FACTS, block_size=None), "given": replace(SPEC, block_size=None)},
            "block size",
            WARNING,
        ),
        ({"facts": replace(FACTS, prefix_caching=False)}, "prefix caching", FAILURE),
        ({"differing": []}, "tokenizer", OK),
        ({"differing": ["naïve"]}, "tokenizer", FAILURE),
        ({"timed_out": True}, "time", FAILURE),
        ({"spec": replace(SPEC, kv_events=False), "ranks": []}, "events", NOTE),
        ({"spec": replace(SPEC, events=None), "ranks": []}, "events", WARNING),
    ],
)
def test_workers(fields: dict[str, Any], check: str, severity: Severity) -> None:
    assert [each.severity for each in of(worker(**fields), check) if each.rank is None] == [severity]


@pytest.mark.parametrize(
    ("fields", "check", "severity"),
    [
        ({"live_line": Line.REFUSED}, "events", FAILURE),
        ({"live_line": Line.UNREACHED}, "events", FAILURE),
        ({"live_line": Line.FOREIGN}, "events", FAILURE),
        ({"live_line": Line.MUTE}, "events", FAILURE),
        ({"live_line": Line.UNUSABLE}, "events", FAILURE),
        ({"topics": set()}, "topic", NOTE),
        ({"topics": {"", "kv"}}, "topic", OK),
        ({"replay": None}, "replay", WARNING),
        ({"replay_line": None}, "replay", WARNING),
        ({"replay_ended": False}, "replay", WARNING),
        ({"missing": 3, "replayed": 5}, "replay", NOTE),
        ({"first_seq": 9}, "replay", NOTE),
        ({"first_seq": 0}, "replay", OK),
        ({"adapters": {"poet"}}, "adapters", OK),
        ({"adapters": {"poet", "gone"}}, "adapters", WARNING),
        ({"repeated": 3}, "report mode", WARNING),
        ({"ahead_s": None}, "clock", NOTE),
        ({"ahead_s": 0.5}, "clock", OK),
        ({"ahead_s": -2.0}, "clock", WARNING),
        ({"probe": None}, "cached tokens", NOTE),
        ({"probe": ProbeSeen(33, 2, error="busy")}, "probe", FAILURE),
        ({"probe": ProbeSeen(33, 2, second=Usage(33, 1, 32))}, "probe", FAILURE),
        ({"probe": ProbeSeen(33, 2, second=Usage(33, 1, 32), stored=True)}, "probe", OK),
        ({"probe": ProbeSeen(33, 2, second=Usage(33, 1, 32))}, "cached tokens", OK),
        ({"probe": ProbeSeen(33, 2, second=Usage(33, 1, 16))}, "cached tokens", WARNING),
        ({"probe": ProbeSeen(33, 2, second=Usage(33, 1, 0))}, "cached tokens", FAILURE),
        ({"probe": ProbeSeen(33, 2, second=Usage(33, 1, None))}, "cached tokens", WARNING),
    ],
)
def test_ranks(fields: dict[str, Any], check: str, severity: Severity) -> None:
    assert [(each.rank, each.severity) for each in of(worker(ranks=[rank(**fields)]), check)] == [(0, severity)]


def test_what_cannot_be_is_not_reported() -> None:
    assert of(worker(ranks=[rank(repeated=2)]), "report mode") == []
    full = worker(spec=replace(SPEC, total_kv_blocks=100), ranks=[rank(most_held=101)])
    assert [each.severity for each in of(full, "report mode")] == [WARNING]


def test_every_finding_that_asks_for_something_says_what() -> None:
    bad = [
        worker(health=Health.GONE, facts=None),
        worker(facts=replace(FACTS, version="0.1", prefix_caching=False), settings=EngineSettings(block_size=32)),
        worker(given=replace(SPEC, dp_size=3, models=("x",)), differing=["a"], timed_out=True),
        worker(ranks=[rank(live_line=line, replay_line=line, ahead_s=9.0, unreadable=1) for line in Line]),
        worker(ranks=[rank(probe=ProbeSeen(33, 2, error="busy"), replay=None, repeated=9, adapters={"x"})]),
    ]
    findings = [each for seen in bad for each in judge(seen) if each.severity > NOTE]
    assert len(findings) > 20
    assert [each for each in findings if not each.fix or not each.seen] == []


def test_block_sizes_of_an_endpoint() -> None:
    other = replace(SPEC, name="x", block_size=32)
    elsewhere = replace(other, endpoint="d.e.f")
    assert judge_fleet([worker(), worker(given=elsewhere, spec=elsewhere)]) == []
    (finding,) = judge_fleet([worker(), worker(given=other, spec=other)])
    assert finding.severity is FAILURE
    assert "16 (w), 32 (x)" in finding.seen


def batch(*events: Any, ts: float = 0.0) -> bytes:
    return msgspec.msgpack.encode([ts, list(events), 0])


def stored(*hashes: int, kind: str = "full_attention", **fields: Any) -> dict[str, Any]:
    tokens = list(range(4 * len(hashes)))
    said = {"type": "BlockStored", "block_hashes": list(hashes), "token_ids": tokens, "block_size": 4}
    return said | {"kv_cache_spec_kind": kind} | fields


def tallied(*payloads: bytes, replayed: bool = True) -> EventTally:
    tally = EventTally()
    for seq, payload in enumerate(payloads):
        tally.take(b"kv", seq, payload, replayed=replayed, now=0.0)
    return tally


def test_stores_of_held_blocks_are_counted_and_balanced_by_removals() -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [1, 2]}
    assert tallied(batch(stored(1, 2)), batch(stored(1, 2))).repeated == 1
    assert tallied(batch(stored(1, 2)), batch(removed), batch(stored(1, 2))).repeated == 0
    assert tallied(batch(stored(1, 2)), batch({"type": "AllBlocksCleared"}), batch(stored(1, 2))).repeated == 0
    assert tallied(batch(stored(1)), batch(stored(1))).repeated == 0  # a fully cached prompt does that
    assert tallied(batch(stored(1, 2)), batch(stored(1, 2)), batch(removed)).most_held == 4
    assert tallied(batch(stored(1, 2)), batch(stored(1, 2, medium="CPU"))).most_held == 2


def test_a_gap_ends_what_is_known_of_the_blocks() -> None:
    tally = EventTally()
    for seq in (0, 1, 5, 6):
        tally.take(b"kv", seq, batch(stored(1, 2)), replayed=True, now=0.0)
    assert (tally.first_seq, tally.missing, tally.repeated) == (0, 3, 1)


def test_a_batch_that_comes_twice_counts_once_for_the_blocks() -> None:
    tally = EventTally()
    for replayed in (True, False):
        tally.take(b"kv", 0, batch(stored(1, 2)), replayed=replayed, now=0.0)
    assert tally.repeated == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\xc0",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, "x", 0]),
        msgspec.msgpack.encode({"ts": 1.0}),
        b"\x91" * 100_000,
        msgspec.msgpack.encode([1.0, [{"type": "BlockStored", "block_hashes": 7}], 0]),
    ],
)
def test_hostile_payloads_are_counted(payload: bytes) -> None:
    assert tallied(payload).unreadable == 1


def test_names_are_bounded_and_odd_events_named() -> None:
    tally = tallied(*(batch({"type": f"Odd{n}"}, 7, [], stored(n, block_size=n)) for n in range(1, 100)))
    assert len(tally.unknown) == len(tally.block_sizes) == MAX_NAMES
    assert "no event" in tally.unknown
    assert tallied(batch(stored(1, kind="sliding_window", block_size=99))).block_sizes == set()


def test_the_awaited_store_must_be_live_and_begin_the_prompt() -> None:
    tally = EventTally()
    tally.await_store([0, 1, 2, 3, 9])
    tally.take(None, 0, batch(stored(1)), replayed=True, now=0.0)
    tally.take(b"", 1, batch(stored(2, token_ids=[3, 2, 1, 0])), replayed=False, now=0.0)
    assert tally.store_awaited
    tally.take(b"", 2, batch(stored(1), ts=5.0), replayed=False, now=2.0)
    assert not tally.store_awaited
    assert tally.ahead_s == 3.0


@pytest.mark.parametrize(
    ("severities", "code"), [([], 0), ([OK, NOTE], 0), ([OK, WARNING], 1), ([WARNING, FAILURE, OK], 2)]
)
def test_exit_codes(severities: list[Severity], code: int) -> None:
    report = Report([WorkerReport("w", "http://w", [Finding("x", each, "seen") for each in severities])])
    assert report.exit_code == code
    assert msgspec.json.decode(report.json())["worst"] == report.worst.name.lower()
