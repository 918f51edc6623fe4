"""Suite: how much of a prompt every worker holds."""

from bench.harness import Bench, best_by, main


def run(bench: Bench) -> None:
    """Microseconds per lookup in a tree with half a million blocks of background.

    `part`: every worker holds a quarter of the prompt. `full`: also, every fourth worker holds half of it and one all.
    We are given sequence hashes, Dynamo block hashes; both are what their request path has at that point. Of Dynamo's
    time a good part is the conversion of the list.
    """
    cases = []
    with bench.sides() as sides:
        for workers in (8, 64, 256):
            for blocks in (512, 8192):
                for shape in ("full", "part"):
                    case = f"{shape}_{blocks}_x_{workers}"
                    cases.append(case)
                    queries = 16 if blocks == 512 else 4
                    sizes = {"background": bench.size(500_000, 5_000), "queries": queries}
                    for side in sides.values():
                        side.call("prepare_match", workers=workers, blocks=blocks, shape=shape, **sizes)
                    for name, rounds in bench.interleave(sides, "match", passes=bench.size(2000 // queries, 3)).items():
                        figures = {f"{measure}_us": value for measure, value in best_by(rounds).items()}
                        bench.figures.put_all(f"match.{case}.{name}", figures)
    bench.show("match so many blocks x workers, p50 us", "match", "p50_us", cases)
    bench.show("match so many blocks x workers, p99 us", "match", "p99_us", cases)


if __name__ == "__main__":
    main(run)
