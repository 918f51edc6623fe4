"""Engines live as long as the run; every test gets empty caches and a router of its own."""

import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from e2e.engines import E2E, FIRST_WORD, VOCABULARY, Engine, EngineOptions, Zygote
from e2e.router import Router

FLEETS = {
    "0.32.0": EngineOptions(block_size=32, blocks=64),
    "0.28.0": EngineOptions(block_size=16, blocks=128, tells_event_sockets=False),
}
TWO_RANKS = EngineOptions(block_size=32, blocks=64, lora=False, dp_size=2)
POOLS = EngineOptions(block_size=32, blocks=64, lora=False, kv_transfer=True)
LOG_TAIL = 40
STARTED = pytest.StashKey[float]()

Prompts = Callable[[int], list[int]]
Launch = Callable[..., Router]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what engines and router logged meanwhile."""
    report = yield
    if call.when == "setup":
        item.stash[STARTED] = call.start
    logs = getattr(item, "funcargs", {}).get("logs")
    if report.failed and logs is not None:
        for log in sorted(logs.iterdir()):
            if log.stat().st_mtime < item.stash[STARTED]:
                continue
            lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            report.sections.append((f"end of {log.name}", "\n".join(lines)))
    return report


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines and routers log."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def zygote(logs: Path) -> Iterator[Callable[[str], Zygote]]:
    """The zygote of a vLLM version, started when it is first asked for."""
    check = [sys.executable, str(E2E.parent.parent / "tools" / "vllm_env.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.exit(done.stdout.strip(), returncode=1)
    zygotes: dict[str, Zygote] = {}

    def of(version: str) -> Zygote:
        if version not in zygotes:
            zygotes[version] = Zygote(version, logs / f"zygote-{version}.log")
        return zygotes[version]

    yield of
    for each in zygotes.values():
        each.close()


def run_engines(
    zygote: Zygote, names: Sequence[str], options: EngineOptions, logs: Path
) -> Generator[list[Engine], None, None]:
    """Start engines side by side; kill them at the end."""
    engines = [Engine(zygote, name, options, logs / f"engine-{zygote.version}-{name}.log") for name in names]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.wait_ready()
    yield engines
    for engine in engines:
        engine.kill()


@pytest.fixture(scope="session", params=FLEETS, ids=[f"vllm-{version}" for version in FLEETS])
def running_fleet(
    request: pytest.FixtureRequest, zygote: Callable[[str], Zygote], logs: Path
) -> Generator[list[Engine], None, None]:
    """Two engines of one version; every test that uses them runs once with each version."""
    yield from run_engines(zygote(request.param), ["alpha", "beta"], FLEETS[request.param], logs)


@pytest.fixture(scope="session")
def running_ranks(zygote: Callable[[str], Zygote], logs: Path) -> Generator[list[Engine], None, None]:
    """One engine with two data-parallel ranks."""
    yield from run_engines(zygote("0.32.0"), ["ranks"], TWO_RANKS, logs)


@pytest.fixture(scope="session")
def running_pools(zygote: Callable[[str], Zygote], logs: Path) -> Generator[list[Engine], None, None]:
    """An engine that computes prompts and one that generates, with NIXL between them."""
    yield from run_engines(zygote("0.32.0"), ["prefill", "decode"], POOLS, logs)


@pytest.fixture
async def fleet(running_fleet: list[Engine]) -> list[Engine]:
    """Two engines that have nothing cached."""
    for engine in running_fleet:
        await engine.clear()
    return running_fleet


@pytest.fixture
async def ranks(running_ranks: list[Engine]) -> Engine:
    """An engine with two data-parallel ranks that have nothing cached."""
    (engine,) = running_ranks
    await engine.clear()
    return engine


@pytest.fixture
async def pools(running_pools: list[Engine]) -> tuple[Engine, Engine]:
    """A prefill and a decode engine that have nothing cached."""
    prefill, decode = running_pools
    for engine in running_pools:
        await engine.clear()
    return prefill, decode


@pytest.fixture
def launch(logs: Path, request: pytest.FixtureRequest) -> Launch:
    """Prepare a router in front of engines; `async with` starts it and, at the end, checks that it drains and exits 0."""
    name = request.node.name.replace("/", "-")

    def prepare(engines: Sequence[Engine], flags: Sequence[str] = (), **more: Any) -> Router:
        return Router(engines, logs / f"router-{name}.log", flags, **more)

    return prepare


@pytest.fixture
async def router(fleet: list[Engine], launch: Launch) -> AsyncIterator[Router]:
    """A router in front of the fleet that knows all of its events."""
    async with launch(fleet) as started:
        await started.settle()
        yield started


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> Prompts:
    """Random prompts of a given length, the same in every run of a test and different in every test."""
    source = random.Random(request.node.nodeid)
    return lambda length: source.choices(range(FIRST_WORD, VOCABULARY), k=length)
