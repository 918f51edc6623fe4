"""Suite: how the cost grows with the length of the prompt, the workers, the blocks in the index and the rate of events.

Not part of `python -m bench`: it feeds the plots of docs/performance.md (`make bench-docs`).
"""

from contextlib import ExitStack

from bench import meter, traffic
from bench.harness import Bench, best_by, main, window_by
from bench.side import Side

LENGTHS = (128, 512, 2048, 8192, 32_768, 131_072)
WORKERS = (1, 4, 16, 64, 256, 1024)
BLOCKS_EACH = (250, 1000, 4000, 16_000, 64_000)
RATES = (0, 250, 500, 1000, 2000, 4000, 8000, 16_000)  # messages per second
PER_EVENT = 32
PROMPT = 8192


def run(bench: Bench) -> None:
    """All four curves."""
    by_length(bench)
    by_workers(bench)
    by_blocks(bench)
    by_event_rate(bench)


def by_length(bench: Bench) -> None:
    """Microseconds of a decision among 64 workers, and of hashing alone, by tokens of the prompt."""
    lengths = LENGTHS[: 3 if bench.quick else None]
    with bench.sides(limit=True, dynamo=False) as sides:
        ours = {"ours": sides["ours"]}
        for length in lengths:
            sides["ours"].call("prepare_decide", workers=64, blocks_each=bench.size(2000, 200), lengths=[length])
            decided = bench.interleave(ours, "timed", name=f"decide {length}", passes=2)["ours"]
            bench.figures.put(f"curve_length.{length}.ours.us", best_by(decided)["cpu"])
            amount = {"tokens": length, "batches": bench.size(20, 2), "repeats": max(1, 131_072 // length)}
            for name, values in bench.interleave(sides, "hash_prompt", **amount).items():
                bench.figures.put(f"curve_length.{length}.{name}.hash_us", min(values))
    cases = [str(length) for length in lengths]
    bench.show("decide among 64 workers, by tokens, CPU us", "curve_length", "us", cases)
    bench.show("hash alone, by tokens, CPU us", "curve_length", "hash_us", cases)


def by_workers(bench: Bench) -> None:
    """Microseconds of a decision about 8,192 tokens by number of workers, with about as many blocks in the index."""
    workers = WORKERS[: 3 if bench.quick else None]
    with bench.sides(dynamo=False) as sides:
        for count in workers:
            blocks_each = max(64, bench.size(256_000, 2000) // count)
            sides["ours"].call("prepare_decide", workers=count, blocks_each=blocks_each, lengths=[PROMPT])
            decided = bench.interleave(sides, "timed", name=f"decide {PROMPT}", passes=2)["ours"]
            bench.figures.put(f"curve_workers.{count}.ours.us", best_by(decided)["cpu"])
    bench.show(f"decide about {PROMPT} tokens, by workers, CPU us", "curve_workers", "us", [str(n) for n in workers])


def by_blocks(bench: Bench) -> None:
    """A decision, storing and memory, by blocks in the index."""
    cases = []
    with bench.sides(dynamo=False) as sides:
        for blocks_each in BLOCKS_EACH[: 2 if bench.quick else None]:
            arguments = {"workers": 64, "blocks_each": blocks_each, "lengths": [PROMPT]}
            found = sides["ours"].call("prepare_decide", **arguments)
            decided = bench.interleave(sides, "timed", name=f"decide {PROMPT}", passes=2)["ours"]
            case = str(found["blocks"])
            cases.append(case)
            bench.figures.put(f"curve_blocks.{case}.ours.us", best_by(decided)["cpu"])
            bench.figures.put(f"curve_blocks.{case}.ours.store_us", found["store_us"])
            bench.figures.put(f"curve_blocks.{case}.ours.bytes", found["bytes"])
    for title, measure in (
        ("decide, CPU us", "us"),
        ("store, CPU us per block", "store_us"),
        ("bytes per block", "bytes"),
    ):
        bench.show(f"by blocks in the index: {title}", "curve_blocks", measure, cases)


def by_event_rate(bench: Bench) -> None:
    """What storms of events (32 blocks a message, 64 workers) cost the router, and what they do to its answers."""
    rates = RATES[: 2 if bench.quick else None]
    seconds = 0.3 if bench.quick else 1.5
    with ExitStack() as stack:
        fleet = traffic.Fleet(stack, 64)
        publisher = fleet.publisher
        publisher.call("prepare_fleet", blocks_each=bench.size(16_000, 320), per_event=PER_EVENT, per_message=1)
        router = fleet.router(stack)
        publisher.call("await_listeners", count=1)
        load = stack.enter_context(Side("bench.sides.load"))
        calls = {"address": router.address, "kind": "best_worker", "length": 512, "concurrency": 1}
        load.call("drive", seconds=0.5, **calls)
        alone = 0.0  # CPU of a call without events
        for rate in rates:
            windows = []
            for _ in range(bench.size(3, 1)):
                bench.settle()
                pids = {"router": router.pid, "load": load.pid, "publisher": publisher.pid}
                with meter.Window(pids) as window:
                    if rate:
                        publisher.send("publish", name="stored", per_second=rate, seconds=seconds)
                    found = load.call("drive", seconds=seconds, **calls)
                    sent = publisher.receive()["messages"] if rate else 0
                if not rate:
                    alone = window.cpu["router"] / found["calls"]
                windows.append(
                    {
                        "blocks_per_s": sent * PER_EVENT / window.wall,
                        "cpus": max(0.0, window.cpu["router"] - found["calls"] * alone) / window.wall,
                        "p50_ms": found["p50_ms"],
                        "p99_ms": found["p99_ms"],
                    }
                )
                meter.wait_idle([router.pid])
                publisher.call("publish", name="removed")
                meter.wait_idle([router.pid])
                traffic.await_blocks(router, 0)
            bench.figures.put_all(f"curve_rate.{rate}.ours", window_by(windows))
    cases = [str(rate) for rate in rates]
    for title, measure in (
        ("blocks/s", "blocks_per_s"),
        ("CPUs for events", "cpus"),
        ("p50 ms", "p50_ms"),
        ("p99 ms", "p99_ms"),
    ):
        bench.show(f"by event messages per second: {title}", "curve_rate", measure, cases)


if __name__ == "__main__":
    main(run)
