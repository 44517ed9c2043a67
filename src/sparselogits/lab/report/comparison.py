"""Write the page of a comparison (headline, table, charts, settings), and its charts as PNG.

    OUT/report.html      needs nothing else and loads nothing
    OUT/figures/*.png    the charts, of the methods that the page shows at first

The numbers are beside the page as JSON and CSV (`compare/results.py`). Without the packages that
draw charts the page has its tables and says what to install.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselogits.errors import SparseLogitsWarning
from sparselogits.files import write_whole
from sparselogits.lab.compare.results import Figure, MethodRow, Results, RunRow
from sparselogits.lab.compare.tasks import column_of
from sparselogits.lab.report.charts import can_draw, draw_png
from sparselogits.lab.report.comparison_charts import (
    drawings_of,
    hidden_at_first,
    in_words,
    looks_of_methods,
    only,
    series_of,
    students_of,
)
from sparselogits.lab.report.headline import headline
from sparselogits.lab.report.page import Cell, Column, Methods, Panel, Table, render_panels
from sparselogits.methods import ONLINE
from sparselogits.untrusted import printable


def write_report(results: Results, folder: Path) -> Path:
    """Write a comparison's page and its charts as PNG.

    Without the packages that draw charts, a SparseLogitsWarning says what to install and the page
    has its tables alone.

    Returns:
        Path of the page.

    Raises:
        StorageError: the folder cannot be written.
    """
    results = _with_plain_names(results)
    path = folder / "report.html"
    write_whole(path, _page(results))
    if not can_draw():
        warnings.warn(
            "the report has no charts: altair or vl-convert-python is not installed; "
            "pip install 'sparselogits[report]', then run `sparselogits report` on this folder",
            SparseLogitsWarning,
            stacklevel=2,
        )
        return path
    hidden = hidden_at_first(results)
    shown = only(results, {row.method for row in results.methods} - set(hidden))
    for student in students_of(shown):
        for drawing in drawings_of(shown, student):
            draw_png(drawing, folder / "figures" / f"{drawing.key}.png")
    return path


def report_page(results: Results) -> str:
    """Return the page alone."""
    return _page(_with_plain_names(results))


def _page(results: Results) -> str:
    panels = []
    for student in students_of(results):
        rows = [row for row in results.methods if row.student == student]
        panels.append(
            Panel(
                title=student,
                headline=headline(results, student),
                table=_table(rows, results),
                notes=[*_on_drafts(rows), *_on_gradients(rows)],
                drawings=drawings_of(results, student) if can_draw() else [],
                more=_tasks(rows, results),
            )
        )
    methods = Methods(
        looks=looks_of_methods(results),
        groups={row.method: series_of(row) for row in results.methods},
        hidden=hidden_at_first(results),
    )
    return render_panels(
        "comparison.html",
        title=results.title,
        panels=panels,
        methods=methods,
        charts_drawn=can_draw(),
        lead=_lead(results),
        outgrown=results.outgrown_teacher,
        not_measured=results.tasks_not_measured,
        runs=_runs(results.runs),
        facts=_facts(results),
        recipe=json.dumps(results.settings.get("recipe", {}), indent=2, ensure_ascii=False),
    )


LONGEST_NAME = 120
"""Characters of a name that a page shows; the middle of a longer one is cut out."""


def _with_plain_names(results: Results) -> Results:
    """Return the results with control characters in their names escaped, and long names cut.

    Names come from files. A picture cannot be drawn with a control character in it, and a
    bidirectional override would make a name read as another one.
    """

    def plain(row: MethodRow | RunRow) -> dict[str, str]:
        return {
            "method": printable(row.method, LONGEST_NAME),
            "student": printable(row.student, LONGEST_NAME),
        }

    return results.model_copy(
        update={
            "title": printable(results.title, 2 * LONGEST_NAME),
            "methods": [row.model_copy(update=plain(row)) for row in results.methods],
            "runs": [run.model_copy(update=plain(run)) for run in results.runs],
        }
    )


def _lead(results: Results) -> str:
    done = sum(run.status == "done" for run in results.runs)
    said = f"{done} of {len(results.runs)} runs done."
    if not results.complete:
        said += " This comparison is not complete: a method that was not run says so."
    return said


@dataclass(frozen=True)
class _Metric:
    """A metric of the table.

    Args:
        column: how it is shown.
        of: returns a method's value.
        teacher: name of the metric among the teacher's, if the teacher has it.
        scale: factor from the stored value to the shown one.
        digits: after the decimal point.
    """

    column: Column
    of: Callable[[MethodRow], Figure | None]
    teacher: str | None
    scale: float = 1
    digits: int = 3


def _stored(name: str) -> Callable[[MethodRow], Figure | None]:
    return lambda row: row.figures.get(name)


_METRICS = (
    _Metric(
        Column("loss", best="low", main=True, help="held-out cross-entropy, nats per token"),
        _stored("loss"),
        "loss",
    ),
    _Metric(
        Column("perplexity", best="low", help="exp of the loss"),
        lambda row: row.perplexity,
        "perplexity",
        digits=1,
    ),
    _Metric(
        Column("- CE", best="low", help="loss less that of CE, paired by seed and window"),
        lambda row: row.minus_ce.get("loss"),
        None,
    ),
    _Metric(
        Column(
            "gap closed %",
            best="high",
            main=True,
            help="share of the way from CE's loss to full KD's",
        ),
        lambda row: row.gap_closed,
        None,
        digits=0,
    ),
    _Metric(Column("KL", best="low", help="KL(teacher || student), nats"), _stored("kl"), None),
    _Metric(
        Column("ECE %", best="low", help="expected calibration error, bins of equal width"),
        _stored("ece"),
        "ece",
        100,
        1,
    ),
    _Metric(
        Column("ECE % (equal mass)", best="low", help="the same, bins of equal mass"),
        _stored("ece_equal_mass"),
        "ece_equal_mass",
        100,
        1,
    ),
    _Metric(
        Column("overconf. %", best="zero", help="mean confidence less accuracy"),
        _stored("overconfidence"),
        "overconfidence",
        100,
        1,
    ),
    _Metric(
        Column("acceptance %", best="high", help="expected acceptance of speculative drafts"),
        _stored("acceptance"),
        "acceptance",
        100,
        1,
    ),
)


def _table(rows: Sequence[MethodRow], results: Results) -> Table:
    """Return a student's table, with drafts and gradients where they were measured."""
    columns = [
        Column("seeds"),
        Column("entries", main=True, help="stored entries per token"),
        Column("bytes per token", help="of the targets, without the text"),
        *(metric.column for metric in _METRICS),
    ]
    more: list[tuple[Column, Callable[[MethodRow], Cell]]] = []
    if any(row.realised for row in rows):
        more.append((Column("realised % (SE)", best="high"), _realised))
    speed = Column("tokens/s of a core", help="of training, by processor time")
    more.append((speed, lambda row: _plain(row.tokens_per_cpu_second, 0)))
    if any(row.gradient for row in rows):
        more.append((Column("gradient angle °", best="low", help="to full KD's gradient"), _angle))
    columns += [column for column, _ in more]
    lines = [
        (
            row.method,
            [
                _seeds(row),
                _plain(row.entries, 1),
                _plain(row.bytes_per_token, 2),
                *(_estimate(metric.of(row), metric.scale, metric.digits) for metric in _METRICS),
                *(cell(row) for _, cell in more),
            ],
        )
        for row in rows
    ]
    last: list[Cell] = []
    if results.teacher is not None:
        known = results.teacher.figures
        last = [Cell("")] * 3 + [
            _plain(known.get(m.teacher), m.digits, m.scale) if m.teacher else Cell("")
            for m in _METRICS
        ]
        last += [Cell("")] * len(more)
    # a student that runs its teacher in every step is the aim, not a rival
    rivals = {row.method for row in rows if row.family not in ONLINE}
    return Table("method", columns, lines, last).with_best(rivals)


def _realised(row: MethodRow) -> Cell:
    own = row.realised
    if own is None:
        return Cell("-")
    return Cell(f"{100 * own.acceptance:.1f} ({100 * own.error:.1f})", own.acceptance)


def _on_drafts(rows: Sequence[MethodRow]) -> list[str]:
    """Say what the column of realised acceptance is, where there is one."""
    if not any(row.realised for row in rows):
        return []
    return [
        "Realised: drafted tokens that the teacher accepted, of all that it verified, over all "
        "seeds; in brackets the standard error that so many tokens leave. It is measured on the "
        "models' own continuations, acceptance on the held-out text."
    ]


def _angle(row: MethodRow) -> Cell:
    if row.gradient is None:
        return Cell("-")
    own = row.gradient.sizes[-1].angle
    said = f"{own.mean:.1f}"
    if own.low is not None and own.high is not None:
        said += f" ±{own.high - own.mean:.1f}"
    return Cell(said, own.mean)


def _on_gradients(rows: Sequence[MethodRow]) -> list[str]:
    """Say what the column of angles is, and why angles are missing."""
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
    return said + [f"Gradients not measured: {message}" for message in failures]


def _runs(runs: Sequence[RunRow]) -> Table:
    columns = [Column(name) for name in ("student", "seed", "status", "loss", "steps", "seconds")]
    lines = [
        (
            run.method,
            [
                Cell(run.student),
                Cell(str(run.seed), run.seed),
                Cell(run.status + (f": {run.message}" if run.message else "")),
                _plain(run.figures.get("loss"), 4),
                Cell("-") if run.steps is None else Cell(str(run.steps), run.steps),
                _plain(run.seconds, 1),
            ],
        )
        for run in runs
    ]
    return Table("method", columns, lines)


def _tasks(rows: Sequence[MethodRow], results: Results) -> Table | None:
    """Return the table of zero-shot tasks, where there are any."""
    names = list(dict.fromkeys(name for row in rows for name in row.tasks))
    if not names:
        return None
    shown = [(name, *column_of(name)) for name in names]
    lines = [
        (row.method, [_estimate(row.tasks.get(n), scale, d) for n, _, scale, d in shown])
        for row in rows
    ]
    last: list[Cell] = []
    if results.teacher is not None:
        known = results.teacher.tasks
        last = [_plain(known.get(n), digits, scale) for n, _, scale, digits in shown]
    return Table("method", [Column(head) for _, head, _, _ in shown], lines, last)


def _facts(results: Results) -> list[tuple[str, str]]:
    facts: dict[str, Any] = dict(results.provenance)
    facts |= {k: v for k, v in results.settings.items() if k != "recipe"}
    return [(name.replace("_", " "), in_words(value)) for name, value in facts.items()]


def _seeds(row: MethodRow) -> Cell:
    done = len(row.seeds_done)
    failed = f"{len(row.seeds_failed)} failed" if row.seeds_failed else ""
    if not done:
        return Cell(failed or "not run", 0)
    return Cell(f"{done} ({failed})" if failed else str(done), done)


def _plain(value: float | None, digits: int, scale: float = 1) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("-")
    return Cell(f"{scale * value:.{digits}f}", scale * value)


def _estimate(figure: Figure | None, scale: float, digits: int) -> Cell:
    if figure is None:
        return Cell("-")
    said, ends = f"{scale * figure.mean:.{digits}f}", figure.both
    if ends.low is not None and ends.high is not None:
        said += f" ±{scale * (ends.high - ends.low) / 2:.{digits}f}"
    return Cell(said, scale * figure.mean if math.isfinite(figure.mean) else None)
