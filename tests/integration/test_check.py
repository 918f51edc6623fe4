"""`kvrouter check` against mock workers, each wrong in one way."""

import asyncio
import json
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import zmq.asyncio

from integration.stack import ENDPOINT, FAST
from kvrouter_grpc.check import Scope
from kvrouter_grpc.check.finding import Finding, Severity
from kvrouter_grpc.check.report import Report
from kvrouter_grpc.check.run import inspect
from kvrouter_grpc.config import Config
from kvrouter_grpc.mock_worker import MockWorker
from kvrouter_grpc.mock_worker.tokens import encode_text
from kvrouter_grpc.server import tokenizer
from kvrouter_grpc.types import WorkerSpec
from programs import environment, mock_worker, worker_flag

OK, NOTE, WARNING, FAILURE = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.FAILURE
QUICK = Scope(timeout_s=15, listen_s=0)
PROBE = Scope(timeout_s=15, listen_s=0, probe=True)
CLOSED = "tcp://127.0.0.1:1"  # tcpmux: nobody listens there


@asynccontextmanager
async def worker(**settings: Any) -> AsyncIterator[MockWorker]:
    async with MockWorker(replace(FAST, **settings)) as mock:
        yield mock


async def complete(mock: MockWorker, tokens: list[int], **fields: Any) -> None:
    """One request to the worker, past any router."""
    body = {"model": mock.config.model, "prompt": tokens, "max_tokens": 1, **fields}
    async with aiohttp.ClientSession() as session, session.post(f"{mock.url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()


async def checked(
    *workers: MockWorker, scope: Scope = QUICK, router: dict[str, Any] | None = None, **spec: Any
) -> Report:
    specs = [replace(WorkerSpec(f"w{number}", each.url, ENDPOINT), **spec) for number, each in enumerate(workers)]
    config = Config.model_validate(
        {"endpoints": (ENDPOINT,), "workers": tuple(specs), "router": router or {}, "events": {"replay_timeout_s": 0.3}}
    )
    return await inspect(config, scope)


def of(report: Report, check: str) -> list[Finding]:
    return [each for worker in report.workers for each in worker.findings if each.check == check]


def the(report: Report, check: str) -> Finding:
    (finding,) = of(report, check)
    return finding


async def test_a_good_worker_is_good_throughout() -> None:
    async with worker() as mock:
        report = await checked(mock, scope=PROBE)
    (findings,) = [each.findings for each in report.workers]
    assert {each.severity for each in findings} == {OK}
    assert [each.check for each in findings] == [
        "http",
        "version",
        "ranks",
        "block size",
        "prefix caching",
        "events",
        "topic",
        "replay",
        "clock",
        "probe",
        "cached tokens",
    ]
    assert report.exit_code == 0
    assert the(report, "cached tokens").seen == "reported, 32 of 32 as expected"


async def test_without_leave_nothing_is_sent() -> None:
    async with worker() as mock:
        report = await checked(mock)
        assert mock.next_seq() == 0
    assert the(report, "cached tokens").severity is NOTE
    assert report.exit_code == 0


async def test_every_rank_is_looked_at() -> None:
    async with worker(dp_size=2) as mock:
        report = await checked(mock, scope=PROBE)
        assert [mock.next_seq(rank) for rank in (0, 1)] == [1, 1]
    assert [(each.rank, each.severity) for each in of(report, "probe")] == [(0, OK), (1, OK)]


async def test_ports_of_ranks_that_are_not_there() -> None:
    async with worker() as mock:
        report = await checked(mock, dp_size=2)
    assert [(each.rank, each.severity) for each in of(report, "events")] == [(0, OK), (1, FAILURE)]
    assert the(report, "ranks").severity is FAILURE


async def test_port_of_another_rank() -> None:
    async with worker(dp_size=2) as mock:
        await complete(mock, list(range(100, 140)))
        await complete(mock, list(range(200, 240)))
        base = mock.events_endpoints[1], mock.replay_endpoints[1]
        report = await checked(mock, events=base[0], replay=base[1])
    found = [each for each in of(report, "ranks") if each.rank == 0]
    assert [each.severity for each in found] == [FAILURE]
    assert "publishes the events of rank 1" in found[0].seen


async def test_nobody_there() -> None:
    async with worker() as mock:
        await mock.kill()
        report = await checked(mock)
    assert report.exit_code == 2
    assert the(report, "http").seen.endswith("/health: connection refused or lost")


async def test_engine_that_failed() -> None:
    async with worker() as mock:
        mock.fail_engine()
        report = await checked(mock)
    assert of(report, "http")[0].severity is FAILURE
    assert "says that it failed" in of(report, "http")[0].seen


@pytest.mark.parametrize(
    ("port", "severity", "says"),
    [
        ("http", FAILURE, "does not speak ZeroMQ"),
        ("replay", FAILURE, "does not speak ZeroMQ"),
        ("none", FAILURE, "refused"),
    ],
)
async def test_wrong_port_of_events(port: str, severity: Severity, says: str) -> None:
    async with worker() as mock:
        address = {"http": mock.url.replace("http", "tcp"), "replay": mock.replay_endpoints[0], "none": CLOSED}[port]
        report = await checked(mock, events=address)
    finding = the(report, "events")
    assert (finding.severity, finding.rank) == (severity, 0)
    assert says in finding.seen
    assert finding.fix


async def test_wrong_topic_shows_in_the_replay() -> None:
    async with worker() as mock:
        await complete(mock, list(range(100, 140)))
        report = await checked(mock, topic="kv@pod-7")
    finding = the(report, "topic")
    assert finding.severity is FAILURE
    assert "'kv-events'" in finding.seen
    assert "'kv@pod-7'" in finding.seen


async def test_events_off() -> None:
    async with worker(kv_events=False) as mock:
        report = await checked(mock, scope=PROBE)
    assert the(report, "events").seen == "its engine publishes no KV events"
    assert report.exit_code == 1
    assert the(report, "cached tokens").severity is OK  # the probe is sent all the same


async def test_events_off_as_server_info_says_where_nothing_else_does() -> None:
    async with worker(kv_events=False, kv_event_sources=False) as mock:
        report = await checked(mock)
    assert the(report, "events").fix == "start it with --kv-events-config"


async def test_engine_that_does_not_tell_its_events() -> None:
    async with worker(kv_event_sources=False) as mock:
        report = await checked(mock)
    assert the(report, "events").fix == "give events=tcp://host:port in its entry"


async def test_events_that_are_not_wanted() -> None:
    async with worker() as mock:
        report = await checked(mock, router={"kv_events": False})
    assert the(report, "events").severity is NOTE
    assert report.exit_code == 0


async def test_prefix_caching_off() -> None:
    async with worker(prefix_caching=False) as mock:
        report = await checked(mock, scope=PROBE)
    assert the(report, "prefix caching").severity is FAILURE
    assert the(report, "probe").seen == "no event told of the 2 blocks of a new prompt"
    assert the(report, "cached tokens").seen == "a prompt sent twice had 0 of 32 tokens cached the second time"


async def test_no_replay_port() -> None:
    async with worker(kv_event_sources=False) as mock:
        report = await checked(mock, events=mock.events_endpoints[0])
    assert the(report, "replay").severity is WARNING
    assert "there is no replay port" in the(report, "replay").seen


async def test_replay_port_that_is_closed() -> None:
    async with worker() as mock:
        report = await checked(mock, replay=CLOSED)
    assert the(report, "replay").seen == f"{CLOSED}: refused"


async def test_replay_port_that_never_answers() -> None:
    context = zmq.asyncio.Context()
    with context.socket(zmq.ROUTER) as silent:
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        async with worker() as mock:
            report = await checked(mock, replay=f"tcp://127.0.0.1:{port}")
    context.destroy(linger=0)
    assert the(report, "replay").severity is WARNING
    assert "does not come to its end (0 batches came)" in the(report, "replay").seen


async def test_ring_that_has_rolled() -> None:
    async with worker(buffer_steps=2) as mock:
        for number in range(5):
            await complete(mock, [100 + number] * 20)
        report = await checked(mock)
    finding = the(report, "replay")
    assert finding.severity is NOTE
    assert finding.seen.startswith("the oldest 3 batches are gone")


async def test_replay_with_holes() -> None:
    async with worker(replay_lossy_after=1) as mock:
        for number in range(3):
            await complete(mock, [100 + number] * 20)
        report = await checked(mock)
    assert the(report, "replay").seen.startswith("1 of 3 batches were missing")


@pytest.mark.parametrize("dialect", [{"event_format": "array", "replay_frames": 3}, {"event_format": "batch-map"}])
async def test_older_dialects_are_understood(dialect: dict[str, Any]) -> None:
    async with worker(**dialect, hash_format="bytes") as mock:
        await complete(mock, list(range(100, 140)))
        report = await checked(mock, scope=PROBE)
    assert report.worst is OK


async def test_block_sizes() -> None:
    async with worker(block_size=32) as mock, worker(block_size=16) as other:
        await complete(mock, list(range(100, 140)))
        apart = await checked(mock, other)
        router = await checked(mock, router={"block_size": 16})
        entry = await checked(mock, block_size=64)
    assert [each.name for each in apart.workers] == ["w0", "w1", "all workers"]
    assert "blocks of different sizes: 16 (w1), 32 (w0)" in apart.workers[-1].findings[0].seen
    assert the(router, "block size").fix == "set --router-block-size 32, or start the worker with --block-size 16"
    assert the(entry, "block size").seen == "w0 is configured with block size 64 but reports 32"


async def test_adapters_and_models() -> None:
    async with worker(loras=("poet",)) as mock:
        await complete(mock, list(range(100, 140)), model="poet")
        good = await checked(mock, models=("mock", "poet"))
        bad = await checked(mock, models=("mock", "prose"))
    assert the(good, "adapters").seen == "poet"
    assert of(good, "models") == []
    assert the(bad, "models").seen == "its entry names prose, which it does not serve"


async def test_cached_tokens_untold() -> None:
    async with worker(prompt_tokens_details=False) as mock:
        report = await checked(mock, scope=PROBE)
    assert the(report, "cached tokens").fix == "start it with --enable-prompt-tokens-details"
    assert report.exit_code == 1


@pytest.mark.parametrize(("skew_s", "says"), [(7.0, "7.0 s ahead of"), (-7.0, "7.0 s behind")])
async def test_clocks_apart(skew_s: float, says: str) -> None:
    async with worker(clock_skew_s=skew_s) as mock:
        report = await checked(mock, scope=PROBE)
    assert the(report, "clock").severity is WARNING
    assert says in the(report, "clock").seen or f"{float(says[:3]) - 0.1:.1f}" in the(report, "clock").seen


async def test_blocks_reported_again_when_they_are_reused() -> None:
    async with worker() as mock:
        for _ in range(4):
            await complete(mock, list(range(100, 140)), vllm_xargs={"kv_cache_report_mode": "full"})
        report = await checked(mock)
        repeated = the(report, "report mode")
    assert repeated.severity is WARNING
    assert "3 stores of held blocks" in repeated.seen


@pytest.mark.parametrize(("shift", "severity"), [(0, OK), (1, FAILURE)])
async def test_tokenizers_are_compared(
    shift: int, severity: Severity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The mock's own encoding stands in for a tokenizer's files; the comparison is over its real /tokenize.
    monkeypatch.setattr(tokenizer, "_load", lambda _: lambda text: array("I", encode_text(text)[shift:]))
    async with worker() as mock:
        spec = WorkerSpec("w0", mock.url, ENDPOINT)
        config = Config(endpoints=(ENDPOINT,), workers=(spec,))
        server = config.server.model_copy(update={"tokenizer": tmp_path})
        report = await inspect(config.model_copy(update={"server": server}), QUICK)
    assert the(report, "tokenizer").severity is severity


async def test_old_engine() -> None:
    async with worker(version="0.9.2") as mock:
        report = await checked(mock)
    assert the(report, "version").severity is FAILURE


async def test_time_is_bounded() -> None:
    async with worker() as mock:
        mock.pause()
        started = asyncio.get_running_loop().time()
        report = await checked(mock, scope=Scope(timeout_s=1, listen_s=0, probe=True))
        assert asyncio.get_running_loop().time() - started < 5
    assert the(report, "time").severity is FAILURE
    assert the(report, "replay").severity is OK  # what was seen counts


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvrouter_grpc", "check", "--endpoint", ENDPOINT, *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_for_people_and_for_pipelines() -> None:
    with mock_worker("--full-speed", "--no-prompt-tokens-details") as mock:
        flags = ["--worker", worker_flag("w0", mock), "--listen-for", "0"]
        quiet = command(*flags)
        table = command(*flags, "--probe")
        plain = command(*flags, "--probe", "--problems", "--json")
        mixed = command(*flags, "--worker", "name=w1,url=http://127.0.0.1:1", "--json")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert table.returncode == 1
    assert "start it with --enable-prompt-tokens-details" in table.stdout
    assert "0 failures, 1 warning, 0 notes, 10 ok" in table.stdout
    assert plain.returncode == 1
    said = json.loads(plain.stdout)
    assert said["worst"] == "warning"
    assert [each["check"] for each in said["workers"][0]["findings"]] == ["cached tokens"]
    assert mixed.returncode == 2
    assert [each["name"] for each in json.loads(mixed.stdout)["workers"]] == ["w0", "w1"]


def test_command_without_workers_is_a_fault_of_the_configuration() -> None:
    done = command()
    assert done.returncode == 64
    assert "write --worker url=" in done.stderr
