"""Draw figures of healing settings: recovery by setting, or by entries (or bytes) per token.

    python experiments/healing/figure.py experiments/results/healing_*.json \
        --out docs/figures/healing_settings.png
    python experiments/healing/figure.py experiments/results/healing_layers24.json \
        --out layers24.png --axis bytes

Several results give the recovery of each setting, one result its recovery by budget. Recovery is
the share of full KD's reduction of the held-out KL, with its 95 % interval over seeds. A version in
dark colours is written next to the figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.compare.pages import HEALING

from sparselogits.lab.compare import MethodRow, Results, read_results
from sparselogits.lab.report.charts import SHAPES, Drawing, budget_chart, draw_png, looks_of

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

COMPARED = ("systematic 12", "RS-KD 12", "Top-12 ghost", "Top-12", "CE")
"""Methods of the figure of several settings."""


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


def drawing_of_settings(settings: Mapping[str, Results]) -> Drawing:
    """Return the chart of the recovery in each setting, in the order of `HEALING`.

    Args:
        settings: results by name of the setting.
    """
    import altair as alt

    points: list[dict[str, Any]] = []
    for name in (name for name in HEALING if name in settings):
        rows = {row.method: row for row in settings[name].methods}
        for method in COMPARED:
            own = rows[method].recovered
            assert own is not None
            ends = {"low": own.seeds.low, "high": own.seeds.high}
            points.append({"setting": HEALING[name], "method": method, "x": own.mean, **ends})
    looks = looks_of({method: method for method in COMPARED})
    title = "of full KD's recovery in KL, %"
    colours = alt.Scale(domain=list(looks), range=[look.css for look in looks.values()])
    shapes = alt.Scale(domain=list(looks), range=[SHAPES[look.shape] for look in looks.values()])
    legend = alt.Legend(orient="top")  # beside the chart it would leave little width on a phone
    offset = alt.YOffset("method:N", sort=list(COMPARED))
    axis = alt.Axis(labelLimit=300, domain=False, ticks=False, labelPadding=10)
    base = alt.Chart(alt.InlineData(values=points)).encode(
        y=alt.Y("setting:N", sort=None, title=None, axis=axis, scale=alt.Scale(padding=0.35)),
        yOffset=offset,
        color=alt.Color("method:N", scale=colours, legend=legend),
    )
    scale = alt.Scale(domain=[-10, 115], nice=False)
    ends_of = base.mark_rule(strokeWidth=1.6, opacity=0.6, clip=True).encode(
        x=alt.X("low:Q", title=title, scale=scale), x2="high:Q"
    )
    marks = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("x:Q", title=title, scale=scale),
        shape=alt.Shape("method:N", scale=shapes, legend=legend),
    )
    full = alt.Chart(alt.InlineData(values=[{"x": 100}])).mark_rule(
        strokeDash=[5, 4], color="var(--soft)"
    )
    chart = alt.LayerChart(layer=[full.encode(x=alt.X("x:Q", scale=scale)), ends_of, marks])
    return Drawing("settings", "Ten steps of healing, by student and text", chart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--axis", choices=AXES, default="entries")
    given = parser.parse_args()
    found = {file.stem.removeprefix("healing_"): read_results(file) for file in given.results}
    drawn = drawing_of_settings(found)
    if len(found) == 1:
        (only,) = found.values()
        drawn = drawing(only, given.axis)
    size = {"width": 440, "height": 56 * len(found), "scale": 2}
    if len(found) == 1:
        size = {"width": 620, "scale": 1.25}
    draw_png(drawn, given.out, **size)
    dark = given.out.with_name(f"{given.out.stem}_dark{given.out.suffix}")
    draw_png(drawn, dark, **size, dark=True)


if __name__ == "__main__":
    main()
