"""Suite: many decisions per call: the batch and the stream form of BestWorkerId."""

from contextlib import ExitStack

from bench import traffic
from bench.harness import Bench, main
from bench.side import Side
from kvrouter_grpc._gen import router_pb2

LENGTH = 512
FORMS = (
    # case, kind, requests per message, messages in flight
    ("unary_c16", "best_worker", 1, 16),
    ("batches_of_16_c4", "batch", 16, 4),
    ("batches_of_64_c4", "batch", 64, 4),
    ("batches_of_256_c4", "batch", 256, 4),
    ("streams_of_1_c16", "stream", 1, 16),
    ("streams_of_16_c4", "stream", 16, 4),
    ("streams_of_64_c4", "stream", 64, 4),
    ("streams_of_256_c4", "stream", 256, 4),
)
TIMES = 5  # our goal: as many decisions per CPU as unary calls give


def run(bench: Bench) -> None:
    """CPU of the server process per decision at 512 tokens, 8 workers; latency of whole messages."""
    if not hasattr(router_pb2, "BestWorkerIdBatchRequest"):
        bench.figures.note("the contract has no batch form of BestWorkerId")
        return
    with ExitStack() as stack:
        fleet = traffic.Fleet(stack)
        router = fleet.router(stack)
        fleet.warm([LENGTH], [router.pid])
        load = stack.enter_context(Side("bench.sides.load"))
        cases = []
        for case, kind, batch, concurrency in FORMS:
            driver = traffic.to_load(load, router.address, router.pid, kind, batch=batch)
            found = traffic.drive_all(bench, {"ours": driver}, length=LENGTH, concurrency=concurrency)["ours"]
            bench.figures.put_all(f"batch.{case}.ours", found)
            if kind != "best_worker" and batch > 1:
                unary = bench.figures.values["batch.unary_c16.ours.cpu_us"]
                bench.figures.put(f"batch.{case}.goal.cpu_us", unary / TIMES)
            cases.append(case)
    bench.show("BestWorkerId in batches: server CPU us per decision", "batch", "cpu_us", cases)
    bench.show("BestWorkerId in batches: decisions per second", "batch", "per_s", cases)
    bench.show("BestWorkerId in batches: p50 ms per message", "batch", "p50_ms", cases)


if __name__ == "__main__":
    main(run)
