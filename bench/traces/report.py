"""The figures of a run."""

import math
import statistics
from collections.abc import Sequence

from bench.traces.fleet import Run


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the sorted values do not exceed; NaN of none."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def figures(run: Run) -> dict[str, float]:
    """The measures of a run, by the names of the results file. Times are seconds.

    `itl_ms` is the time per token behind the first, in milliseconds, as a mean over the requests of any length.
    `hit` is the share of prompt blocks that were served from a cache, `busy` that of the engines' time with prefill.
    """
    ttft = sorted(job.first_token - job.arrival for job in run.jobs)
    e2e = sorted(job.end - job.arrival for job in run.jobs)
    decoded = [job for job in run.jobs if job.request.output_tokens > 1]
    itl = sorted((job.end - job.first_token) / (job.request.output_tokens - 1) for job in decoded)
    blocks = sum(sum(map(len, job.request.path)) for job in run.jobs)
    prefilled = [engine.prefilled for engine in run.engines]
    return {
        "ttft_mean": statistics.fmean(ttft),
        "ttft_p50": quantile(ttft, 0.5),
        "ttft_p90": quantile(ttft, 0.9),
        "ttft_p99": quantile(ttft, 0.99),
        "itl_ms": 1000 * statistics.fmean(itl) if itl else math.nan,
        "itl_p99_ms": 1000 * quantile(itl, 0.99),
        "e2e_mean": statistics.fmean(e2e),
        "e2e_p99": quantile(e2e, 0.99),
        "hit": sum(job.cached_blocks for job in run.jobs) / blocks if blocks else 0.0,
        "imbalance": max(prefilled) * len(prefilled) / sum(prefilled),
        "busy": sum(engine.busy_s for engine in run.engines) / len(run.engines) / run.elapsed_s,
        "requests": len(run.jobs),
    }
