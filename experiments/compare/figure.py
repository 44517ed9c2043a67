"""Draw storage against held-out loss of a stored comparison.

Losses are means over the seeds that all shown methods have. Means over different seeds would differ
between methods because of the seeds, by as much as good methods differ.

python experiments/compare/figure.py experiments/results/compare_small_teacher.json \
    --out docs/figures/storage_against_loss.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from sparselogits.lab.compare import MethodRow, Results, read_results
from sparselogits.lab.report.charts import Drawing, budget_chart, draw_png, looks_of

FAMILIES = {
    "RS-KD": "RS-KD (independent rounds)",
    "systematic": "systematic rounds",
    "Top-K": "Top-K",
    "Top-K, ghost": "Top-K, ghost token",
    "Top-K, smooth": "Top-K, smoothing",
    "Top-K, ground truth": "Top-K, naive fix",
}
"""Legend entries by family, which is the name of a method without its budget."""

LEVELS = {"ce": "cross-entropy, no teacher", "full": "full KD, nothing cached"}


def family(row: MethodRow) -> str:
    """Return a method's name without its budget: "Top-K, smooth" for "Top-K 12, smooth"."""
    head, comma, remedy = row.method.partition(", ")
    return head.rsplit(" ", 1)[0] + comma + remedy


def mean_losses(results: Results) -> dict[str, float]:
    """Return the mean loss per method, over the seeds that all shown methods have."""
    by_method: dict[str, dict[int, float]] = {}
    shown = {row.method for row in results.methods if family(row) in FAMILIES}
    shown |= {row.method for row in results.methods if row.family in ("ce", "full")}
    for run in results.runs:
        if run.status == "done" and run.method in shown:
            by_method.setdefault(run.method, {})[run.seed] = run.figures["loss"]
    common = set.intersection(*(set(own) for own in by_method.values()))
    if not common:
        raise SystemExit("no seed is finished for all shown methods; continue the comparison")
    return {name: fmean(own[seed] for seed in common) for name, own in by_method.items()}


def drawing(results: Results) -> Drawing:
    """Return the chart of the methods of `FAMILIES`, with CE and full KD as horizontal lines."""
    losses = mean_losses(results)
    done = [row for row in results.methods if row.method in losses]
    points = []
    for row in done:
        if family(row) in FAMILIES and row.bytes_per_token is not None:
            point = {
                "series": FAMILIES[family(row)],
                "method": row.method,
                "low": None,
                "high": None,
            }
            point |= {"x": row.bytes_per_token, "y": losses[row.method]}
            if family(row) in ("RS-KD", "Top-K"):
                point["label"] = row.method.split(",")[0].split()[-1]
            points.append(point)
    levels = [(LEVELS[row.family], losses[row.method]) for row in done if row.family in LEVELS]
    shown = [title for title in FAMILIES.values() if any(p["series"] == title for p in points)]
    chart = budget_chart(
        points,
        looks_of({title: title for title in shown}),
        x="cached targets, bytes per token",
        y="student's held-out loss, nats",
        levels=levels,
    )
    return Drawing("storage", "Storage against held-out loss", chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    drawn = drawing(read_results(given.results))
    draw_png(drawn, given.out, width=620, scale=1.25)
    dark = given.out.with_name(f"{given.out.stem}_dark{given.out.suffix}")
    draw_png(drawn, dark, width=620, scale=1.25, dark=True)


if __name__ == "__main__":
    main()
