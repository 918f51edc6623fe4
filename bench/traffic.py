"""Servers under traffic: a fleet for them to follow, and windows of calls to each in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from bench import dynamo, meter, programs
from bench.harness import Bench, window_by
from bench.side import Side

WORKERS = 8
LENGTHS = (512, 8192, 32_768)
CONCURRENCY = (1, 16, 64)
PATIENCE_S = 10.0


class Driver(NamedTuple):
    """Makes traffic to one server; `pids` are the processes that take part: `server`, `client` and others."""

    drive: Callable[..., dict[str, float]]
    pids: Mapping[str, int]


def to_load(load: Side, address: str, server_pid: int, kind: str, **arguments: Any) -> Driver:
    """The load generator against one server; see `bench.sides.load.drive`."""

    def drive(**more: Any) -> dict[str, float]:
        found: dict[str, float] = load.call("drive", address=address, kind=kind, **arguments, **more)
        return found

    return Driver(drive, {"server": server_pid, "client": load.pid})


def to_dynamo(stack: ExitStack, kind: str) -> Driver:
    """Dynamo's router over its mock workers, which hold the warm prompts, and its own client."""
    client, pids = stack.enter_context(dynamo.router(WORKERS))
    for length in LENGTHS:
        client.call("warm", length=length)

    def drive(**arguments: Any) -> dict[str, float]:
        found: dict[str, float] = client.call("drive", kind=kind, **arguments)
        return found

    return Driver(drive, {"server": pids.router, "client": client.pid, "workers": pids.workers})


class Fleet:
    """Workers that publish what they hold. Everything that follows them must do so before `warm`."""

    def __init__(self, stack: ExitStack, workers: int = WORKERS) -> None:
        self.publisher = stack.enter_context(Side("bench.sides.publisher"))
        opened = self.publisher.call("open_workers", workers=workers)
        self.addresses: list[str] = opened["events"]
        self.flags = [f"name=w{i},url={opened['url']},events={address}" for i, address in enumerate(self.addresses)]

    def router(self, stack: ExitStack) -> programs.Router:
        """A router of ours that follows them."""
        return stack.enter_context(programs.router(self.flags, "--router-block-size", "16"))

    def warm(self, lengths: Sequence[int], followers: Sequence[int]) -> None:
        """Let the workers hold the warm prompts of these lengths, and wait until the followers (pids) know it."""
        self.publisher.call("await_listeners", count=len(followers))
        self.publisher.call("prepare_pools", lengths=list(lengths))
        self.publisher.call("publish", name="warm")
        meter.wait_idle(followers)


def drive_cases(bench: Bench, suite: str, drivers: Mapping[str, Driver]) -> list[str]:
    """Drive every server with every length and concurrency, and put the figures; returns the cases."""
    cases = []
    for length in LENGTHS:
        for concurrency in CONCURRENCY:
            cases.append(f"{length}_tokens_c{concurrency}")
            for name, found in drive_all(bench, drivers, length=length, concurrency=concurrency).items():
                bench.figures.put_all(f"{suite}.{cases[-1]}.{name}", found)
    return cases


def drive_all(bench: Bench, drivers: Mapping[str, Driver], **arguments: Any) -> dict[str, dict[str, float]]:
    """Windows of traffic to each server in turn.

    Returns:
        By server: `cpu_us` and `client_cpu_us` per call, `per_s`, `p50_ms`, `p99_ms` and what else the driver found.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in drivers}
    for driver in drivers.values():
        driver.drive(seconds=0.1 if bench.quick else 0.3, **arguments)  # connections, caches, branch predictors
    for _ in range(bench.rounds):
        for name, driver in drivers.items():
            bench.settle()
            with meter.Window(driver.pids) as window:
                found = driver.drive(seconds=0.2 if bench.quick else 1.0, **arguments)
            calls = found.pop("calls")
            rounds[name].append(
                found
                | {
                    "cpu_us": window.cpu["server"] / calls * 1e6,
                    "client_cpu_us": window.cpu["client"] / calls * 1e6,
                    "per_s": calls / window.wall,
                    "foreign_cpus": window.foreign,
                }
            )
    return {name: window_by(found) for name, found in rounds.items()}


def await_blocks(router: programs.Router, expected: int) -> None:
    """Wait on, if the router only seemed idle: on a busy machine it may have been kept from running.

    Raises:
        AssertionError: It does not come to hold as many blocks as it should.
    """
    before, ends = -1, 0.0
    while (held := router.blocks()) != expected:
        if held != before:
            before, ends = held, time.monotonic() + PATIENCE_S
        elif time.monotonic() > ends:
            raise AssertionError(f"the router holds {held} blocks instead of {expected}")
        time.sleep(0.5)  # asking often would cost it more
