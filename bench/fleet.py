"""Compares routing policies on a real fleet: two vLLM engines on the CPU, and people who talk to them.

    python -m bench.fleet [--policy NAME[,SETTING=VALUE...]]     needs what `make test-vllm` needs, see bench/README.md

The policies take turns, round by round, with the same conversations and empty caches; what counts is what the engines
say and a client sees. Figures go into `bench/results/fleet.json`, times in seconds: `fleet.all.POLICY.MEASURE`, and
`fleet.roundN.POLICY.MEASURE`.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.figures import Figures
from bench.harness import RESULTS
from bench.side import ROOT
from bench.traces import policy
from bench.traces.policy import Policy
from bench.traces.report import quantile
from e2e.conversations import Crowd, Turn, cached_share, computed_tokens, exact_share, talk
from e2e.engines import SLOW_MODEL, Engine, EngineOptions, Zygote
from e2e.router import Router

VERSION = "0.32.0"
POLICIES = ("default", "dynamo", "least-loaded", "round-robin")
ROUNDS = 3
ENGINE = EngineOptions(
    block_size=32, blocks=417, lora=False, tokens_per_step=1024, most_running=16, max_model_len=4096, shape=SLOW_MODEL
)
CROWD = Crowd()
SHOWN = {
    "cached": "cached", "counted": "counted", "exact": "exact", "ttft_mean": "TTFT s", "ttft_p50": "p50",
    "ttft_p99": "p99", "e2e_mean": "E2E s", "e2e_p99": "p99", "imbalance": "imbalance", "seconds": "seconds",
}  # fmt: skip


def main() -> int:
    """Run the rounds and show what came of them."""
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("--quick", action="store_true", help="tiny: does everything still work?")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each policy ({ROUNDS})")
    options.add_argument("--seed", type=int, default=1, help="of the first round (1)")
    options.add_argument(
        "--policy", action="append", default=[], type=policy.parse, metavar="NAME[,SETTING=VALUE...]",
        help=f"instead of {', '.join(POLICIES)}; may be repeated",
    )  # fmt: skip
    chosen = options.parse_args()
    policies = chosen.policy or [policy.parse(name) for name in POLICIES]
    if any(each.settings is None for each in policies):
        options.error("the oracle needs engines that are simulated")
    crowd = Crowd(users=4, conversations=1, turns=2) if chosen.quick else CROWD
    rounds = 1 if chosen.quick else chosen.rounds
    figures = Figures()
    path = RESULTS / f"fleet{'-quick' if chosen.quick else ''}.json"
    with tempfile.TemporaryDirectory() as logs:
        fleet = _Fleet(Path(logs))
        try:
            asyncio.run(fleet.compare(policies, crowd, range(chosen.seed, chosen.seed + rounds), figures))
        finally:
            fleet.close()
            figures.write(path)  # those of the rounds that there were
    print(f"figures: {path.relative_to(ROOT)}")
    return 0


class _Fleet:
    """Two engines, which outlive the routers in front of them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._zygote = Zygote(VERSION, logs / "zygote.log")
        self._engines = [Engine(self._zygote, name, ENGINE, logs / f"{name}.log") for name in ("alpha", "beta")]

    def close(self) -> None:
        """End the engines."""
        self._zygote.close()

    async def compare(self, policies: Sequence[Policy], crowd: Crowd, seeds: Sequence[int], figures: Figures) -> None:
        """Run each policy once per seed, each of them first in turn; print and keep the figures."""
        for engine in self._engines:
            engine.start()
        for engine in self._engines:
            await asyncio.to_thread(engine.wait_ready)
        await self._round(policies[0], Crowd(users=2, conversations=1, turns=2), 0)  # first steps take longer
        found: dict[str, list[dict[str, float]]] = {each.name: [] for each in policies}
        turns: dict[str, list[Turn]] = {each.name: [] for each in policies}
        print(f"{crowd}\n")
        print("  ".join([" " * 22, *(f"{title:>9}" for title in SHOWN.values())]))
        for number, seed in enumerate(seeds):
            first = number % len(policies)
            for each in [*policies[first:], *policies[:first]]:
                said, of_round = await self._round(each, crowd, seed)
                turns[each.name] += said
                found[each.name].append(of_round)
                figures.put_all(f"fleet.round{number + 1}.{each.name}", of_round)
                print(_line(f"{number + 1} {each.name}", of_round), flush=True)
        for name, rounds in found.items():
            counted = {key: statistics.fmean(each[key] for each in rounds) for key in ("counted", "seconds")}
            of_all = _figures(turns[name]) | counted
            figures.put_all(f"fleet.all.{name}", of_all)
            print(_line(name, of_all), flush=True)

    async def _round(self, chosen: Policy, crowd: Crowd, seed: int) -> tuple[list[Turn], dict[str, float]]:
        for engine in self._engines:
            await engine.clear()
        before = [await _looked_up(engine) for engine in self._engines]
        clock = asyncio.get_running_loop().time
        async with Router(self._engines, self._logs / "router.log", _flags(chosen.settings or {})) as router:
            await router.settle()
            started = clock()
            turns = await talk(router, crowd, seed)
            seconds = clock() - started
        after = [await _looked_up(engine) for engine in self._engines]
        hits, queries = (sum(now[i] - then[i] for now, then in zip(after, before, strict=True)) for i in (0, 1))
        return turns, _figures(turns) | {"counted": hits / queries, "seconds": seconds}


async def _looked_up(engine: Engine) -> tuple[float, float]:
    """Tokens that an engine has found in its prefix cache, and tokens that it has looked for."""
    hits, queries = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
    return await engine.metric(hits), await engine.metric(queries)


def _flags(settings: Mapping[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--router-{name.replace('_', '-')}", str(value))]


def _figures(turns: Sequence[Turn]) -> dict[str, float]:
    """The measures of some turns; `cached` is a share of the prompt tokens, `exact` of the requests."""
    first, end = sorted(turn.first_token_s for turn in turns), sorted(turn.end_s for turn in turns)
    computed = computed_tokens(turns)
    return {
        "cached": cached_share(turns),
        "exact": exact_share(turns),
        "ttft_mean": statistics.fmean(first),
        "ttft_p50": quantile(first, 0.5),
        "ttft_p99": quantile(first, 0.99),
        "e2e_mean": statistics.fmean(end),
        "e2e_p99": quantile(end, 0.99),
        "imbalance": 2 * max(computed.values()) / computed.total(),
        "requests": len(turns),
    }


def _line(name: str, found: Mapping[str, float]) -> str:
    return "  ".join([f"{name:22}", *(f"{found[measure]:9.3g}" for measure in SHOWN)])


if __name__ == "__main__":
    sys.exit(main())
