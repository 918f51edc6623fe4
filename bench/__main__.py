"""Runs the suites and writes their figures: `python -m bench [suite ...]`."""

import importlib
import sys
import time
import traceback
from pathlib import Path

import kvrouter_grpc
from bench import harness
from bench.figures import machine
from bench.side import ROOT

SUITES = (
    "hash",
    "match",
    "decide",
    "events",
    "memory",
    "snapshot",
    "stream",
    "best_worker",
    "batch",
    "generate",
    "instructions",
)


def main() -> int:
    """Run; 1 if a suite failed."""
    options = harness.parser()
    options.add_argument("suites", nargs="*", help=f"which: {', '.join(SUITES)}; all when none is named")
    chosen = options.parse_args()
    unknown = set(chosen.suites) - set(SUITES)
    if unknown:
        options.error(f"no such suite: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    bench = harness.bench_of(chosen)
    path = harness.RESULTS / ("quick.json" if bench.quick else "latest.json")
    if chosen.suites and path.exists():
        bench.figures.read(path)  # the other suites keep what they found last
    print(f"{machine()}\nmeasured: {Path(kvrouter_grpc.__file__).parent}")
    failed = []
    for suite in chosen.suites or SUITES:
        started = time.monotonic()
        try:
            importlib.import_module(f"bench.{suite}").run(bench)
        except Exception:  # noqa: BLE001 - the other suites still run
            traceback.print_exc()
            failed.append(suite)
        print(f"({suite}: {time.monotonic() - started:.0f} s)", flush=True)
        bench.figures.write(path)
    for note in bench.figures.notes:
        print(f"note: {note}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(f"figures: {path.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
