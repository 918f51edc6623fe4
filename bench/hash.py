"""Suite: block and sequence hashes of a prompt."""

from bench.harness import Bench, best, main

LENGTHS = (512, 8192, 131_072)


def run(bench: Bench) -> None:
    """Microseconds of CPU per prompt, block size 16.

    The limit is a C loop of the same XXH3 calls. Dynamo's binding gives the block hashes only, and takes a list: most
    of its time goes into converting that, which `dynamo_conversion` shows.
    """
    with bench.sides(limit=True) as sides:
        for length in LENGTHS:
            amount = {"tokens": length, "batches": bench.size(20, 2), "repeats": max(1, 131_072 // length)}
            for name, values in bench.interleave(sides, "hash_prompt", **amount).items():
                bench.figures.put(f"hash.{length}.{name}.us", best(values))
            if "dynamo" in sides:
                converted = bench.interleave({"": sides["dynamo"]}, "convert_prompt", **amount)
                bench.figures.put(f"hash.{length}.dynamo_conversion.us", best(converted[""]))
    title = "hash a prompt of so many tokens, CPU us"
    bench.show(title, "hash", "us", [str(length) for length in LENGTHS], ["dynamo_conversion"])


if __name__ == "__main__":
    main(run)
