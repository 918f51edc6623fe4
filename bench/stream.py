"""Suite: KV events over ZeroMQ into the serving process."""

from contextlib import ExitStack

from bench import dynamo, meter, programs, traffic
from bench.harness import Bench, best_by, main
from bench.side import Side

WORKERS = 64
STORM = (32, 1)
SHAPES = ((1, 1), (1, 32), (32, 1), (256, 1))  # blocks per event, events per message


def run(bench: Bench) -> None:
    """Microseconds of CPU of the whole process per block: 64 publishers at full speed, from vLLM's frames to the index.

    The peer is `dynamo.indexer`, all of it Rust.
    """
    for per_event, per_message in SHAPES:
        case = f"{per_event}x{per_message}"
        blocks_each = bench.size(20_000 if per_event * per_message > 1 else 2_000, 320)
        with ExitStack() as stack:
            readers: dict[str, tuple[Side, int]] = {}
            fleet = _fleet(stack, blocks_each, per_event, per_message)
            router = fleet.router(stack)
            readers["ours"] = fleet.publisher, router.pid
            fleet.publisher.call("await_listeners", count=1)
            if dynamo.installed(bench):
                fleet = _fleet(stack, blocks_each, per_event, per_message)
                readers["dynamo"] = fleet.publisher, stack.enter_context(dynamo.indexer(fleet.addresses)).pid
                fleet.publisher.call("await_listeners", count=1)
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in readers}
            for _ in range(bench.size(3, 1)):
                for name, (publisher, pid) in readers.items():
                    bench.settle()
                    rounds[name].append(_round(publisher, pid, router if name == "ours" else None))
            if (per_event, per_message) == STORM:
                bench.figures.put_all("stream.storm.ours", _storm(bench, readers["ours"][0], router))
            for name, found in rounds.items():
                for measure, value in best_by(found).items():
                    verb, _, unit = measure.partition(".")
                    bench.figures.put(f"stream.{verb}_{case}.{name}.{unit}", value)
    cases = [f"{verb}_{a}x{b}" for verb in ("store", "remove") for a, b in SHAPES]
    bench.show("events over ZMQ, blocks x events per message, CPU us per block", "stream", "us_per_block", cases)
    bench.show("BestWorkerId amid a storm of events, p50 ms", "stream", "p50_ms", ["calm", "storm"])
    bench.show("BestWorkerId amid a storm of events, p99 ms", "stream", "p99_ms", ["calm", "storm"])


def _fleet(stack: ExitStack, blocks_each: int, per_event: int, per_message: int) -> traffic.Fleet:
    fleet = traffic.Fleet(stack, WORKERS)
    fleet.publisher.call("prepare_fleet", blocks_each=blocks_each, per_event=per_event, per_message=per_message)
    return fleet


def _round(publisher: Side, pid: int, router: programs.Router | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for verb, name in (("store", "stored"), ("remove", "removed")):
        before = meter.cpu_s(pid)
        sent = publisher.call("publish", name=name)
        meter.wait_idle([pid])
        if router is not None:
            traffic.await_blocks(router, sent["blocks"] if verb == "store" else 0)
        taken = meter.cpu_s(pid) - before
        found[f"{verb}.us_per_block"] = taken / sent["blocks"] * 1e6
        found[f"{verb}.us_per_message"] = taken / sent["messages"] * 1e6
    return found


def _storm(bench: Bench, publisher: Side, router: programs.Router) -> dict[str, float]:
    """Milliseconds of one BestWorkerId after another while all workers publish at full speed."""
    seconds = 0.3 if bench.quick else 2.0
    calls = {"address": router.address, "kind": "best_worker", "length": 512, "concurrency": 1, "seconds": seconds}
    with Side("bench.sides.load") as load:
        bench.settle()
        calm = load.call("drive", **calls)
        publisher.send("storm", seconds=seconds)
        found = load.call("drive", **calls)
        publisher.receive()
    bench.figures.put_all("stream.calm.ours", {name: calm[name] for name in ("p50_ms", "p99_ms")})
    return {name: found[name] for name in ("p50_ms", "p99_ms")}


if __name__ == "__main__":
    main(run)
