"""Draws the mean time to the first token by load: `bench/results/traces.json` to `docs/img/routing-*.svg`."""

import json

from matplotlib import pyplot as plt

from bench.plots import IMAGES, LIMIT, OTHER, OURS, style
from bench.side import ROOT

LINES = {
    "round-robin": ("#cccccc", ":"),
    "least-loaded": ("#7a7a7a", ":"),
    "dynamo": (OTHER, "--"),
    "dynamo w=8": (OTHER, ":"),
    "oracle": (LIMIT, "-"),
    "default": (OURS, "-"),
}
LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.15, 1.3, 1.4)


def main() -> None:
    """Draw all."""
    style()
    values: dict[str, float] = json.loads((ROOT / "bench/results/traces.json").read_text())
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    figure.patch.set_facecolor("white")
    by_level = [(level, "" if level == 1 else f"-x{level:g}".replace(".", "_")) for level in LEVELS]
    copies = [(number, "" if number == 3 else f"-x{number / 3:g}".replace(".", "_")) for number in range(1, 6)]
    for axes, load, engines, points, unit in (
        (panels[0], "conversation", 8, by_level, "load, 8 engines"),
        (panels[1], "synthetic", 8, by_level, "load, 8 engines"),
        (panels[2], "agents", 4, copies, "copies of the sessions, 4 engines"),
    ):
        for policy, (colour, line) in LINES.items():
            found = [(x, values.get(f"traces.{load}-L-n{engines}{suffix}.{policy}.ttft_mean")) for x, suffix in points]
            known = [(x, value) for x, value in found if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), line, marker="o", markersize=3, color=colour, label=policy)
        axes.set_title(load, loc="left", fontsize=11)
        axes.set_xlabel(unit)
        axes.set_yscale("log")
    panels[0].set_ylabel("mean TTFT, s")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "routing-load.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
