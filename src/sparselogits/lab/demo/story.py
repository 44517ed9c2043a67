"""Present the results of the demo as a table, charts and sentences."""

from __future__ import annotations

from sparselogits.lab.compare import MethodRow, Results
from sparselogits.lab.report.charts import Drawing, budget_chart, dot_chart, looks_of
from sparselogits.lab.report.page import Cell, Column, Table

COLUMNS = (
    Column("KL", best="low", main=True, help="KL(teacher || student), nats per token"),
    Column(
        "recovered", best="high", main=True, help="reduction of the KL, as a share of full KD's"
    ),
    Column(
        "accepted",
        best="high",
        help="share of the tokens drafted by the student that the teacher is expected to accept",
    ),
    Column("loss", help="cross-entropy on the next token, nats"),
    Column("entries", help="stored entries per token"),
    Column("bytes", main=True, help="bytes of the cached targets per token"),
    Column("seconds", help="wall time of training"),
)
"""Columns of the table, without the first one, which contains the names of methods."""
CAPTION = (
    "KL(teacher || student), expected acceptance of drafts and loss on held-out text; recovered: "
    "reduction of the KL, as a share of full KD's; entries and bytes per token"
)
"""Explanation of the table in a terminal."""


def table(results: Results) -> Table:
    """Return the table of the demo, with a row per method and a last row for the teacher."""
    seconds = {run.method: run.seconds for run in results.runs}
    lines = [(row.method, _cells(row, seconds.get(row.method))) for row in results.methods]
    last: list[Cell] = []
    if results.teacher is not None:
        loss = results.teacher.figures["loss"]
        last = [Cell("0.000"), Cell("-"), Cell("100 %"), Cell(f"{loss:.3f}"), *[Cell("-")] * 3]
    rivals = [row.method for row in results.methods if row.family not in ("none", "full")]
    return Table("method", COLUMNS, lines, last).with_best(rivals)


def _cells(row: MethodRow, seconds: float | None) -> list[Cell]:
    def plain(value: float | None, digits: int, unit: str = "") -> Cell:
        return Cell("-") if value is None else Cell(f"{value:.{digits}f}{unit}", value)

    untrained = row.family == "none"
    recovered = None if untrained or row.recovered is None else row.recovered.mean
    return [
        plain(row.figures["kl"].mean, 3),
        plain(recovered, 0, " %"),
        plain(100 * row.figures["acceptance"].mean, 1, " %"),
        plain(row.figures["loss"].mean, 3),
        Cell("all") if row.family == "full" else plain(row.entries, 1),
        plain(row.bytes_per_token, 1),
        plain(None if untrained else seconds, 0),
    ]


def drawings(results: Results) -> list[Drawing]:
    """Return the charts of the demo's page; none if no method has a value of `recovered`."""
    if not any(row.recovered for row in results.methods):
        return []
    looks = looks_of({row.method: row.method for row in results.methods})
    shares = [
        {"method": row.method, "x": row.recovered.mean}
        | {"low": row.recovered.windows.low, "high": row.recovered.windows.high}
        for row in results.methods
        if row.recovered is not None and row.family not in ("none", "full")
    ]
    return [
        share_chart(results),
        Drawing(
            "recovered",
            "What each method recovers",
            dot_chart(shares, looks, x="% of full KD's recovery"),
            "95 % interval over held-out windows",
        ),
    ]


def share_chart(results: Results) -> Drawing:
    """Return the chart of methods' KL reduction, in % of full KD's, against bytes per token."""
    points, levels = [], []
    for row in results.methods:
        if row.recovered is None or row.family == "none":
            continue
        share = row.recovered.mean
        if row.bytes_per_token is None:
            levels.append((row.method, share))
        else:
            point = {"series": row.method, "method": row.method, "x": row.bytes_per_token}
            ends = row.recovered.windows
            points.append(point | {"y": share, "low": ends.low, "high": ends.high})
    chart = budget_chart(
        points,
        looks_of({row.method: row.method for row in results.methods}),
        x="cached targets, bytes per token",
        y="% of full KD's recovery in KL",
        levels=levels,
    )
    return Drawing("storage", "Storage against recovery", chart)


def headline(results: Results) -> str:
    """Describe what was cached, and how training reduces the KL of the pruned student."""
    by_family = {row.family: row for row in results.methods}
    cached, start, full = (by_family[name] for name in ("systematic", "none", "full"))
    run = next(run for run in results.runs if run.method == cached.method)
    said = (
        f"The KL of the pruned student to its teacher is {start.figures['kl'].mean:.3f} nats. One "
        f"pass of the teacher over {run.tokens:,} tokens cached {cached.entries:.1f} entries "
        f"({cached.bytes_per_token:.1f} bytes) per token; {run.steps} training steps from the "
        f"cache reduce the KL to {cached.figures['kl'].mean:.3f}. Full KD, which runs the teacher "
        f"in each step, reduces the KL to {full.figures['kl'].mean:.3f}."
    )
    shares = [
        f"{row.recovered.mean:.0f} % ({row.method}, {row.bytes_per_token:.0f} bytes)"
        for row in results.methods
        if row.recovered is not None and row.bytes_per_token is not None
    ]
    if not shares:
        return f"{said} The reduction by full KD is not distinguishable from noise."
    return f"{said} As a share of full KD's reduction, the caches reach {', '.join(shares)}."


def caution(results: Results) -> str:
    """Describe the limits of the results."""
    windows = results.teacher.windows if results.teacher else 0
    return (
        f"One seed and {windows} held-out windows: methods whose intervals overlap widely are not "
        "distinguishable. A student's loss can be below full KD's, because the student adapts to "
        "this text, on which the teacher was not trained; so compare KL and accepted share."
    )
