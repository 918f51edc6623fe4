"""Suite: Generate over gRPC, through the router to the workers and back."""

from contextlib import ExitStack
from typing import Any

from bench import dynamo, programs
from bench.best_worker import CONCURRENCY, LENGTHS, WORKERS, Drive, drive_all
from bench.harness import Bench, main
from bench.side import Side


def run(bench: Bench) -> None:
    """CPU of the router per request of 32 tokens, over 8 mock workers at full speed.

    The peer is `dynamo.router` over its own mock workers. Workers and client share the machine's CPUs with the router,
    so only its own CPU compares; calls per second say which program ends first.
    """
    with ExitStack() as stack:
        workers = stack.enter_context(programs.mock_workers(WORKERS))
        router = stack.enter_context(programs.router(workers))
        load = stack.enter_context(Side("bench.sides.load"))
        ours = {"server": router.pid, "client": load.pid}
        drivers: dict[str, tuple[Drive, dict[str, int]]] = {"ours": (_grpc(load, router.address), ours)}
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
                    bench.figures.put_all(f"generate.{case}.{name}", found)
    bench.show("Generate, 32 tokens: router CPU us per request", "generate", "cpu_us", cases)
    bench.show("Generate, 32 tokens: requests per second", "generate", "per_s", cases)
    bench.show("Generate, 32 tokens: p50 ms to the first token", "generate", "first_ms", cases)


def _grpc(load: Side, address: str) -> Drive:
    def drive(**arguments: Any) -> dict[str, float]:
        found: dict[str, float] = load.call("drive", address=address, kind="generate", **arguments)
        return found

    return drive


def _dynamo(client: Side) -> Drive:
    def drive(**arguments: Any) -> dict[str, float]:
        found: dict[str, float] = client.call("drive", kind="generate", **arguments)
        return found

    return drive


if __name__ == "__main__":
    main(run)
