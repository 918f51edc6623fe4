"""Suite: one decision in process, from the raw request."""

from bench.harness import Bench, best_by, main

LENGTHS = (512, 8192, 32_768)
FLEETS = ((64, 20_000, LENGTHS), (1024, 1250, (8192,)))  # workers, blocks on each, prompt lengths


def run(bench: Bench) -> None:
    """Microseconds of CPU: to the worker (`us`), and to the serialized reply (`reply_us`): all but gRPC itself.

    Half of the prompts begin with a prefix, three quarters of their length, that some workers hold.
    """
    cases = []
    with bench.sides(dynamo=False) as sides:
        for workers, blocks_each, lengths in FLEETS:
            blocks = bench.size(blocks_each, 500)
            sides["ours"].call("prepare_decide", workers=workers, blocks_each=blocks, lengths=lengths)
            for length in lengths:
                case = f"{workers}_workers_{length}_tokens"
                cases.append(case)
                passes = bench.size(5, 1)
                decided = best_by(bench.interleave(sides, "decide", length=length, passes=passes)["ours"])
                replied = best_by(bench.interleave(sides, "serve_call", length=length, passes=passes)["ours"])
                bench.figures.put_all(
                    f"decide.{case}.ours",
                    {"us": decided["cpu"], "p99_us": decided["p99"], "reply_us": replied["cpu"]},
                )
    bench.show("decide: raw request to worker, CPU us", "decide", "us", cases)
    bench.show("serve: raw request to raw reply, CPU us", "decide", "reply_us", cases)


if __name__ == "__main__":
    main(run)
