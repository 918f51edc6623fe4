"""Draws the curves: `bench/results/curves.json` to `docs/img/*.svg`. Runs where matplotlib is installed."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.side import ROOT

IMAGES = ROOT / "docs/img"
OURS, LIMIT, OTHER = "#0b6e99", "#9a9a9a", "#c2571a"


class Curves:
    """The figures of a `curves` run, by curve."""

    def __init__(self, path: Path) -> None:
        self._values: dict[str, float] = json.loads(path.read_text())

    def line(self, curve: str, measure: str, side: str = "ours") -> tuple[list[float], list[float]]:
        """Sorted x (the case) and y of one measure."""
        points = []
        for key, value in self._values.items():
            parts = key.split(".")
            if len(parts) == 4 and (parts[0], parts[2], parts[3]) == (curve, side, measure):
                points.append((float(parts[1]), value))
        points.sort()
        return [x for x, _ in points], [y for _, y in points]


def style() -> None:
    """How all plots look."""
    # Equal figures give equal files: no time stamp, no random ids.
    mpl.rcParams.update(
        {
            "svg.hashsalt": "kvrouter",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.grid": True,
        }
    )
    mpl.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})


def main() -> None:
    """Draw all."""
    style()
    IMAGES.mkdir(parents=True, exist_ok=True)
    curves = Curves(ROOT / "bench/results/curves.json")
    _length(curves)
    _workers(curves)
    _blocks(curves)
    _rate(curves)


def _length(curves: Curves) -> None:
    axes = _axes("A decision by length of the prompt (64 workers)", "tokens", "CPU microseconds")
    axes.loglog(*curves.line("curve_length", "us"), "o-", color=OURS, label="raw request to worker")
    axes.loglog(*curves.line("curve_length", "hash_us"), "s--", color=OURS, label="hashing alone")
    axes.loglog(*curves.line("curve_length", "hash_us", "limit"), ":", color=LIMIT, label="limit: XXH3 in C")
    _save(axes, "length")


def _workers(curves: Curves) -> None:
    axes = _axes("A decision about 8,192 tokens by number of workers", "workers", "CPU microseconds")
    axes.loglog(*curves.line("curve_workers", "us"), "o-", color=OURS, label="raw request to worker")
    _save(axes, "workers")


def _blocks(curves: Curves) -> None:
    axes = _axes("The size of the index (64 workers)", "(worker, block) pairs in the index", "CPU microseconds")
    axes.loglog(*curves.line("curve_blocks", "us"), "o-", color=OURS, label="a decision about 8,192 tokens")
    axes.loglog(*curves.line("curve_blocks", "store_us"), "s--", color=OTHER, label="storing a block")
    _save(axes, "blocks")


def _rate(curves: Curves) -> None:
    axes = _axes("A storm of events (32 blocks each, 64 workers)", "blocks stored per second", "CPUs for the events")
    _, blocks = curves.line("curve_rate", "blocks_per_s")
    _, cpus = curves.line("curve_rate", "cpus")
    axes.plot(blocks, cpus, "o-", color=OURS, label="CPUs (left)")
    right = axes.twinx()
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    right.set_ylabel("BestWorkerId, p99 ms")
    _, latency = curves.line("curve_rate", "p99_ms")
    right.plot(blocks, latency, "s--", color=OTHER, label="BestWorkerId meanwhile, p99 (right)")
    right.set_ylim(bottom=0)
    handles = [*axes.get_lines(), *right.get_lines()]
    _save(axes, "events", handles)


def _axes(title: str, x: str, y: str) -> Axes:
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    figure.patch.set_facecolor("white")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _save(axes: Axes, name: str, handles: Sequence[object] | None = None) -> None:
    axes.legend(handles=handles or axes.get_lines(), frameon=False, fontsize=9)
    figure = axes.get_figure()
    figure.tight_layout()
    figure.savefig(IMAGES / f"performance-{name}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
