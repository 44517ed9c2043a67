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
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparselogits.compare.results import Figure, MethodRow, Results, RunRow
from sparselogits.compare.task_scores import column_of
from sparselogits.errors import SparseLogitsWarning
from sparselogits.files import write_whole
from sparselogits.report.charts import draw_png, draw_svg
from sparselogits.report.comparison_charts import charts_of, in_words, students_of
from sparselogits.report.document import document


def write_report(results: Results, folder: Path) -> Path:
    """Write a comparison's page, and its figures where matplotlib is installed.

    Returns:
        The page.

    Raises:
        StorageError: it cannot be written.
    """
    charts = {student: charts_of(results, student) for student in students_of(results)}
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
    for student in students_of(results):
        rows = [row for row in results.methods if row.student == student]
        parts += [f"<h2>{escape(student)}</h2>", _table(rows, results)]
        parts += [_on_drafts(rows), _on_gradients(rows)]
        drawn = "".join(draw_svg(chart) for chart in charts_of(results, student))
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


def _lead(results: Results) -> str:
    done = sum(run.status == "done" for run in results.runs)
    said = f"{done} of {len(results.runs)} runs done."
    if not results.complete:
        said += " This comparison is not complete: what was not run says so."
    outgrown = "".join(
        f"<p><strong>The teacher is no better</strong>: {escape(words)}.</p>"
        for words in results.outgrown_teacher
    )
    return (
        f'<p>{said} ± is half of the 95 % interval (bootstrap over windows and seeds, "both" '
        f"in results.json).</p>{outgrown}"
    )


@dataclass(frozen=True)
class _Column:
    """A figure as the table shows it; `teacher` is its name among the teacher's, if it has it."""

    head: str
    of: Callable[[MethodRow], Figure | None]
    teacher: str | None
    scale: float = 1
    digits: int = 3


def _share(head: str, name: str) -> _Column:
    """A figure between 0 and 1, in per cent."""
    return _Column(head, lambda row: row.figures.get(name), name, 100, 1)


_COLUMNS = (
    _Column("loss", lambda row: row.figures.get("loss"), "loss"),
    _Column("perplexity", lambda row: row.perplexity, "perplexity", digits=1),
    _Column("- CE", lambda row: row.minus_ce.get("loss"), None),
    _Column("gap closed %", lambda row: row.gap_closed, None, digits=0),
    _Column("KL", lambda row: row.figures.get("kl"), None),
    _share("ECE %", "ece"),
    _share("ECE % (equal mass)", "ece_equal_mass"),
    _share("overconf. %", "overconfidence"),
    _share("acceptance %", "acceptance"),
)


def _table(rows: Sequence[MethodRow], results: Results) -> str:
    """A student's methods and the teacher; drafts and gradients where they were measured."""
    heads = ["method", "seeds", "entries", "bytes a token", *(column.head for column in _COLUMNS)]
    lines = [
        [row.method, _seeds(row), _plain(row.entries, 1), _plain(row.bytes_per_token, 2)]
        + [_estimate(column.of(row), column.scale, column.digits) for column in _COLUMNS]
        for row in rows
    ]
    last: list[tuple[str, Callable[[MethodRow], str]]] = []
    if any(row.realised for row in rows):
        last.append(("realised % (SE)", _realised))
    last.append(("tokens/s of a core", lambda row: _plain(row.tokens_per_cpu_second, 0)))
    if any(row.gradient for row in rows):
        last.append(("gradient angle °", _angle))
    for head, cell in last:
        heads.append(head)
        lines = [[*line, cell(row)] for line, row in zip(lines, rows, strict=True)]
    if results.teacher is not None:
        known = results.teacher.figures
        cells = (
            _plain(known.get(column.teacher), column.digits, column.scale) if column.teacher else ""
            for column in _COLUMNS
        )
        lines.append(["(the teacher)", "", "", "", *cells, *("" for _ in last)])
    return _grid(heads, lines)


def _realised(row: MethodRow) -> str:
    own = row.realised
    return "-" if own is None else f"{100 * own.acceptance:.1f} ({100 * own.error:.1f})"


def _on_drafts(rows: Sequence[MethodRow]) -> str:
    """What the column of realised acceptance is, where there is one."""
    if not any(row.realised for row in rows):
        return ""
    return (
        "<p>Realised: drafted tokens that the teacher accepted, of all that it verified, over all "
        "seeds; in brackets the standard error that so many tokens leave. It is measured on the "
        "models' own continuations, acceptance on the held-out text.</p>"
    )


def _angle(row: MethodRow) -> str:
    if row.gradient is None:
        return "-"
    own = row.gradient.sizes[-1].angle
    said = f"{own.mean:.1f}"
    return said if own.low is None or own.high is None else f"{said} ±{own.high - own.mean:.1f}"


def _on_gradients(rows: Sequence[MethodRow]) -> str:
    """What the column of angles is, and why angles are missing."""
    said = []
    measured = next((row.gradient for row in rows if row.gradient), None)
    if measured is not None:
        size = measured.sizes[-1]
        said.append(
            f"Gradient angle: between the gradient of a method's targets and full KD's, of all "
            f"parameters of the student that {measured.student_method}, seed "
            f"{measured.student_seed}, left; {size.batches} batches of {size.batch_tokens:,} "
            "held-out tokens, ± half of a t interval over them."
        )
    failures = dict.fromkeys(row.gradient_failure for row in rows if row.gradient_failure)
    said += [f"Gradients not measured: {message}" for message in failures]
    return "".join(f"<p>{escape(words)}</p>" for words in said)


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
    missing = results.tasks_not_measured
    notes = "".join(f"<p>Not measured: {escape(message)}</p>" for message in missing)
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
        f"<dt>{escape(name)}</dt><dd>{escape(in_words(value))}</dd>"
        for name, value in facts.items()
    )
    recipe = json.dumps(results.settings.get("recipe", {}), indent=2, ensure_ascii=False)
    return (
        f"<dl>{items}</dl><details><summary>recipe</summary><pre>{escape(recipe)}</pre></details>"
    )


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
