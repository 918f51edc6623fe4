"""Suite: KV events from raw messages into the index, in process."""

from bench.harness import Bench, best_by, main

WORKERS = 64


def run(bench: Bench) -> None:
    """Microseconds of CPU per block stored and removed: 64 workers with mostly distinct blocks.

    We read vLLM's messages and hash the tokens in them; Dynamo's `RadixTree` is given JSON with ready hashes.
    """
    cases = []
    for per_event in (1, 32, 256):
        blocks_each = bench.size(20_000 if per_event > 1 else 4_000, 200)
        with bench.sides() as sides:
            for side in sides.values():
                side.call("prepare_events", workers=WORKERS, blocks_each=blocks_each, per_event=per_event)
            for name, rounds in bench.interleave(sides, "events").items():
                found = best_by(rounds)
                for verb in ("store", "remove"):
                    bench.figures.put(f"events.{verb}_{per_event}_per_event.{name}.us_per_block", found[verb])
    cases = [f"{verb}_{per_event}_per_event" for verb in ("store", "remove") for per_event in (1, 32, 256)]
    bench.show("events in process, CPU us per block", "events", "us_per_block", cases)


if __name__ == "__main__":
    main(run)
