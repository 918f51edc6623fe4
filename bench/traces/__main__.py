"""Compares routing policies on recorded traffic: `python -m bench.traces [study ...]`."""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.figures import Figures
from bench.harness import RESULTS
from bench.side import ROOT
from bench.traces import fleet, policy, report, scenario, study
from bench.traces.cache import pooled_hit_ratio
from bench.traces.policy import Policy
from bench.traces.scenario import Scenario
from bench.traces.study import STUDIES, Study
from bench.traces.wire import Wire

SHOWN = {
    "ttft_mean": "TTFT s", "ttft_p50": "p50", "ttft_p90": "p90", "ttft_p99": "p99", "itl_ms": "ITL ms",
    "e2e_mean": "E2E s", "e2e_p99": "p99", "hit": "hit", "imbalance": "imbalance", "busy": "prefill",
}  # fmt: skip


def main() -> int:
    """Run the studies; figures go into `bench/results/traces.json`."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("studies", nargs="*", help=f"which: {', '.join(STUDIES)}; all when none is named")
    options.add_argument("--quick", action="store_true", help="tiny: does everything still work?")
    options.add_argument(
        "--policy", action="append", default=[], type=policy.parse, metavar="NAME[,SETTING=VALUE...]",
        help="only this one, with these settings of the router, e.g. default,new_work_weight=4; may be repeated",
    )  # fmt: skip
    options.add_argument(
        "--traces", type=Path, metavar="DIR",
        help="replay the traces in Mooncake's format (*.jsonl, *.jsonl.gz) that lie there, instead of the studies",
    )  # fmt: skip
    options.add_argument("--block-size", type=int, default=512, help="of those traces, tokens per id (512)")
    options.add_argument("--workers", type=int, default=8, help="engines for those traces (8)")
    options.add_argument("--speed", type=float, default=1.0, help="how many times as fast to replay those traces (1)")
    options.add_argument("--seed", type=int, default=1, help="of the random choices (1)")
    chosen = options.parse_args()
    unknown = set(chosen.studies) - set(STUDIES)
    if unknown:
        options.error(f"no such study: {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    figures = Figures()
    path = RESULTS / ("traces-quick.json" if chosen.quick else "traces.json")
    if chosen.studies and path.exists():
        figures.read(path)  # the other studies keep what they found last
    studies = [study.QUICK] if chosen.quick else [STUDIES[name] for name in chosen.studies or STUDIES]
    if chosen.traces:
        names = scenario.add_recorded(chosen.traces, chosen.block_size)
        level = chosen.speed / chosen.workers
        studies = [Study(str(chosen.traces), tuple(Scenario(name, chosen.workers, level) for name in names))]
    for each in studies:
        print(f"\n{each.title}")
        for case in each.scenarios:
            compare(case, chosen.policy or each.chosen(), figures, chosen.seed)
        figures.write(path)
    print(f"figures: {path.relative_to(ROOT)}")
    return 0


def compare(case: Scenario, policies: Iterable[Policy], figures: Figures, seed: int) -> None:
    """Run one scenario under each policy; print and keep the figures."""
    trace, engines = case.trace(), case.fleet()
    room = sum(model.cache_tokens for model in engines.models) // trace.block_size
    pooled = pooled_hit_ratio(trace, room)
    figures.put(f"traces.{case.name}.pooled.hit", pooled)
    print(f"\n{case.name}: {len(trace):,} requests; one pooled cache would serve {pooled:.0%} of the blocks")
    print("  ".join([" " * 22, *(f"{title:>9}" for title in SHOWN.values()), "   CPU s"]))
    wire = Wire(trace.block_size)
    for each in policies:
        started = time.process_time()
        found = report.figures(fleet.replay(trace, engines, each, seed, wire))
        figures.put_all(f"traces.{case.name}.{each.name}", found)
        print(_line(each.name, found, time.process_time() - started), flush=True)


def _line(name: str, found: Mapping[str, float], spent_s: float) -> str:
    return "  ".join([f"{name:22}", *(f"{found[measure]:9.3g}" for measure in SHOWN), f"{spent_s:8.1f}"])


if __name__ == "__main__":
    sys.exit(main())
