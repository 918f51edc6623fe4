"""Suite: instructions and allocations per operation, counted by callgrind.

They are the same on a busy machine as on a quiet one. Optional: needs valgrind and its headers.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from bench.harness import Bench, main
from bench.side import ROOT, Side

ALLOCATORS = ("malloc", "calloc", "realloc", "posix_memalign")
OUT = ROOT / ".cache/bench/callgrind"


def run(bench: Bench) -> None:
    """Instructions and calls of the allocator, per prompt, lookup, decision, reply and block.

    Python's small objects are allocated one by one here (PYTHONMALLOC=malloc), so that each of them counts.
    """
    if shutil.which("valgrind") is None or not Path("/usr/include/valgrind/callgrind.h").exists():
        bench.figures.note("valgrind or its headers are not installed, so instructions are not counted")
        return
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    valgrind = ("valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={OUT}/out")
    cases = []
    with Side("bench.sides.ours", prefix=valgrind, env={"PYTHONMALLOC": "malloc"}) as side:

        def count(case: str, name: str, times: int, per: float = 1) -> None:
            done = side.call("count", name=name, times=times)
            newest = max(OUT.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            instructions, allocations = totals(newest.read_text().splitlines())
            newest.unlink()
            bench.figures.put(f"instructions.{case}.ours.instructions", instructions / done / per)
            bench.figures.put(f"instructions.{case}.ours.allocations", allocations / done / per)
            cases.append(case)

        side.call("hash_prompt", tokens=8192, batches=1, repeats=1)
        count("hash_8192_tokens", "hash 8192", 20)
        side.call("prepare_match", workers=64, blocks=512, shape="full", background=bench.size(64_000, 640), queries=4)
        count("match_512_blocks_x_64_workers", "match", 100)
        lengths = [512, 8192]
        side.call("prepare_decide", workers=64, blocks_each=bench.size(2000, 300), lengths=lengths)
        for length in lengths:
            count(f"decide_{length}_tokens_x_64_workers", f"decide {length}", 20)
            count(f"reply_{length}_tokens_x_64_workers", f"reply {length}", 20)
        for per_event in (1, 32, 256):
            blocks_each = bench.size(2000, 300) if per_event > 1 else 300
            built = side.call("prepare_events", workers=8, blocks_each=blocks_each, per_event=per_event)
            for verb in ("store", "remove"):
                per_message = built["blocks"] / built["messages"]
                count(f"{verb}_{per_event}_per_event", verb, built["messages"], per_message)
    bench.show("instructions per operation (events: per block)", "instructions", "instructions", cases)
    bench.show("allocations per operation (events: per block)", "instructions", "allocations", cases)


def totals(lines: Iterable[str]) -> tuple[int, int]:
    """Instructions and allocations in a file of callgrind.

    Functions are named once, `fn=(12) name`, and referred to as `(12)` later; a `calls=` line counts the calls of the
    function in the `cfn=` line before it.
    """
    names: dict[str, str] = {}
    instructions = allocations = 0
    called = ""
    for line in lines:
        if match := re.match(r"c?fn=\((\d+)\)(?: (.*))?", line):
            number, name = match.groups()
            if name:
                names[number] = name
            called = names.get(number, "")
        elif line.startswith("calls="):
            if called in ALLOCATORS:
                allocations += int(line[6:].split()[0])
        elif line.startswith(("totals:", "summary:")):
            instructions = int(line.split()[1])
    return instructions, allocations


if __name__ == "__main__":
    main(run)
