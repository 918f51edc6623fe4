"""Suite: one decision in process, from the raw request."""

from bench import dynamo, meter
from bench.harness import Bench, best_by, main

LENGTHS = (512, 8192, 32_768)
PEER_WORKERS = 8
BOOKED = (512, 2048)  # blocks of a request
FLEETS = ((64, 20_000, LENGTHS), (1024, 1250, (8192,)))  # workers, blocks on each, prompt lengths


def run(bench: Bench) -> None:
    """Microseconds of CPU to the worker (`us`), to the raw reply (`reply_us`), and booked and released (`lease_us`).

    The raw reply is all but gRPC itself. Booking alone is counted per block (`us_per_block`).

    Half of the prompts begin with a prefix, three quarters of their length, that some workers hold. The peer is
    Dynamo's `KvRouter` binding, 16 calls at once, from a list of token ids to the worker. It has an easier task: 8
    workers, which cache those prompts only.
    """
    cases, bookings = [], []
    with bench.sides(dynamo=False) as sides:
        for workers, blocks_each, lengths in FLEETS:
            blocks = bench.size(blocks_each, 500)
            sides["ours"].call("prepare_decide", workers=workers, blocks_each=blocks, lengths=lengths)
            for length in lengths:
                case = f"{workers}_workers_{length}_tokens"
                cases.append(case)
                passes = bench.size(5, 1)
                decided = best_by(bench.interleave(sides, "timed", name=f"decide {length}", passes=passes)["ours"])
                replied = best_by(bench.interleave(sides, "timed", name=f"reply {length}", passes=passes)["ours"])
                leased = best_by(bench.interleave(sides, "timed", name=f"lease {length}", passes=passes)["ours"])
                bench.figures.put_all(
                    f"decide.{case}.ours",
                    {
                        "us": decided["cpu"],
                        "p99_us": decided["p99"],
                        "reply_us": replied["cpu"],
                        "lease_us": leased["cpu"],
                    },
                )
        for blocks in BOOKED:
            rounds = bench.interleave(sides, "booking", blocks=blocks, rounds=bench.size(5, 1))["ours"]
            for verb, taken in best_by(rounds).items():
                bookings.append(f"{verb}_{blocks}_blocks")
                bench.figures.put(f"decide.{bookings[-1]}.ours.us_per_block", taken)
    if dynamo.installed(bench):
        with dynamo.router(PEER_WORKERS) as (client, _):
            client.call("in_process")
            for length in LENGTHS:
                client.call("warm", length=length)
                drive = {"kind": "core", "length": length, "concurrency": 16}
                client.call("drive", seconds=0.3, **drive)
                found = []
                for _ in range(bench.rounds):
                    bench.settle()
                    before = meter.cpu_s(client.pid)
                    calls = client.call("drive", seconds=bench.size(10, 2) / 10, **drive)["calls"]
                    found.append((meter.cpu_s(client.pid) - before) / calls * 1e6)
                bench.figures.put(f"decide.64_workers_{length}_tokens.dynamo.us", min(found))
    bench.show("decide: raw request to worker, CPU us", "decide", "us", cases)
    bench.show("serve: raw request to raw reply, CPU us", "decide", "reply_us", cases)
    bench.show("lease: raw request to worker, booked and released, CPU us", "decide", "lease_us", cases)
    bench.show("book a request that nobody shares, CPU us per block", "decide", "us_per_block", bookings)


if __name__ == "__main__":
    main(run)
