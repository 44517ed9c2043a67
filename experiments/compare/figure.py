"""The figure of README.md: storage against held-out loss, from a stored comparison.

Losses are means over the seeds that all methods shown have: a mean over other seeds for some would
put differences between seeds, which are as large as those between good methods, on show.

python experiments/compare/figure.py experiments/results/compare_small_teacher.json \
    --out docs/figures/storage_against_loss.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sparselogits.compare import MethodRow, Results, read_results

FAMILIES = {
    "RS-KD": "RS-KD (independent rounds)",
    "systematic": "systematic rounds",
    "Top-K": "Top-K",
    "Top-K, ghost": "Top-K, ghost token",
    "Top-K, smooth": "Top-K, smoothing",
    "Top-K, ground truth": "Top-K, naive fix",
}
"""What is drawn, without the budget in the method's name; docs/results.md has the rest."""

TICKS = (5, 10, 20, 50, 100, 200, 400)


def family(row: MethodRow) -> str:
    """The method's name without its budget: "Top-K 12, smooth" is "Top-K, smooth"."""
    head, comma, remedy = row.method.partition(", ")
    return head.rsplit(" ", 1)[0] + comma + remedy


def mean_losses(results: Results) -> dict[str, float]:
    """By method, over the seeds that all of those shown have."""
    by_method: dict[str, dict[int, float]] = {}
    shown = {row.method for row in results.methods if family(row) in FAMILIES}
    shown |= {row.method for row in results.methods if row.family in ("ce", "full")}
    for run in results.runs:
        if run.status == "done" and run.method in shown:
            by_method.setdefault(run.method, {})[run.seed] = run.figures["loss"]
    common = set.intersection(*(set(own) for own in by_method.values()))
    if not common:
        raise SystemExit("no seed is done for all methods that have one; run the comparison on")
    return {name: fmean(own[seed] for seed in common) for name, own in by_method.items()}


def draw(results: Results, path: Path) -> None:
    """The methods of `FAMILIES`, and CE and full KD, which store nothing, as lines."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    losses = mean_losses(results)
    done = [row for row in results.methods if row.method in losses]
    for name, title in FAMILIES.items():
        points = sorted(
            (row.bytes_per_token, losses[row.method], row.method.split(",")[0].split()[-1])
            for row in done
            if family(row) == name and row.bytes_per_token is not None
        )
        if points:
            draw_family(axes, points, title, named=name in ("RS-KD", "Top-K"))
    for row in done:
        if row.family in ("ce", "full"):
            draw_level(axes, losses[row.method], above=row.family == "ce")
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.margins(x=0.07, y=0.09)
    axes.set(xlabel="cached targets, bytes a token", ylabel="student's held-out loss, nats")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_family(
    axes: Axes, points: list[tuple[float, float, str]], title: str, *, named: bool
) -> None:
    """A line through (bytes, loss, budget), with the budgets written above it if `named`."""
    (line,) = axes.plot([p[0] for p in points], [p[1] for p in points], "o-", ms=5, label=title)
    for x, y, budget in points if named else ():
        axes.annotate(
            budget,
            (x, y),
            (9, 5),
            textcoords="offset points",
            ha="center",
            color=line.get_color(),
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )


def draw_level(axes: Axes, loss: float, *, above: bool) -> None:
    """CE, named above its line at the left, or full KD, below its line at the right."""
    axes.axhline(loss, color="0.35", linestyle="--", linewidth=1, zorder=1)
    axes.annotate(
        "cross-entropy, no teacher" if above else "full KD, nothing cached",
        (0 if above else 1, loss),
        (4 if above else -4, 3 if above else -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="left" if above else "right",
        va="bottom" if above else "top",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    draw(read_results(given.results), given.out)


if __name__ == "__main__":
    main()
