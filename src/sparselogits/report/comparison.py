"""The report of a comparison: tables, figures, settings, as one page; the figures as PNG beside it.

    OUT/report.html      needs nothing else and loads nothing
    OUT/figures/*.png    the same figures, where matplotlib is installed

The numbers stand beside it as JSON and CSV (`compare/results.py`). A cell that no run has filled
says so.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparselogits.compare.results import Figure, MethodRow, Results, RunRow
from sparselogits.compare.task_scores import column_of
from sparselogits.errors import SparseLogitsWarning
from sparselogits.files import write_whole
from sparselogits.report.charts import Chart, Point, Series, draw_png, draw_svg
from sparselogits.report.document import document

_BUDGETS = {"method", "sampler", "name", "k", "rounds", "budget", "tau", "p", "max_entries"}
_FAMILIES = {"topk": "Top-K", "multinomial": "RS-KD", "topp": "Top-P"}


def write_report(results: Results, folder: Path) -> Path:
    """Write a comparison's page, and its figures where matplotlib is installed.

    Returns:
        The page.

    Raises:
        OSError: it cannot be written.
    """
    charts = {student: _charts(results, student) for student in _students(results)}
    page = folder / "report.html"
    write_whole(page, report_page(results))
    if find_spec("matplotlib") is None:
        warnings.warn(
            "the report has no PNG figures: pip install 'sparselogits[report]'",
            SparseLogitsWarning,
            stacklevel=2,
        )
        return page
    for own in charts.values():
        for chart in own:
            draw_png(chart, folder / "figures" / f"{chart.key}.png")
    return page


def report_page(results: Results) -> str:
    """The page alone."""
    parts = [f"<h1>{escape(results.title)}</h1>", _lead(results)]
    for student in _students(results):
        rows = [row for row in results.methods if row.student == student]
        parts += [f"<h2>{escape(student)}</h2>", _table(rows, results)]
        drawn = "".join(draw_svg(chart) for chart in _charts(results, student))
        parts.append(f'<div class="figures">{drawn}</div>')
        parts.append(_tasks(rows, results))
    runs = (
        f"<details><summary>all {len(results.runs)} runs</summary>{_runs(results.runs)}</details>"
    )
    parts += ["<h2>Runs</h2>", runs, "<h2>Settings</h2>", _settings(results)]
    return document(
        results.title,
        f"<main>{''.join(parts)}</main>",
        styles=["theme.css", "report.css"],
        script="report.js",
    )


def _students(results: Results) -> list[str]:
    return list(dict.fromkeys(row.student for row in results.methods))


def _lead(results: Results) -> str:
    done = sum(run.status == "done" for run in results.runs)
    said = f"{done} of {len(results.runs)} runs done."
    if not results.complete:
        said += " This comparison is not complete: what was not run says so."
    return (
        f'<p>{said} ± is half of the 95 % interval (bootstrap over windows and seeds, "both" '
        "in results.json).</p>"
    )


_COLUMNS: tuple[tuple[str, Callable[[MethodRow], Figure | None], float, int], ...] = (
    ("loss", lambda row: row.figures.get("loss"), 1, 3),
    ("- CE", lambda row: row.minus_ce.get("loss"), 1, 3),
    ("gap closed %", lambda row: row.gap_closed, 1, 0),
    ("KL", lambda row: row.figures.get("kl"), 1, 3),
    ("ECE %", lambda row: row.figures.get("ece"), 100, 1),
    ("overconf. %", lambda row: row.figures.get("overconfidence"), 100, 1),
    ("acceptance %", lambda row: row.figures.get("acceptance"), 100, 1),
)


def _table(rows: Sequence[MethodRow], results: Results) -> str:
    heads = ["method", "seeds", "entries", "bytes a token", *(name for name, *_ in _COLUMNS)]
    lines = [
        [row.method, _seeds(row), _plain(row.entries, 1), _plain(row.bytes_per_token, 2)]
        + [_estimate(of(row), scale, digits) for _, of, scale, digits in _COLUMNS]
        for row in rows
    ]
    if results.teacher is not None:
        known = results.teacher.figures
        lines.append(
            ["(the teacher)", "", "", "", _plain(known.get("loss"), 3), "", "", ""]
            + [_plain(known.get(name), 1, 100) for name in ("ece", "overconfidence", "acceptance")]
        )
    return _grid(heads, lines)


def _runs(runs: Sequence[RunRow]) -> str:
    heads = ["method", "student", "seed", "status", "loss", "steps", "seconds"]
    lines = [
        [
            run.method,
            run.student,
            str(run.seed),
            run.status + (f": {run.message}" if run.message else ""),
            _plain(run.figures.get("loss"), 4),
            "-" if run.steps is None else str(run.steps),
            _plain(run.seconds, 1),
        ]
        for run in runs
    ]
    return _grid(heads, lines)


def _tasks(rows: Sequence[MethodRow], results: Results) -> str:
    """Zero-shot tasks, where there are any, and why some are missing."""
    failed = {f"{n}: {why}": None for run in results.runs for n, why in run.tasks_failed.items()}
    notes = "".join(f"<p>Not measured: {escape(message)}</p>" for message in failed)
    names = list(dict.fromkeys(name for row in rows for name in row.tasks))
    if not names:
        return notes
    columns = [(name, *column_of(name)) for name in names]
    lines = [
        [
            row.method,
            *(_estimate(row.tasks.get(n), scale, digits) for n, _, scale, digits in columns),
        ]
        for row in rows
    ]
    if results.teacher is not None:
        known = results.teacher.tasks
        cells = (_plain(known.get(n), digits, scale) for n, _, scale, digits in columns)
        lines.append(["(the teacher)", *cells])
    said = (
        "± is half of the 95 % interval (bootstrap over a task's samples and seeds). By chance a "
        "quarter of continuation and half of agreement is right."
    )
    table = _grid(["method", *(head for _, head, _, _ in columns)], lines)
    return f"<h3>Zero-shot tasks</h3><p>{said}</p>{table}{notes}"


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return (
        '<div class="wide" tabindex="0"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _settings(results: Results) -> str:
    facts: dict[str, Any] = dict(results.provenance)
    facts |= {k: v for k, v in results.settings.items() if k != "recipe"}
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_said(value))}</dd>" for name, value in facts.items()
    )
    recipe = json.dumps(results.settings.get("recipe", {}), indent=2, ensure_ascii=False)
    return (
        f"<dl>{items}</dl><details><summary>recipe</summary><pre>{escape(recipe)}</pre></details>"
    )


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(own)}" for name, own in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _seeds(row: MethodRow) -> str:
    failed = f"{len(row.seeds_failed)} failed" if row.seeds_failed else ""
    if not row.seeds_done:
        return failed or "not run"
    return f"{len(row.seeds_done)} ({failed})" if failed else str(len(row.seeds_done))


def _plain(value: float | None, digits: int, scale: float = 1) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{scale * value:.{digits}f}"


def _estimate(figure: Figure | None, scale: float, digits: int) -> str:
    if figure is None:
        return "-"
    said, ends = f"{scale * figure.mean:.{digits}f}", figure.both
    if ends.low is None or ends.high is None:
        return said
    return f"{said} ±{scale * (ends.high - ends.low) / 2:.{digits}f}"


def _charts(results: Results, student: str) -> list[Chart]:
    rows = [r for r in results.methods if r.student == student and "loss" in r.figures]
    number = _students(results).index(student)

    def key(name: str) -> str:
        return f"{name}-{number}"

    plain = {"ce": "CE", "full": "full KD"}
    levels = tuple((plain[r.family], r.figures["loss"].mean) for r in rows if r.family in plain)
    loss = "held-out loss (nats)"
    charts = [
        Chart(
            key("loss"),
            "Loss against entries a token",
            "entries a token",
            loss,
            _families(rows, lambda row: row.entries),
            levels,
            log_x=True,
        ),
        Chart(
            key("storage"),
            "Storage against loss",
            "bytes a token, targets alone",
            loss,
            _families(rows, lambda row: row.bytes_per_token),
            levels,
            log_x=True,
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
    return [chart for chart in charts if chart.series]


def _families(
    rows: Sequence[MethodRow], of: Callable[[MethodRow], float | None]
) -> tuple[Series, ...]:
    """Methods that differ by their budget alone, as one series."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        x = of(row)
        if x is None or x <= 0:
            continue
        figure = row.figures["loss"]
        point = Point(x, figure.mean, figure.both.low, figure.both.high, row.method)
        found.setdefault(_family(row), []).append(point)
    return tuple(Series(n, tuple(sorted(p, key=lambda q: q.x))) for n, p in found.items())


def _family(row: MethodRow) -> str:
    name = _FAMILIES.get(row.family, row.family)
    more = [
        f"{k} {_said(v)}".replace("_", " ")
        for k, v in sorted(row.spec.items())
        if k not in _BUDGETS
    ]
    return ", ".join([name, *more])


def _curves(runs: Sequence[RunRow], student: str) -> tuple[Series, ...]:
    found: dict[str, Series] = {}
    for run in runs:
        if run.student == student and run.curve:
            points = tuple(Point(step, loss) for step, loss in run.curve if math.isfinite(loss))
            found.setdefault(run.method, Series(run.method, points))
    return tuple(found.values())
