"""Writes docs/performance.md out of `bench/results/latest.json` and the plots."""

import json
from collections.abc import Iterable

from bench.batch import FORMS
from bench.figures import Figures
from bench.side import ROOT

LATEST = ROOT / "bench/results/latest.json"
PAGE = ROOT / "docs/performance.md"

LENGTHS = (512, 8192, 32_768)
WIRE = [f"{length}_tokens_c{calls}" for length in LENGTHS for calls in (1, 16, 64)]


def main() -> None:
    """Write the page."""
    figures = Figures()
    figures.read(LATEST)
    content = json.loads(LATEST.read_text())
    PAGE.write_text(page(figures, content["machine"], content["notes"]))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def page(figures: Figures, machine: str, notes: Iterable[str]) -> str:
    """The page as Markdown."""

    def table(title: str, suite: str, measure: str, cases: Iterable[str], extra: Iterable[str] = ()) -> str:
        return markdown(shown.rows(title, suite, measure, cases, list(extra)))

    shown = Figures()  # what we want to reach is for those who work on it
    shown.values = {key: value for key, value in figures.values.items() if ".goal." not in key}
    batches = [form[0] for form in FORMS]
    remarks = "".join(f"\n> {note}\n" for note in notes)
    return f"""<!-- Written by `make bench-docs`; edit bench/page.py instead. -->
# Performance

What the router costs, beside its peer and beside what cannot be beaten. `make bench` repeats every figure on your
machine: it takes about twenty minutes and needs nothing but Python, a C compiler and a package index.

Measured on {machine}.

The client shares the CPUs with the servers, so **CPU time of the server process** is what compares; latency and
throughput depend on who else runs. The sides take turns, so that all of them meet the same machine. Of CPU times the
least of several counts, since nothing makes a computation faster than it is; of latency and throughput the median. How
each figure is made: [bench/README.md](../bench/README.md).
{remarks}
## Deciding

A decision hashes the prompt, finds how much of it every worker holds, weighs that against the work booked on each, and
picks. Only hashing grows with the prompt: the index compares whole runs of blocks at once, see
[architecture](architecture.md).

{table("whole decision in process, CPU µs", "decide", "us", _decisions())}

{table("hash the blocks of a prompt, CPU µs", "hash", "us", ["512", "8192", "131072"], ["dynamo_conversion"])}

{table("match (blocks x workers), p50 µs", "match", "p50_us", _matches())}

How to read it: the limit of hashing is a C loop of the same XXH3 calls. Dynamo's figures are those of its Python
bindings, where most of a hash call is the conversion of the token list (the column beside it) and a good part of a
match is the conversion of the hashes; inside Rust its hash takes about a nanosecond per token. Its decision is that of
`KvRouter` in process over 8 workers, ours over 64 and 1,024 that hold 1.28 million blocks.

![A decision by length of the prompt](img/performance-length.svg)

![A decision by number of workers](img/performance-workers.svg)

![A decision and a stored block by size of the index](img/performance-blocks.svg)

## Following the caches

{table("in process, from raw messages, CPU µs per block", "events", "us_per_block", _events())}

{table("over ZeroMQ into the serving process, CPU µs per block", "stream", "us_per_block", _streams())}

`32x1` are messages of one event with 32 blocks, as a prefill makes them; `1x1` one block, as decoding does; `1x32` 32
events of one block in one message, each going on where the one before ends. We decode the engine's own msgpack and hash
the token ids in it. In process, Dynamo's `RadixTree` is given JSON with the hashes ready; over ZeroMQ, its `indexer`, a
Rust program, reads the same messages as we do.

What is left of a stored block: reading its token ids and waiting for its entry in the table of engine hashes take
about a third each; most of the rest is copying the tables of an index that grows; hashing takes less than a tenth. Over
ZeroMQ libzmq's own thread adds 0.1 µs per block of `32x1`, two thirds of that in the kernel: it reads 8 KiB at a time,
and only builds with its draft API can be told to read more. At `1x1` it wakes up for nearly every message.

{table("BestWorkerId while 64 workers publish as fast as they can, p99 ms", "stream", "p99_ms", ["calm", "storm"])}

![CPUs and latency by rate of events](img/performance-events.svg)

{table("memory per (worker, block), bytes", "memory", "bytes", ["per_block"])}

## Warm starts

{table("snapshot of 64 workers x 20,000 blocks, bytes per block", "snapshot", "bytes_per_block", ["64_workers"])}

{table("writing it, ms", "snapshot", "write_ms", ["64_workers"])}

{table("reading it into an empty index, ms", "snapshot", "read_ms", ["64_workers"])}

{table("its longest stretch on the event loop, CPU ms", "snapshot", "stall_ms", ["64_workers"])}

{table("a decision of 8,192 tokens meanwhile, p99 ms", "snapshot", "p99_ms", ["calm", "writing"])}

## Over gRPC

{table("BestWorkerId, server CPU µs per call", "best_worker", "cpu_us", WIRE, ["select_service"])}

{table("BestWorkerId, calls per second", "best_worker", "per_s", WIRE, ["select_service"])}

{table("BestWorkerId, p99 ms", "best_worker", "p99_ms", WIRE, ["select_service"])}

The limit is a bare grpc.aio server that takes the same messages, reads nothing and answers a constant; `c16` means 16
calls in flight. The peers are `dynamo.router` with its own client over its own request plane, and Dynamo's
`select_service`, a Rust program that takes JSON over HTTP and uses several CPUs.

{table("BestWorkerId in batches, 512 tokens: CPU µs per decision", "batch", "cpu_us", batches)}

{table("Generate, 32 tokens: router CPU µs per request", "generate", "cpu_us", WIRE)}

{table("Generate, 32 tokens: ms to the first token, p50", "generate", "first_ms", WIRE)}

Each router runs over eight mock workers of its own project, which answer as fast as they can.
"""


def markdown(rows: list[list[str]]) -> str:
    """A table of the page, or a remark that there is nothing to show."""
    head, *body = rows
    if len(head) == 1:
        return f"*{head[0]}: not measured.*"
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _decisions() -> list[str]:
    return [*(f"64_workers_{length}_tokens" for length in LENGTHS), "1024_workers_8192_tokens"]


def _matches() -> list[str]:
    return [
        f"{shape}_{blocks}_x_{workers}"
        for shape in ("full", "part")
        for blocks in (512, 8192)
        for workers in (8, 64, 256)
    ]


def _events() -> list[str]:
    return [f"{verb}_{count}_per_event" for verb in ("store", "remove") for count in (1, 32, 256)]


def _streams() -> list[str]:
    return [f"{verb}_{shape}" for verb in ("store", "remove") for shape in ("1x1", "1x32", "32x1", "256x1")]


if __name__ == "__main__":
    main()
