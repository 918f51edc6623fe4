"""`kvrouter check` finds nothing wrong with real engines, and what is wrong with their entries."""

from dataclasses import replace
from typing import Any

import pytest

from e2e.engines import Engine
from e2e.router import ENDPOINT
from kvrouter_grpc.check import Scope
from kvrouter_grpc.check.finding import Finding, Severity
from kvrouter_grpc.check.report import Report
from kvrouter_grpc.check.run import inspect
from kvrouter_grpc.config import Config
from kvrouter_grpc.types import WorkerSpec

pytestmark = pytest.mark.vllm

PROBE = Scope(timeout_s=60, listen_s=0, probe=True)


async def checked(*engines: Engine, **fields: Any) -> Report:
    specs = [
        replace(WorkerSpec(engine.name, engine.url, ENDPOINT, events=engine.events, replay=engine.replay), **fields)
        for engine in engines
    ]
    return await inspect(Config.model_validate({"endpoints": (ENDPOINT,), "workers": tuple(specs)}), PROBE)


def troubles(report: Report) -> list[Finding]:
    """What is not well. Engines that have served many tests may have rolled their rings."""
    return [
        each
        for worker in report.workers
        for each in worker.findings
        if each.severity is not Severity.OK and "batches" not in each.seen
    ]


async def test_engines_are_well(fleet: list[Engine]) -> None:
    report = await checked(*fleet)
    assert troubles(report) == []
    looked_at = {each.check for each in report.workers[0].findings}
    assert {"http", "version", "block size", "prefix caching", "topic", "replay", "clock", "probe"} <= looked_at
    assert all(
        any(each.check == "cached tokens" and each.severity is Severity.OK for each in worker.findings)
        for worker in report.workers
    )


async def test_every_rank_is_well(ranks: Engine) -> None:
    report = await checked(ranks)
    assert troubles(report) == []
    probed = [each.rank for each in report.workers[0].findings if each.check == "probe"]
    assert probed == [0, 1]


async def test_entries_that_are_wrong(fleet: list[Engine]) -> None:
    alpha, beta = fleet
    report = await checked(
        alpha, topic="other", block_size=alpha.block_size * 2, events=beta.replay, models=("somebody",)
    )
    assert {each.check for each in troubles(report)} >= {"topic", "block size", "events", "models"}
    assert report.exit_code == 2
