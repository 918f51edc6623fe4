"""Fills the tables of docs/routing.md from `bench/results/traces.json` and `fleet.json`; the words are written by hand.

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`; `TABLES` has the names.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bench.harness import RESULTS
from bench.page import markdown
from bench.side import ROOT
from bench.traces.policy import policies
from bench.traces.scenario import Scenario
from bench.traces.study import STUDIES

PAGE = ROOT / "docs/routing.md"
Values = Mapping[str, float]


def main() -> None:
    """Write the tables."""
    files = [RESULTS / name for name in ("traces.json", "fleet.json")]
    values = {key: value for file in files if file.exists() for key, value in json.loads(file.read_text()).items()}
    PAGE.write_text(filled(PAGE.read_text(), values))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def filled(page: str, values: Values) -> str:
    """The page with its tables made anew.

    Raises:
        KeyError: The page asks for a table that there is not.
    """

    def table(found: re.Match[str]) -> str:
        return f"<!-- figures: {found[1]} -->\n\n{markdown(TABLES[found[1]](values))}\n\n<!-- end -->"

    return re.sub(r"<!-- figures: ([\w-]+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def by_policy(study: str, measure: str, values: Values) -> list[list[str]]:
    """A row per policy, a column per scenario; the best of those that can be had is bold."""
    cases = _measured(study, measure, values)
    rows = [["", *map(_title, cases)]]
    columns = {
        case: {name: values.get(f"traces.{case.name}.{name}.{measure}") for name in _names(study)} for case in cases
    }
    best = {case: _best(columns[case], measure) for case in cases}
    for name in _names(study):
        if any(columns[case][name] is not None for case in cases):
            cells = [_cell(columns[case][name], measure, name != "oracle", best[case]) for case in cases]
            rows.append([name, *cells])
    if measure == "hit":
        cells = [_cell(values.get(f"traces.{case.name}.pooled.hit"), measure, False, None) for case in cases]
        rows.append(["one pooled cache", *cells])
    return rows


def by_scenario(study: str, measure: str, values: Values) -> list[list[str]]:
    """A row per scenario, a column per policy."""
    names = [name for name in _names(study) if any(name in key for key in values)]
    rows = [["", *names]]
    for case in _measured(study, measure, values):
        cells = [values.get(f"traces.{case.name}.{name}.{measure}") for name in names]
        best = _best(dict(zip(names, cells, strict=True)), measure)
        rows.append(
            [_title(case), *(_cell(cell, measure, n != "oracle", best) for n, cell in zip(names, cells, strict=True))]
        )
    return rows


def relative(groups: Mapping[str, str], values: Values) -> list[list[str]]:
    """Geometric means of the main study's scenarios, relative to the cost `dynamo`.

    Args:
        groups: By title, the sizes of caches to take together.
        values: The figures.
    """
    measures = {"ttft_mean": "mean TTFT", "ttft_p99": "p99 TTFT", "itl_ms": "ITL", "e2e_mean": "E2E"}
    rows = [["", *(", ".join(filter(None, (title, group))) for group in groups for title in measures.values())]]
    for name in _names("main"):
        cells = []
        for caches in groups.values():
            cases = [case.name for case in _measured("main", "ttft_mean", values) if case.cache in caches]
            for measure in measures:
                pairs = [
                    (values.get(f"traces.{case}.{name}.{measure}"), values.get(f"traces.{case}.dynamo.{measure}"))
                    for case in cases
                ]
                ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
                cells.append(f"{_geometric(ratios):.2f}" if ratios and len(ratios) == len(pairs) else "-")
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return rows


FLEET = {
    "cached": "cached", "ttft_mean": "mean TTFT", "ttft_p50": "p50", "ttft_p99": "p99", "e2e_mean": "mean E2E",
    "imbalance": "imbalance", "exact": "exact predictions",
}  # fmt: skip


def fleet(values: Values) -> list[list[str]]:
    """What `bench.fleet` measured on real engines: a row per policy, the best of each column bold."""
    names = [name for name in _names("main") if f"fleet.all.{name}.cached" in values]
    rows = [["", *FLEET.values()], *([name] for name in names)]
    for measure in FLEET:
        cells = {name: values[f"fleet.all.{name}.{measure}"] for name in names}
        best = (max if measure in SHARES else min)(cells.values(), default=None)
        for row in rows[1:]:
            row.append(_cell(cells[row[0]], measure, True, best))
    return rows


def _measured(study: str, measure: str, values: Values) -> list[Scenario]:
    """The scenarios for which there is anything to show."""
    return [
        case
        for case in STUDIES[study].scenarios
        if any(f"traces.{case.name}.{name}.{measure}" in values for name in _names(study))
    ]


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _names(study: str) -> list[str]:
    return [
        policy.name for policy in policies() if not STUDIES[study].policies or policy.name in STUDIES[study].policies
    ]


SHARES = {"hit", "cached", "exact"}  # in percent, and the more the better


def _best(cells: Mapping[str, float | None], measure: str) -> float | None:
    known = [value for name, value in cells.items() if value is not None and name != "oracle"]
    if not known:
        return None
    return max(known) if measure in SHARES else min(known)


def _cell(value: float | None, measure: str, may_win: bool, best: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.0%}" if measure in SHARES else f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"**{text}**" if may_win and value == best else text


def _title(case: Scenario) -> str:
    parts = [case.load, f"{case.cache} cache" if case.cache != "L" else ""]
    parts += [f"{case.workers} engines" if case.workers != 8 else ""]
    if case.load == "agents":
        parts += [f"{round(0.75 * case.workers * case.level)} copies"]
    elif case.level != 1:
        parts += [f"load {case.level:g}"]
    parts += ["short ones pass" if case.model == "passing" else ""]
    parts += [{"speed": "unequal speed", "cache": "unequal caches"}.get(case.mix, "")]
    parts += [f"{case.replicas} routers" if case.replicas != 1 else ""]
    parts += [f"events {case.event_delay_s * 1000:g} ms late" if case.event_delay_s != 0.05 else ""]
    return ", ".join(part for part in parts if part)


TABLES: dict[str, Callable[[Values], list[list[str]]]] = {
    "relative": partial(relative, {"": "LS"}),
    "relative-by-cache": partial(relative, {"L caches": "L", "S caches": "S"}),
    "fleet": fleet,
    **{
        f"main-{measure}": partial(by_policy, "main", measure)
        for measure in ("ttft_mean", "ttft_p99", "itl_ms", "hit", "imbalance")
    },
    **{f"own-{measure}": partial(by_policy, "own", measure) for measure in ("ttft_mean", "ttft_p99", "e2e_mean")},
    **{
        f"{study}-{measure}": partial(by_scenario, study, measure)
        for study in ("size", "load", "roof", "passing", "replicas", "delay")
        for measure in ("ttft_mean", "ttft_p99")
    },
}


if __name__ == "__main__":
    main()
