"""Draws the lines of `compare.py`: ratios and shares of the roofline by workload, and latencies under Poisson arrivals.

    python benchmarks/plots.py benchmarks/results/peers.jsonl          # docs/images/throughput.svg and serving.svg
    python benchmarks/plots.py LINES MORE-LINES --folder somewhere

Bars are medians; whiskers go from the least to the greatest. The pictures have a ground of their own, which is dark where the
reader's system is. Equal lines give equal files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from record import FOLDER
from tables import LATENCIES, OURS, Figure, Line, latencies, rates, read, shares

matplotlib.use("svg")
from matplotlib import pyplot

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d0d7de"
IN_THE_DARK = {INK: "#e6edf3", PAPER: "#0d1117", GRID: "#30363d"}
COLOURS = {
    "cacheflow": "#2f81f7",
    "cacheflow-int8-dynamic": "#0a9396",
    "cacheflow-int4": "#56b6c2",
    "vllm": "#d9822b",
    "llama-cpp": "#3fa45b",
    "llama-cpp-q4": "#7fb069",
    "transformers": "#a371f7",
    "transformers-continuous": "#c297ff",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "cacheflow", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.edgecolor": GRID, "grid.color": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
PURPOSES = {
    "w1": "W1 batch", "w2": "W2 one stream", "w3": "W3 prefill", "w4": "W4 shared prefix", "w5": "W5 parallel sampling",
    "w6": "W6 1B shape, batch",
}  # fmt: skip


def draw_throughput(lines: list[Line], path: Path) -> None:
    """How many times as fast as each peer, and how much of the roofline is reached; bfloat16 only."""
    figures = {key: figure for key, figure in rates(lines).items() if "-q4" not in key[1] and not key[1].startswith(f"{OURS}-")}
    of_roofline = shares(lines)
    names = [name for name in PURPOSES if (name, OURS) in figures]
    systems = [system for system in COLOURS if any((name, system) in figures for name in names)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 1.0 + 0.95 * len(names)), sharey=True, layout="constrained")
    ratios = {
        (name, system): figures[name, OURS].over(figures[name, system])
        for name in names
        for system in systems
        if system != OURS and (name, system) in figures
    }
    left.axvline(1, color=INK, linewidth=1)
    _bars(left, names, [system for system in systems if system != OURS], ratios, 1, "{:.2f}×")
    left.set(title="cacheflow is so many times as fast as", xscale="log", xticks=[0.5, 1, 2, 5, 10, 20, 50])
    left.set_xticklabels(["0.5", "1", "2", "5", "10", "20", "50"])
    left.set_xlim(
        min([0.8, *(0.9 * ratio.least for ratio in ratios.values())]),
        2.2 * max((ratio.greatest for ratio in ratios.values()), default=10),
    )
    left.minorticks_off()
    percent = {key: Figure((100 * share,)) for key, share in of_roofline.items() if key in figures}
    _bars(right, names, systems, percent, 0, "{:.0f} %")
    right.set(title="share of the machine's roofline, %", xlim=(0, 110))
    left.set_yticks(range(len(names)), [PURPOSES[name] for name in names])
    left.invert_yaxis()
    _save(figure, [left, right], path)


def _bars(
    axes: Any, names: list[str], systems: Sequence[str], figures: dict[tuple[str, str], Figure], start: float, text: str
) -> None:
    """A group of horizontal bars for each workload, with a whisker where there are several runs."""
    height = 0.8 / max(1, len(systems))
    for number, system in enumerate(systems):
        for place, name in enumerate(names):
            if (name, system) not in figures:
                continue
            figure = figures[name, system]
            y = place - 0.4 + (number + 0.5) * height
            axes.barh(y, figure.median - start, 0.9 * height, start, color=COLOURS[system], label=system)
            axes.hlines(y, figure.least, figure.greatest, color=INK, linewidth=1)
            axes.annotate(
                text.format(figure.median), (figure.greatest, y), (4, 0), textcoords="offset points", va="center", fontsize=8
            )


def draw_serving(lines: list[Line], path: Path) -> None:
    """TTFT and ITL of each server at each rate."""
    figures = latencies(lines)
    per_s, systems = (
        sorted({key[0] for key in figures}),
        [system for system in COLOURS if system in {key[1] for key in figures}],
    )
    figure, places = pyplot.subplots(1, len(LATENCIES), figsize=(10, 3.4), layout="constrained")
    width = 0.8 / max(1, len(systems))
    for number, (axes, (name, percent)) in enumerate(zip(places, LATENCIES, strict=True)):
        for place, rate in enumerate(per_s):
            for at, system in enumerate(systems):
                if (rate, system) not in figures:
                    continue
                x, value = place - 0.4 + (at + 0.5) * width, figures[rate, system][number]
                axes.bar(x, 1000 * value.median, 0.9 * width, color=COLOURS[system], label=system)
                axes.vlines(x, 1000 * value.least, 1000 * value.greatest, color=INK, linewidth=1)
                axes.annotate(
                    f"{1000 * value.median:.0f}",
                    (x, 1000 * value.greatest),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        axes.set_xticks(range(len(per_s)), [f"{rate:g}/s" for rate in per_s])
        axes.set(title=f"{name.removesuffix('_s').upper()} {percent}, ms")
        axes.margins(y=0.12)
    _save(figure, list(places), path)


def _save(figure: Any, places: list[Any], path: Path) -> None:
    """With one legend for all, and colours that follow the reader's."""
    named: dict[str, Any] = {}
    for axes in places:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.tick_params(length=0)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    rules = "".join(
        f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important; }} '
        for light, dark in IN_THE_DARK.items()
        for kind in ("fill", "stroke")
    )
    drawn = path.read_text(encoding="utf-8")
    # Text has no style of its own where it is black: matplotlib leaves that colour out.
    style = f'<style type="text/css">@media (prefers-color-scheme: dark) {{ {rules}}}</style>\n <defs>'
    path.write_text(drawn.replace("<defs>", style, 1), encoding="utf-8")


def main() -> None:
    """Draws what the lines have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+", help="files of compare.py")
    parser.add_argument("--folder", type=Path, default=FOLDER.parent / "docs" / "images", help="where the pictures go")
    arguments = parser.parse_args()
    lines = [line for path in arguments.lines for line in read(path)]
    with matplotlib.rc_context(STYLE):
        for draw, name, is_served in ((draw_throughput, "throughput.svg", False), (draw_serving, "serving.svg", True)):
            if any((line["workload"] == "w7") is is_served for line in lines):
                draw(lines, arguments.folder / name)
                print(arguments.folder / name)


if __name__ == "__main__":
    main()
