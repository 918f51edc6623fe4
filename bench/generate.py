"""Suite: Generate over gRPC, through the router to the workers and back."""

from contextlib import ExitStack

from bench import dynamo, programs, traffic
from bench.harness import Bench, main
from bench.side import Side


def run(bench: Bench) -> None:
    """CPU of the router per request of 32 tokens, over 8 mock workers at full speed.

    The peer is `dynamo.router` over its own mock workers. Workers and client share the machine's CPUs with the router,
    so only its own CPU compares; calls per second say which program ends first.
    """
    with ExitStack() as stack:
        workers = stack.enter_context(programs.mock_workers(traffic.WORKERS))
        router = stack.enter_context(programs.router(workers))
        load = stack.enter_context(Side("bench.sides.load"))
        drivers = {"ours": traffic.to_load(load, router.address, router.pid, "generate")}
        if dynamo.installed(bench):
            drivers["dynamo"] = traffic.to_dynamo(stack, "generate")
        cases = traffic.drive_cases(bench, "generate", drivers)
    bench.show("Generate, 32 tokens: router CPU us per request", "generate", "cpu_us", cases)
    bench.show("Generate, 32 tokens: requests per second", "generate", "per_s", cases)
    bench.show("Generate, 32 tokens: p50 ms to the first token", "generate", "first_ms", cases)


if __name__ == "__main__":
    main(run)
