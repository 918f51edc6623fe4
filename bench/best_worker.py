"""Suite: BestWorkerId over gRPC."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench import dynamo, meter, programs
from bench.harness import Bench, main, middle_by
from bench.side import Side

WORKERS = 8
LENGTHS = (512, 8192, 32_768)
CONCURRENCY = (1, 16, 64)
RATIO = 1.15  # our goal, times the bare server

Drive = Callable[..., dict[str, float]]


def run(bench: Bench) -> None:
    """CPU of the server process per call, latency and throughput, 8 workers that hold what half of the prompts share.

    The limit is a bare grpc.aio server on uvloop that takes the same messages and answers a constant of equal size. The
    peer is `dynamo.router` with its own client. All servers run at the same time and are driven in turn.
    """
    with ExitStack() as stack:
        publisher = stack.enter_context(Side("bench.sides.publisher"))
        opened = publisher.call("open_workers", workers=WORKERS)
        workers = [f"name=w{i},url={opened['url']},events={address}" for i, address in enumerate(opened["events"])]
        router = stack.enter_context(programs.router(workers, "--router-block-size", "16"))
        publisher.call("await_listeners")
        publisher.call("prepare_pools", lengths=list(LENGTHS))
        publisher.call("publish", name="warm")
        meter.wait_idle([router.pid])
        load = stack.enter_context(Side("bench.sides.load"))
        floor = stack.enter_context(Side("bench.sides.floor"))
        reply = load.call("one_reply", address=router.address, length=512)
        floor_address = floor.call("open_server", reply_hex=reply)
        drivers: dict[str, tuple[Drive, dict[str, int]]] = {
            "ours": (_grpc(load, router.address), {"server": router.pid, "client": load.pid}),
            "limit": (_grpc(load, floor_address), {"server": floor.pid, "client": load.pid}),
        }
        if dynamo.installed(bench):
            client, pids = stack.enter_context(dynamo.router(WORKERS))
            for length in LENGTHS:
                client.call("warm", length=length)
            named = {"server": pids.router, "client": client.pid, "workers": pids.workers}
            drivers["dynamo"] = (_dynamo(client), named)
        cases = []
        for length in LENGTHS:
            for concurrency in CONCURRENCY:
                case = f"{length}_tokens_c{concurrency}"
                cases.append(case)
                for name, found in drive_all(bench, drivers, length=length, concurrency=concurrency).items():
                    bench.figures.put_all(f"best_worker.{case}.{name}", found)
                bare = bench.figures.values[f"best_worker.{case}.limit.cpu_us"]
                bench.figures.put(f"best_worker.{case}.goal.cpu_us", RATIO * bare)
    bench.show("BestWorkerId over gRPC, server CPU us per call", "best_worker", "cpu_us", cases)
    bench.show("BestWorkerId over gRPC, calls per second", "best_worker", "per_s", cases)
    bench.show("BestWorkerId over gRPC, p50 ms", "best_worker", "p50_ms", cases)
    bench.show("BestWorkerId over gRPC, p99 ms", "best_worker", "p99_ms", cases)


def _grpc(load: Side, address: str) -> Drive:
    def drive(**arguments: Any) -> dict[str, float]:
        found: dict[str, float] = load.call("drive", address=address, kind="best_worker", **arguments)
        return found

    return drive


def _dynamo(client: Side) -> Drive:
    def drive(**arguments: Any) -> dict[str, float]:
        found: dict[str, float] = client.call("drive", kind="best_worker", **arguments)
        return found

    return drive


def drive_all(
    bench: Bench, drivers: dict[str, tuple[Drive, dict[str, int]]], **arguments: Any
) -> dict[str, dict[str, float]]:
    """Windows of traffic on each server in turn; medians by server.

    Returns:
        `cpu_us` and `client_cpu_us` per call, `per_s`, `p50_ms`, `p99_ms` and what else the driver found.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in drivers}
    for drive, _ in drivers.values():
        drive(seconds=0.3 if not bench.quick else 0.1, **arguments)  # connections, caches, branch predictors
    for _ in range(bench.size(3, 1)):
        for name, (drive, pids) in drivers.items():
            bench.settle()
            with meter.Window(pids) as window:
                found = drive(seconds=1.5 if not bench.quick else 0.2, **arguments)
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
    return {name: middle_by(found) for name, found in rounds.items()}


if __name__ == "__main__":
    main(run)
