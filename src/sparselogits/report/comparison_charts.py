"""The charts of a comparison: losses, storage, gradients, calibration and training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from sparselogits.compare.results import MethodRow, Results, RunRow
from sparselogits.report.charts import Chart, Point, Series

_BUDGETS = {"method", "sampler", "name", "k", "rounds", "budget", "tau", "p", "max_entries"}
_LINES = {"ce": "CE", "full": "full KD"}
_FAMILIES = {"topk": "Top-K", "multinomial": "RS-KD", "topp": "Top-P"}


def students_of(results: Results) -> list[str]:
    """Names of the students, in order."""
    return list(dict.fromkeys(row.student for row in results.methods))


def in_words(value: Any) -> str:
    """A plain value of settings or a spec."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(own)}" for name, own in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def charts_of(results: Results, student: str) -> list[Chart]:
    """All charts of one student; those that no run has a point for are left out."""
    own = [r for r in results.methods if r.student == student]
    rows = [r for r in own if "loss" in r.figures]
    measured = [r for r in own if r.gradient]
    number = students_of(results).index(student)

    def key(name: str) -> str:
        return f"{name}-{number}"

    levels = tuple((_LINES[r.family], r.figures["loss"].mean) for r in rows if r.family in _LINES)
    loss = "held-out loss (nats)"
    charts = [
        Chart(
            key("loss"),
            "Loss against entries a token",
            "entries a token",
            loss,
            _families(rows, lambda row: row.entries, _loss_at),
            levels,
            log_x=True,
        ),
        Chart(
            key("storage"),
            "Storage against loss",
            "bytes a token, targets alone",
            loss,
            _families(rows, lambda row: row.bytes_per_token, _loss_at),
            levels,
            log_x=True,
        ),
        Chart(
            key("gradient"),
            "Gradient angle against entries a token",
            "entries a token",
            "angle to full KD's gradient (degrees)",
            _families(measured, _entries_measured, _angle_at),
            tuple(("CE", a) for r in measured if r.family == "ce" and (a := _angle_at(r)[0]) > 0),
            log_x=True,
            log_y=True,
        ),
        Chart(
            key("calibration"),
            "Calibration, 15 bins of equal width",
            "confidence",
            "accuracy",
            tuple(
                Series(r.method, tuple(Point(b.confidence, b.accuracy) for b in r.reliability))
                for r in rows
            ),
            marks=False,
            diagonal=True,
        ),
        Chart(
            key("training"),
            "Training curves, first seed done",
            "optimiser steps",
            "training loss on labels (nats)",
            _curves(results.runs, student),
            marks=False,
        ),
    ]
    kinds = {row.method: _kind(row) for row in own} | {_family(row): _kind(row) for row in own}
    return [_in_panels(chart, kinds) for chart in charts if chart.series]


_WithEnds = tuple[float, float | None, float | None]


def _families(
    rows: Sequence[MethodRow],
    of: Callable[[MethodRow], float | None],
    at: Callable[[MethodRow], _WithEnds],
) -> tuple[Series, ...]:
    """Methods that differ by their budget alone, as one series.

    Args:
        rows: of the methods.
        of: x of a method.
        at: its y with the ends of an interval.
    """
    found: dict[str, list[Point]] = {}
    for row in rows:
        x = of(row)
        y, low, high = at(row)
        if x is None or x <= 0:
            continue
        found.setdefault(_family(row), []).append(Point(x, y, low, high, row.method))
    return tuple(Series(n, tuple(sorted(p, key=lambda q: q.x))) for n, p in found.items())


def _loss_at(row: MethodRow) -> _WithEnds:
    figure = row.figures["loss"]
    return figure.mean, figure.both.low, figure.both.high


def _entries_measured(row: MethodRow) -> float | None:
    """None also for targets whose gradient is full KD's, as no logarithm is."""
    return row.gradient.entries if row.gradient and _angle_at(row)[0] > 0 else None


def _angle_at(row: MethodRow) -> _WithEnds:
    assert row.gradient is not None
    angle = row.gradient.sizes[-1].angle
    return angle.mean, angle.low, angle.high


def _family(row: MethodRow) -> str:
    name = _FAMILIES.get(row.family, row.family)
    more = [
        f"{k} {in_words(v)}".replace("_", " ")
        for k, v in sorted(row.spec.items())
        if k not in _BUDGETS
    ]
    return ", ".join([name, *more])


_Kind = tuple[str, tuple[str, ...], str, float]


def _kind(row: MethodRow) -> _Kind:
    """Family, which options it has, which values of them, and entries: what belongs together."""
    options = tuple(sorted(row.spec.keys() - _BUDGETS))
    return row.family, options, _family(row), row.entries or 0


def _in_panels(chart: Chart, kinds: Mapping[str, _Kind]) -> Chart:
    """The chart, in panels of what belongs together if it has too many series for one drawing.

    CE and full KD, where they are series, are in every panel, to compare with.
    """
    if len(chart.series) <= chart.most:
        return chart
    lines: dict[str, Series] = {}
    for series in chart.series:
        if (family := kinds[series.name][0]) in _LINES:
            lines.setdefault(family, series)
    rest = [series for series in chart.series if series not in lines.values()]
    seen: dict[tuple[object, ...], int] = {}  # families and the like in order of their first
    for series in rest:
        for depth in (1, 2, 3):
            seen.setdefault(kinds[series.name][:depth], len(seen))

    def order(series: Series) -> tuple[float, ...]:
        kind = kinds[series.name]
        return *(seen[kind[:depth]] for depth in (1, 2, 3)), kind[3]

    room = chart.most - len(lines)
    panels: list[list[Series]] = [[]]
    for group in _groups(sorted(rest, key=order), kinds, room):
        if len(panels[-1]) + len(group) > room:
            panels.append([])
        panels[-1] += group
    return replace(chart, panels=tuple((*lines.values(), *panel) for panel in panels))


def _groups(
    series: Sequence[Series], kinds: Mapping[str, _Kind], room: int, depth: int = 2
) -> Iterator[Sequence[Series]]:
    """What is to stay in one panel: alike in its options, or else also in their values."""
    for _, alike in groupby(series, key=lambda each: kinds[each.name][:depth]):
        group = list(alike)
        if len(group) <= room:
            yield group
        elif depth == 2:
            yield from _groups(group, kinds, room, depth=3)
        else:
            yield from (group[start : start + room] for start in range(0, len(group), room))


def _curves(runs: Sequence[RunRow], student: str) -> tuple[Series, ...]:
    found: dict[str, Series] = {}
    for run in runs:
        if run.student == student and run.curve:
            points = tuple(Point(step, loss) for step, loss in run.curve if math.isfinite(loss))
            found.setdefault(run.method, Series(run.method, points))
    return tuple(found.values())
