"""Suite: BestWorkerId over gRPC."""

from contextlib import ExitStack

from bench import dynamo, traffic
from bench.harness import Bench, main
from bench.side import Side

RATIO = 1.15  # our goal, times the bare server


def run(bench: Bench) -> None:
    """CPU of the server process per call, latency and throughput; 8 workers hold what half of the prompts share.

    The limit is a bare grpc.aio server on uvloop that takes the same messages and answers a constant of equal size. The
    peers are `dynamo.router` with its own client, and Dynamo's `select_service`, all of it Rust, which takes JSON over
    HTTP. All servers run at the same time and are driven in turn.
    """
    with ExitStack() as stack:
        fleet = traffic.Fleet(stack)
        router = fleet.router(stack)
        followers = [router.pid]
        load = stack.enter_context(Side("bench.sides.load"))
        floor = stack.enter_context(Side("bench.sides.floor"))
        drivers = {"ours": traffic.to_load(load, router.address, router.pid, "best_worker")}
        if dynamo.installed(bench):
            service = stack.enter_context(dynamo.select_service(fleet.addresses))
            followers.append(service.pid)
            drivers["dynamo"] = traffic.to_dynamo(stack, "best_worker")
            drivers["select_service"] = traffic.to_load(load, service.address, service.pid, "http_select")
        fleet.warm(traffic.LENGTHS, followers)
        reply = load.call("one_reply", address=router.address, length=traffic.LENGTHS[0])
        bare = floor.call("open_server", reply_hex=reply)
        drivers["limit"] = traffic.to_load(load, bare, floor.pid, "best_worker")
        cases = traffic.drive_cases(bench, "best_worker", drivers)
    for case in cases:
        least = bench.figures.values[f"best_worker.{case}.limit.cpu_us"]
        bench.figures.put(f"best_worker.{case}.goal.cpu_us", RATIO * least)
    peers = ["select_service"]
    bench.show("BestWorkerId, server CPU us per call", "best_worker", "cpu_us", cases, peers)
    bench.show("BestWorkerId, calls per second", "best_worker", "per_s", cases, peers)
    bench.show("BestWorkerId, p50 ms", "best_worker", "p50_ms", cases, peers)
    bench.show("BestWorkerId, p99 ms", "best_worker", "p99_ms", cases, peers)


if __name__ == "__main__":
    main(run)
