"""Draw the charts of a comparison: loss, storage, gradients, calibration and training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any

from sparselogits.lab.compare.results import MethodRow, Results, RunRow
from sparselogits.lab.report.charts import Drawing, Look, budget_chart, curve_chart, looks_of
from sparselogits.methods import METHODS
from sparselogits.objectives import Masked
from sparselogits.samplers import find_sampler

LEVELS = {name: METHODS[name].title for name in ("ce", "full")}
"""Titles, by family, of the methods that charts of the loss draw as horizontal lines."""

ALL_SHOWN = 12
"""Largest number of methods for which all are shown when a page opens."""


def students_of(results: Results) -> list[str]:
    """Return the names of the students, in the order of the results."""
    return list(dict.fromkeys(row.student for row in results.methods))


def in_words(value: Any) -> str:
    """Format a setting as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(each)}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def series_of(row: MethodRow) -> str:
    """Return the name of the series that joins a method with those that differ only in entries."""
    kind = find_sampler(row.family)
    known = kind or METHODS.get(row.family)
    name = known.title if known else row.family
    left_out = {"method", "sampler", "name", "budget", *(kind.sizes() if kind else ())}
    more = [
        f"{k} {in_words(v)}".replace("_", " ")
        for k, v in sorted(row.spec.items())
        if k not in left_out
    ]
    return ", ".join([name, *more])


def looks_of_methods(results: Results) -> dict[str, Look]:
    """Assign each method a look that is the same for all students."""
    return looks_of({row.method: series_of(row) for row in results.methods})


def hidden_at_first(results: Results) -> list[str]:
    """Return the methods that are hidden when a page opens.

    If there are more than `ALL_SHOWN` methods, those with settings other than a budget are hidden.
    """
    names = {row.method: series_of(row) for row in results.methods}
    if len(names) <= ALL_SHOWN:
        return []
    return [method for method, series in names.items() if "," in series]


def drawings_of(results: Results, student: str) -> list[Drawing]:
    """Return the charts of a student, without those that have no point."""
    of_student = [r for r in results.methods if r.student == student]
    rows = [r for r in of_student if "loss" in r.figures]
    measured = [r for r in of_student if r.gradient]
    number = students_of(results).index(student)
    looks = looks_of_methods(results)
    series: dict[str, Look] = {}
    for row in results.methods:
        series.setdefault(series_of(row), looks[row.method])
    levels = [(LEVELS[r.family], r.figures["loss"].mean) for r in rows if r.family in LEVELS]
    levels = [(name, loss) for name, loss in levels if math.isfinite(loss)]

    token = "masked token" if isinstance(results.objective, Masked) else "token"
    drawings = []
    for key, against, of, x in (
        ("loss", f"entries per {token}", attrgetter("entries"), f"entries per {token}"),
        ("storage", "storage", attrgetter("bytes_per_token"), "bytes per token, targets alone"),
    ):
        if points := _points(rows, of, _loss_at):
            chart = budget_chart(points, series, x=x, y="held-out loss (nats)", levels=levels)
            drawings.append(Drawing(f"{key}-{number}", f"Held-out loss against {against}", chart))
    if points := _points(measured, _entries_measured, _angle_at):
        angles = [("CE", a) for r in measured if r.family == "ce" and (a := _angle_at(r)[0]) > 0]
        chart = budget_chart(
            points,
            series,
            x="entries per token",
            y="angle to full KD's gradient (degrees)",
            levels=angles,
            log_y=True,
        )
        drawings.append(
            Drawing(f"gradient-{number}", "Gradient angle against entries per token", chart)
        )
    points = [
        {"method": r.method, "x": b.confidence, "y": b.accuracy}
        for r in rows
        for b in r.reliability
    ]
    if points := _finite(points):
        chart = curve_chart(points, looks, x="confidence", y="accuracy", diagonal=True, marks=True)
        note = "15 bins of equal width; below the dashed line a student is overconfident"
        drawings.append(Drawing(f"calibration-{number}", "Calibration", chart, note))
    if points := _finite(_curves(results.runs, student, {row.method for row in of_student})):
        chart = curve_chart(
            points, looks, x="optimiser steps", y="training loss on the labels (nats)"
        )
        note = "first finished seed of each method"
        drawings.append(Drawing(f"training-{number}", "Training curves", chart, note))
    return drawings


_WithEnds = tuple[float, float | None, float | None]
"""Value, and the lower and upper end of its interval."""


def _points(
    rows: Sequence[MethodRow],
    budget_of: Callable[[MethodRow], float | None],
    metric_of: Callable[[MethodRow], _WithEnds],
) -> list[dict[str, Any]]:
    """Return one chart point per method that has a positive budget and a finite metric."""
    found = []
    for row in rows:
        x, (y, low, high) = budget_of(row), metric_of(row)
        if x is None or x <= 0 or not math.isfinite(x) or not math.isfinite(y):
            continue
        ends = [end if end is None or math.isfinite(end) else None for end in (low, high)]
        found.append(
            {"series": series_of(row), "method": row.method, "x": x, "y": y}
            | {"low": ends[0], "high": ends[1]}
        )
    return found


def _loss_at(row: MethodRow) -> _WithEnds:
    loss = row.figures["loss"]
    return loss.mean, loss.both.low, loss.both.high


def _entries_measured(row: MethodRow) -> float | None:
    """Return the measured entries per position, if any; None if the angle is 0.

    A logarithmic axis cannot show an angle of 0.
    """
    return row.gradient.entries if row.gradient and _angle_at(row)[0] > 0 else None


def _angle_at(row: MethodRow) -> _WithEnds:
    assert row.gradient is not None
    angle = row.gradient.sizes[-1].angle
    return angle.mean, angle.low, angle.high


def _finite(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for p in points if math.isfinite(p["x"]) and math.isfinite(p["y"])]


def _curves(runs: Sequence[RunRow], student: str, methods: Collection[str]) -> list[dict[str, Any]]:
    """Return the points of each method's training curve, from its first finished run."""
    first: dict[str, RunRow] = {}
    for run in runs:
        if run.student == student and run.method in methods and run.curve:
            first.setdefault(run.method, run)
    return [
        {"method": run.method, "x": step, "y": loss}
        for run in first.values()
        for step, loss in run.curve
    ]
