"""Suite: the snapshot of an index: its size, how long writing and reading it takes, and what decisions notice of it."""

from bench.harness import PINNED, Bench, best, main
from bench.side import Side

WORKERS = 64


def run(bench: Bench) -> None:
    """64 workers x 20,000 blocks, written to disk and read into an empty index.

    `stall_ms` is the CPU time for which the largest piece holds the event loop: what a decision may wait longer for it.
    `calm` and `writing`: milliseconds from when a decision of 8,192 tokens was due to when it was made, one every
    millisecond, on the event loop that also writes the snapshot, again and again while `writing`.
    """
    case = f"{WORKERS}_workers"
    with Side("bench.sides.snapshots", prefix=PINNED) as ours:
        ours.call("prepare", workers=WORKERS, blocks_each=bench.size(20_000, 300), length=8192)
        rounds = []
        for _ in range(bench.rounds):
            bench.settle()
            rounds.append(ours.call("round_trip"))
        for measure in rounds[0]:
            bench.figures.put(f"snapshot.{case}.ours.{measure}", best([each[measure] for each in rounds]))
        for state in ("calm", "writing"):
            found = []
            for _ in range(bench.rounds):
                bench.settle()
                found.append(ours.call("decide_while", writing=state == "writing", seconds=bench.size(3, 1)))
            for measure in found[0]:
                bench.figures.put(f"snapshot.{state}.ours.{measure}", best([each[measure] for each in found]))
    for measure in rounds[0]:
        bench.show(f"snapshot, {measure}", "snapshot", measure, [case])
    bench.show("a decision meanwhile, p50 ms", "snapshot", "p50_ms", ["calm", "writing"])
    bench.show("a decision meanwhile, p99 ms", "snapshot", "p99_ms", ["calm", "writing"])


if __name__ == "__main__":
    main(run)
