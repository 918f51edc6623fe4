"""Decision logs on disk: what is written is read again, and decides the same; damage is counted."""

import json
import random
from array import array

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from kvrouter_grpc.config import DecisionsConfig, RouterConfig
from kvrouter_grpc.core import DecisionLog
from kvrouter_grpc.decisions.line import SETTINGS, DecisionLine, SettingsLine
from kvrouter_grpc.decisions.reader import MOST_TOLD, Faults, read
from kvrouter_grpc.decisions.replay import Replay
from kvrouter_grpc.decisions.writer import DecisionFile, DecisionWriter
from kvrouter_grpc.explain.replay_command import replay_command
from kvrouter_grpc.routing.plan import Plan
from kvrouter_grpc.routing.router import Router
from kvrouter_grpc.routing.workers import worker_id_of
from kvrouter_grpc.types import (
    Prompt,
    RouterOverride,
    RoutingHints,
    RoutingRequest,
    StreamState,
    WorkerFacts,
    WorkerSpec,
    WorkerState,
)
from reference.kv_encode import encode_batch
from reference.kv_events import BlocksStored

ENDPOINT = "ns.backend.generate"
NAMES = ("a", "b", "c")


def fleet(log_size=1024, hashes=False, **config):
    router = Router(ENDPOINT, RouterConfig(block_size=16, seed=1, **config), log=DecisionLog(log_size, hashes=hashes))
    for name in NAMES:
        worker = router.workers.add(
            WorkerSpec(name, f"http://{name}", ENDPOINT, dp_size=1, total_kv_blocks=30, taints=frozenset({name}))
        )
        router.workers.introduced(worker, worker.spec, WorkerFacts(("base",), ()))
        router.add_targets(worker.targets)
        for target in worker.targets:
            stream = router.index.stream(target)
            stream.state, stream.known = StreamState.LIVE, 0
            router.index.refresh(target)
        router.workers.set_health(worker, WorkerState.READY)
    return router


def drive(router, count=60, seed=5):
    """Requests of all kinds: plain ones, booked ones, with hints and overrides, in sessions, with a remote prefill."""
    rng = random.Random(seed)
    picks = []
    for number in range(count):
        words = array("I", [rng.randrange(1, 3), *range(2, rng.randrange(3, 90))])
        if rng.random() < 0.3:
            size = len(words) // 16
            event = BlocksStored(array("Q", range(1, size + 1)), None, words[: size * 16], 16)
            target = router.workers.named(rng.choice(NAMES)).targets[0]
            router.index.apply_payload(target, encode_batch([event] if size else []))
        kind = rng.randrange(6)
        if kind == 0 and not router.asks_for_session:
            seat, _, _ = router.choose(words, "", f"r{number}")
            picks.append(seat.worker.spec.name)
            continue
        hints = {
            1: RoutingHints(preferred_taints={"a": 2.0, "b": -1.0}),
            2: RoutingHints(override=RouterOverride(cost="dynamo", temperature=0.7)),
            3: RoutingHints(session_id=f"s{number % 7}", expected_output_tokens=100),
            4: RoutingHints(allowed_worker_ids=frozenset(map(worker_id_of, NAMES[:2]))),
        }.get(kind, RoutingHints())
        lease = router.lease(RoutingRequest(Prompt(words), hints, "", f"r{number}", prefilled=kind == 5))
        picks.append(lease.decision.worker_name)
        if rng.random() < 0.4:
            lease.release()
    return picks


async def written(tmp_path, router, **config):
    """The file that the decisions of a router come to."""
    path = tmp_path / "decisions.jsonl"
    writer = DecisionWriter({ENDPOINT: router}, DecisionsConfig(log_file=path, **config))
    assert await writer.flush()
    return path


def replay(*paths, differing=10, **changes):
    made = Replay(changes, differing)
    return made.files(paths), made.faults


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"cost": "dynamo", "temperature": 0.5},
        {"mode": "power-of-two"},
        {"mode": "round-robin"},
        {"mode": "random"},
        {"mode": "session"},
        {"mode": "kv-aware", "kv_aware_threshold": 30},
        {"session_affinity_ttl_secs": 60},
    ],
    ids=repr,
)
async def test_the_same_settings_lead_to_every_pick_again(tmp_path, config):
    router = fleet(**config)
    picks = drive(router)
    outcome, faults = replay(await written(tmp_path, router))
    assert (outcome.decisions, outcome.changed, outcome.unlike, outcome.lost, outcome.skipped) == (60, 0, 0, 0, 0)
    assert faults.count == 0
    assert {worker: count for (_, worker), count in outcome.before.items()} == {n: picks.count(n) for n in set(picks)}
    assert outcome.before == outcome.after
    assert outcome.before_new_tokens == outcome.after_new_tokens
    assert 0 < outcome.before_new_tokens <= outcome.prompt_tokens
    assert outcome.differences == []


async def test_other_settings_lead_to_what_that_policy_picks(tmp_path):
    router = fleet()
    drive(router)
    path = await written(tmp_path, router)
    outcome, _ = replay(path, mode="least-loaded", temperature=0.0)
    now = Plan.of(router.config.model_copy(update={"mode": "least-loaded"}))
    _, recordings = router.log.since(0, 1000)
    differing = [
        recording
        for recording in recordings
        if not recording.occasion.override and recording.verdict(now.policy)[0] != recording.picked
    ]
    assert outcome.changed >= len(differing) > 0
    assert outcome.unlike == 0
    assert len(outcome.differences) == min(10, outcome.changed)
    assert all(each.before != each.after for each in outcome.differences)
    assert outcome.before_new_tokens != outcome.after_new_tokens
    assert sum(outcome.after.values()) == sum(outcome.before.values()) == 60
    assert len(replay(path, differing=0, mode="least-loaded")[0].differences) == 0


async def test_settings_are_all_that_a_plan_reads(tmp_path):
    asked = set()

    class Seen(RouterConfig):
        def __getattribute__(self, name):
            if name in RouterConfig.model_fields:
                asked.add(name)
            return super().__getattribute__(name)

    config = Seen(shared_cache_type="events")  # whose multiplier is read only then
    asked.clear()
    Plan.of(config)
    assert asked == SETTINGS


async def test_a_line_has_what_the_decision_read_and_no_prompt(tmp_path):
    router = fleet()
    secret = array("I", range(987_654_300, 987_654_340))
    router.workers.set_draining(router.workers.named("c"), draining=True)
    router.best_worker(RoutingRequest(Prompt(secret), request_id="mine"))
    settings, line = [json.loads(text) for text in (await written(tmp_path, router)).read_text().splitlines()]
    assert settings["type"] == "settings"
    assert settings["router"]["cost"] == "default"
    assert (line["type"], line["endpoint"], line["request_id"], line["tokens"]) == ("decision", ENDPOINT, "mine", 40)
    assert [seen[0] for seen in line["workers"]] == ["a", "b"]
    assert line["left_out"] == [["c", 0, "draining: draining"]]
    assert "98765" not in json.dumps(line)
    assert "hashes" not in line
    router = fleet(hashes=True)
    router.best_worker(RoutingRequest(Prompt(secret)))
    (tmp_path / "decisions.jsonl").unlink()
    line = json.loads((await written(tmp_path, router)).read_text().splitlines()[1])
    assert line["hashes"] == router.index.sequence(Prompt(secret)).tolist()


async def test_decisions_that_were_overwritten_are_counted(tmp_path):
    router = fleet(log_size=8)
    drive(router, 20)
    with capture_logs() as said:
        path = await written(tmp_path, router)
    assert [(each["event"], each["lost"]) for each in said] == [("decisions not written", 12)]
    outcome, _ = replay(path)
    assert (outcome.decisions, outcome.lost) == (8, 12)


async def test_files_are_bounded_and_each_can_be_replayed(tmp_path):
    router = fleet()
    path = tmp_path / "decisions.jsonl"
    writer = DecisionWriter({ENDPOINT: router}, DecisionsConfig(log_file=path, log_file_bytes=65_536))
    for turn in range(20):
        drive(router, 10, seed=turn)
        for number in range(10):
            if f"r{number}" in router.loads._leases:
                router.free(f"r{number}")
        await writer.flush()
        assert not path.exists() or path.stat().st_size < 65_536
    files = sorted(tmp_path.iterdir(), reverse=True)
    assert [file.name for file in files] == ["decisions.jsonl.1", "decisions.jsonl"]
    assert 65_536 <= files[0].stat().st_size < 2 * 65_536
    for file in files:
        outcome, faults = replay(file)
        assert (outcome.skipped, outcome.unlike, faults.count) == (0, 0, 0)
        assert outcome.decisions > 10


async def test_a_restart_goes_on_in_the_same_file_behind_a_line_that_was_cut_off(tmp_path):
    router = fleet()
    drive(router, 5)
    path = await written(tmp_path, router)
    path.write_bytes(path.read_bytes()[:-20])
    other = fleet(cost="dynamo")
    drive(other, 7)
    await written(tmp_path, other)
    outcome, faults = replay(path)
    assert (outcome.decisions, outcome.unlike, faults.count) == (4 + 7, 0, 1)


async def test_a_file_that_cannot_be_written_is_said_and_tried_again(tmp_path):
    router = fleet()
    path = tmp_path / "none" / "decisions.jsonl"
    writer = DecisionWriter({ENDPOINT: router}, DecisionsConfig(log_file=path))
    drive(router, 3)
    with capture_logs() as said:
        assert not await writer.flush()
    assert [each["event"] for each in said] == ["decisions not written"]
    path.parent.mkdir()
    assert await writer.flush()
    router.best_worker(RoutingRequest(Prompt(array("I", [1]))))
    assert await writer.flush()
    assert replay(path)[0].decisions == 1


async def test_without_a_file_nothing_is_written(tmp_path):
    writer = DecisionWriter({ENDPOINT: fleet()}, DecisionsConfig())
    await writer.run()
    assert await writer.flush()


def test_file_says_when_the_next_one_begins(tmp_path):
    file = DecisionFile(tmp_path / "f", 10)
    assert [file.append(b"12345\n"), file.append(b"12345\n"), file.append(b"1\n")] == [False, True, False]
    assert [(tmp_path / name).read_bytes() for name in ("f.1", "f")] == [b"12345\n12345\n", b"1\n"]


GARBAGE = [
    b"\n",
    b"null\n",
    b"{}\n",
    b"\xff\xfe\n",
    b'{"type": "other"}\n',
    b'{"type": "decision"}\n',
    b'{"type": "lost", "endpoint": "e", "count": -1}\n',
    b'{"type": "settings", "endpoint": "e", "router": {"mode": "fastest"}}\n',
    b'{"type": "settings", "endpoint": "e", "router": {"no_such": 1}}\n',
    b"[" * 100_000 + b"\n",
]


async def test_garbage_between_the_lines_is_counted(tmp_path):
    router = fleet()
    drive(router, 20)
    path = await written(tmp_path, router)
    whole = path.read_bytes().splitlines(keepends=True)
    rng = random.Random(1)
    mixed = whole[:1]
    for line in whole[1:]:
        mixed += [rng.choice(GARBAGE), line]
    path.write_bytes(b"".join([*GARBAGE, *mixed]))
    outcome, faults = replay(path)
    assert (outcome.decisions, outcome.unlike, faults.count) == (20, 0, len(GARBAGE) + 20)
    assert len(faults.told) == MOST_TOLD
    assert faults.told[0].startswith(f"{path}:1: ")


async def test_damaged_lines_never_do_more_than_count(tmp_path):
    router = fleet(hashes=True)
    drive(router, 20)
    path = await written(tmp_path, router)
    whole = path.read_bytes()
    rng = random.Random(2)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'0123456789",[]{}-.e\n')
        path.write_bytes(damaged[: rng.randrange(len(damaged))])
        outcome, faults = replay(path, cost="dynamo")
        assert outcome.decisions + outcome.skipped + faults.count > 0 or not path.stat().st_size


@pytest.mark.parametrize(
    "changed",
    [
        {"picked": 3},
        {"tokens": -5},
        {"tokens": 1},
        {"regret": 1e999},
        {"override": {"cost": "x"}},
        {"override": {"temperature": "x"}},
        {"workers": []},
        {"dice": 1 << 64},
        {"block_size": 1 << 40},
    ],
    ids=repr,
)
async def test_lines_that_cannot_be_are_refused(tmp_path, changed):
    router = fleet()
    for _ in range(2):
        event = BlocksStored(array("Q", [1, 2]), None, array("I", range(32)), 16)
        router.index.apply_payload(router.workers.named("a").targets[0], encode_batch([event]))
        router.best_worker(RoutingRequest(Prompt(array("I", range(40)))))
    path = await written(tmp_path, router)
    settings, first, second = path.read_text().splitlines()
    path.write_text("\n".join([settings, json.dumps(json.loads(first) | changed), second]))
    outcome, faults = replay(path)
    assert (outcome.decisions, faults.count) == (1, 1)


async def test_lines_that_are_too_long_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("kvrouter_grpc.decisions.reader.MOST_LINE", 4096)
    router = fleet()
    drive(router, 3)
    path = await written(tmp_path, router)
    path.write_bytes(b"x" * 10_000 + b"\n" + path.read_bytes())
    faults = Faults()
    lines = [line for _, line in read(path, faults)]
    assert [type(line) for line in lines] == [SettingsLine, *[DecisionLine] * 3]
    assert faults.told == [f"{path}:1: it is longer than 4096 bytes"]


# --- the command ----------------------------------------------------------------------------------------------------


async def test_the_command_says_what_would_have_been(tmp_path):
    router = fleet()
    drive(router)
    path = str(await written(tmp_path, router))
    same = CliRunner().invoke(replay_command, [path])
    assert same.exit_code == 0
    assert same.output.startswith("0 of 60 decisions (0.0%) would be other ones\n")
    other = CliRunner().invoke(replay_command, [path, "--router-mode", "least_loaded", "--json"])
    told = json.loads(other.output)
    assert told["decisions"] == 60
    assert told["changed"] > 0
    assert sum(each["before"] for each in told["workers"]) == sum(each["after"] for each in told["workers"]) == 60
    shown = CliRunner().invoke(replay_command, [path, "--router-mode", "least-loaded", "--differing", "1"])
    assert f"{told['changed']} of 60 decisions" in shown.output
    assert "Differing decisions" in shown.output


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"garbage\n")
    for args, said in (
        ([str(log), "--router-temperature", "-1"], "flag --router-temperature: '-1' is not usable"),
        ([str(tmp_path / "none")], "No such file"),
        ([str(log)], "no decisions to replay, 1 lines that cannot be read"),
        ([str(log), "--router-block-size", "16"], "No such option"),
        ([], "Missing argument"),
    ):
        result = CliRunner().invoke(replay_command, args)
        assert result.exit_code != 0
        assert said in result.output
