"""Suite: memory of the index per block that a worker holds."""

from bench.harness import Bench, main


def run(bench: Bench) -> None:
    """Bytes per (worker, block), 64 workers x 20,000 mostly distinct blocks.

    By how much the process grew (`bytes`), what the index itself counts (`counted`), both also after everything was
    cleared.
    """
    with bench.sides() as sides:
        for name, side in sides.items():
            found = side.call("memory", workers=64, blocks_each=bench.size(20_000, 300))
            bench.figures.put(f"memory.per_block.{name}.bytes", found.pop("rss"))
            bench.figures.put_all(f"memory.per_block.{name}", found)
    bench.show("memory per (worker, block): growth of the process, bytes", "memory", "bytes", ["per_block"])
    bench.show("the same after clearing", "memory", "rss_after_clear", ["per_block"])


if __name__ == "__main__":
    main(run)
