"""What a suite gets: its sizes, its sides, its figures."""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import meter, peers
from bench.figures import Figures
from bench.goals import GOALS
from bench.side import ROOT, Side

RESULTS = ROOT / "bench/results"
SINGLE_THREAD = {"TOKIO_WORKER_THREADS": "1"}


@dataclass
class Bench:
    """One run.

    Attributes:
        quick: Tiny sizes: only whether everything works counts.
        with_peers: Measure the peers too.
        patience_s: How long to wait for a quiet machine before each round.
        figures: What was found.
    """

    quick: bool = False
    with_peers: bool = True
    patience_s: float = 0.0
    figures: Figures = field(default_factory=Figures)
    foreign: float = 0.0

    @property
    def rounds(self) -> int:
        """How often each side is measured; the sides take turns."""
        return 1 if self.quick else 5

    def size(self, full: int, quick: int) -> int:
        """`full`, or `quick` in a quick run."""
        return quick if self.quick else full

    @contextmanager
    def sides(self, *, limit: bool = False, dynamo: bool = True) -> Iterator[dict[str, Side]]:
        """Our side and those to compare with, each pinned to one CPU: hops between CPUs cost a side more than work."""
        with ExitStack() as stack:
            sides = {"ours": stack.enter_context(Side("bench.sides.ours", prefix=PINNED))}
            if limit:
                sides["limit"] = stack.enter_context(Side("bench.sides.limit", prefix=PINNED))
            python = peers.dynamo_python(self) if dynamo else None
            if python is not None:
                side = Side("bench.sides.dynamo_core", python=python, prefix=PINNED, env=SINGLE_THREAD)
                sides["dynamo"] = stack.enter_context(side)
            yield sides

    def interleave(self, sides: Mapping[str, Side], function: str, **arguments: Any) -> dict[str, list[Any]]:
        """Call the same function of all sides, round by round, so that all meet the same state of the machine."""
        results: dict[str, list[Any]] = {name: [] for name in sides}
        for _ in range(self.rounds):
            for name, side in sides.items():
                self.settle()
                results[name].append(side.call(function, **arguments))
        return results

    def settle(self) -> None:
        """Wait for a quiet machine, and note how quiet it was."""
        if self.patience_s:
            self.foreign = max(self.foreign, meter.wait_quiet(self.patience_s))

    def show(self, title: str, suite: str, measure: str, cases: Sequence[str], extra: Sequence[str] = ()) -> None:
        """Print a table, with the goals."""
        for case in cases:
            goal = GOALS.get(f"{suite}.{case}.goal.{measure}")
            if goal is not None:
                self.figures.put(f"{suite}.{case}.goal.{measure}", goal)
        print("\n" + self.figures.table(title, suite, measure, cases, extra), flush=True)


PINNED = ("taskset", "-c", str(max(os.sched_getaffinity(0))))


def best(values: Sequence[float]) -> float:
    """The least disturbed of several measurements of the same computation: nothing makes it faster than it is."""
    return min(values)


def best_by(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`best` of each measure."""
    return {name: best([each[name] for each in rounds]) for name in rounds[0]}


def window_by(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of windows of traffic: the least CPU time per call, as in `best`, and the median of everything else."""
    return {
        name: (best if name.endswith("cpu_us") else statistics.median)([each[name] for each in rounds])
        for name in rounds[0]
    }


Suite = Callable[[Bench], None]


def parser() -> argparse.ArgumentParser:
    """The options that all programs of the benchmark have."""
    options = argparse.ArgumentParser()
    options.add_argument("--quick", action="store_true", help="tiny sizes: does everything still work?")
    options.add_argument("--no-peers", dest="peers", action="store_false", help="leave the peers out")
    options.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, per round")
    return options


def bench_of(options: argparse.Namespace) -> Bench:
    """The run that the options ask for."""
    return Bench(options.quick, options.peers, options.patience)


def main(suite: Suite) -> None:
    """Run one suite alone: its tables, and its figures in `results/{suite}.json`."""
    bench = bench_of(parser().parse_args())
    suite(bench)
    for note in bench.figures.notes:
        print(f"note: {note}")
    name = Path(sys.argv[0]).stem
    bench.figures.write(RESULTS / f"{name}{'-quick' if bench.quick else ''}.json")
