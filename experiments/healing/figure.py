"""Draw the figure of a healing setting: entries (or bytes) per token against recovery.

python experiments/healing/figure.py experiments/results/healing_layers24.json \
    --out docs/figures/healing_layers24.png

Recovery is the share of full KD's reduction of the held-out KL, with its 95 % interval over seeds.
A version in dark colours is written next to the figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparselogits.lab.compare import MethodRow, Results, read_results
from sparselogits.lab.report.charts import Drawing, budget_chart, draw_png, looks_of

SERIES = {
    ("systematic", None): "systematic rounds",
    ("multinomial", None): "RS-KD (independent rounds)",
    ("topk", "ghost"): "Top-K, ghost token",
    ("topk", None): "Top-K",
}
"""Names of the lines by sampler and missing-mass rule; other methods are not drawn."""
AXES = {
    "entries": ("entries", "entries per token"),
    "bytes": ("bytes_per_token", "cached targets, bytes per token"),
}
LEVELS = {"full": "full KD, nothing cached", "ce": "cross-entropy, no teacher"}


def series_of(row: MethodRow) -> str | None:
    """Return the name of the line that a method belongs to; None if it is not drawn."""
    return SERIES.get((row.family, row.spec.get("missing_mass")))


def drawing(results: Results, axis: str) -> Drawing:
    """Return the chart of a comparison, with full KD and CE as horizontal lines."""
    field, title = AXES[axis]
    points = []
    levels = []
    for row in results.methods:
        if row.recovered is None:
            continue
        if row.family in LEVELS:
            levels.append((LEVELS[row.family], row.recovered.mean))
        elif (series := series_of(row)) is not None and getattr(row, field) is not None:
            ends = row.recovered.seeds
            points.append(
                {
                    "series": series,
                    "method": row.method,
                    "x": getattr(row, field),
                    "y": row.recovered.mean,
                    "low": ends.low,
                    "high": ends.high,
                }
            )
    if not points:
        raise SystemExit(
            "no method has a share of full KD's recovery: the comparison needs runs of "
            "`method: none` and `method: full` and of a sampler"
        )
    drawn = {point["series"] for point in points}
    chart = budget_chart(
        sorted(points, key=lambda point: point["x"]),
        looks_of({name: name for name in SERIES.values() if name in drawn}),
        x=title,
        y="of full KD's recovery in KL, %",
        levels=levels,
    )
    return Drawing("healing", f"Storage against recovery: {results.title}", chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--axis", choices=AXES, default="entries")
    given = parser.parse_args()
    drawn = drawing(read_results(given.results), given.axis)
    draw_png(drawn, given.out, width=620, scale=1.25)
    dark = given.out.with_name(f"{given.out.stem}_dark{given.out.suffix}")
    draw_png(drawn, dark, width=620, scale=1.25, dark=True)


if __name__ == "__main__":
    main()
