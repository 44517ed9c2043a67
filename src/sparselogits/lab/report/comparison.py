"""Write the page of a comparison (summary, tables, charts, settings), and its charts as PNG.

    OUT/report.html      self-contained page
    OUT/figures/*.png    charts of the methods that the page shows when it opens

The numbers are those of results.json (`compare/results.py`). If the packages that draw charts are
missing, the page has no charts, and states what to install.
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
from sparselogits.lab.compare.results import MethodRow, MetricEstimate, Results, RunRow
from sparselogits.lab.compare.tasks import column_of
from sparselogits.lab.report.charts import can_draw, draw_png
from sparselogits.lab.report.comparison_charts import (
    drawings_of,
    hidden_at_first,
    in_words,
    looks_of_methods,
    series_of,
    students_of,
)
from sparselogits.lab.report.headline import headline
from sparselogits.lab.report.page import Cell, Column, Methods, Panel, Table, render_panels
from sparselogits.methods import ONLINE
from sparselogits.objectives import Masked
from sparselogits.untrusted import printable


def write_report(results: Results, folder: Path) -> Path:
    """Write the page of a comparison, and its charts as PNG.

    If the packages that draw charts are missing, a SparseLogitsWarning states what to install.

    Args:
        results: results of the comparison.
        folder: folder in which report.html and figures/ are written.

    Returns:
        Path of the page.

    Raises:
        StorageError: If the folder cannot be written.
    """
    path = folder / "report.html"
    write_whole(path, report_page(results))
    if not can_draw():
        warnings.warn(
            "the report has no charts: altair or vl-convert-python is not installed. Run pip "
            "install 'sparselogits[report]', then `sparselogits report` on this folder",
            SparseLogitsWarning,
            stacklevel=2,
        )
        return path
    results = _with_printable_names(results)
    hidden = hidden_at_first(results)
    rows = [row for row in results.methods if row.method not in hidden]
    shown = results.model_copy(update={"methods": rows})
    for student in students_of(shown):
        for drawing in drawings_of(shown, student):
            draw_png(drawing, folder / "figures" / f"{drawing.key}.png")
    return path


def report_page(results: Results) -> str:
    """Return the page of a comparison as HTML."""
    results = _with_printable_names(results)
    panels = []
    for student in students_of(results):
        rows = [row for row in results.methods if row.student == student]
        panels.append(
            Panel(
                title=student,
                headline=headline(results, student),
                table=_table(rows, results),
                notes=[*_notes_on_drafts(rows), *_notes_on_gradients(rows)],
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
        lead=_progress(results),
        outgrown=results.outgrown_teacher,
        not_measured=results.tasks_not_measured,
        runs=_runs(results.runs),
        facts=_facts(results),
        recipe=json.dumps(results.settings.get("recipe", {}), indent=2, ensure_ascii=False),
    )


LONGEST_NAME = 120
"""Number of characters above which the middle of a displayed name is cut out."""


def _with_printable_names(results: Results) -> Results:
    """Return the results with control characters in title and names escaped, and long ones cut.

    Control characters prevent drawing; bidirectional overrides disguise one name as another.
    """

    def names(row: MethodRow | RunRow) -> dict[str, str]:
        return {name: printable(getattr(row, name), LONGEST_NAME) for name in ("method", "student")}

    return results.model_copy(
        update={
            "title": printable(results.title, 2 * LONGEST_NAME),
            "methods": [row.model_copy(update=names(row)) for row in results.methods],
            "runs": [run.model_copy(update=names(run)) for run in results.runs],
        }
    )


def _progress(results: Results) -> str:
    """Describe how many runs are done."""
    done = sum(run.status == "done" for run in results.runs)
    said = f"{done} of {len(results.runs)} runs done."
    if not results.complete:
        said += " This comparison is not complete; methods without a run are marked as not run."
    if isinstance(results.objective, Masked):
        said += " The models predict masked tokens; all metrics are means over masked positions."
    return said


@dataclass(frozen=True)
class _Metric:
    """Metric shown in the table, with the format of its values."""

    column: Column
    of: Callable[[MethodRow], MetricEstimate | None]
    teacher: str | None  # name in the teacher's results; None if the teacher has no value
    scale: float = 1
    digits: int = 3  # after the decimal point


def _stored(name: str) -> Callable[[MethodRow], MetricEstimate | None]:
    return lambda row: row.figures.get(name)


_METRICS = (
    _Metric(
        Column("loss", "low", True, "held-out cross-entropy, nats per token"),
        *(_stored("loss"), "loss"),
    ),
    _Metric(
        Column("perplexity", "low", help="exp of the loss"),
        *(lambda row: row.perplexity, "perplexity", 1, 1),
    ),
    _Metric(
        Column("- CE", "low", help="loss minus the loss of CE, paired by seed and window"),
        *(lambda row: row.minus_ce.get("loss"), None),
    ),
    _Metric(
        Column(
            *("gap closed %", "high", True),
            help="share of the gap between CE's loss and full KD's that is closed",
        ),
        *(lambda row: row.gap_closed, None, 1, 0),
    ),
    _Metric(
        Column("KL", "low", help="mean KL(teacher || student), nats per token"), _stored("kl"), None
    ),
    _Metric(
        Column("ECE %", "low", help="expected calibration error, bins of equal width"),
        *(_stored("ece"), "ece", 100, 1),
    ),
    _Metric(
        Column("ECE % (equal mass)", "low", help="expected calibration error, bins of equal mass"),
        *(_stored("ece_equal_mass"), "ece_equal_mass", 100, 1),
    ),
    _Metric(
        Column("overconf. %", "zero", help="mean confidence minus accuracy"),
        *(_stored("overconfidence"), "overconfidence", 100, 1),
    ),
    _Metric(
        Column("acceptance %", "high", help="expected acceptance of speculative drafts"),
        *(_stored("acceptance"), "acceptance", 100, 1),
    ),
)
_OF_MASKED = (
    *_METRICS[:-1],  # a masked language model drafts nothing
    _Metric(
        Column("agreement %", best="high", help="share of positions with the teacher's top token"),
        _stored("agreement"),
        None,
        100,
        1,
    ),
)


def _table(rows: Sequence[MethodRow], results: Results) -> Table:
    """Return the table of a student's methods; drafting and gradients have columns if measured."""
    metrics = _OF_MASKED if isinstance(results.objective, Masked) else _METRICS
    columns = [
        Column("seeds"),
        Column("entries", main=True, help="entries per predicted token in training"),
        Column("bytes per token", help="bytes of the cached targets per token of text"),
        *(metric.column for metric in metrics),
    ]
    more: list[tuple[Column, Callable[[MethodRow], Cell]]] = []
    if any(row.realised for row in rows):
        more.append((Column("realised % (SE)", best="high"), _realised))
    speed = Column("tokens/s of a core", help="training tokens per second of processor time")
    more.append((speed, lambda row: _number(row.tokens_per_cpu_second, 0)))
    if any(row.gradient for row in rows):
        angle = Column("gradient angle °", best="low", help="angle to full KD's gradient")
        more.append((angle, _angle))
    columns += [column for column, _ in more]
    lines = [
        (
            row.method,
            [
                _seeds(row),
                _number(row.entries, 1),
                _number(row.bytes_per_token, 2),
                *(_estimate(metric.of(row), metric.scale, metric.digits) for metric in metrics),
                *(cell(row) for _, cell in more),
            ],
        )
        for row in rows
    ]
    last: list[Cell] = []
    if results.teacher is not None:
        of_teacher = results.teacher.figures
        last = [Cell("")] * 3 + [
            _number(of_teacher.get(m.teacher), m.digits, m.scale) if m.teacher else Cell("")
            for m in metrics
        ]
        last += [Cell("")] * len(more)
    # methods with the teacher online are references, among which no best value is marked
    rivals = {row.method for row in rows if row.family not in ONLINE}
    return Table("method", columns, lines, last).with_best(rivals)


def _realised(row: MethodRow) -> Cell:
    found = row.realised
    if found is None:
        return Cell("-")
    return Cell(f"{100 * found.acceptance:.1f} ({100 * found.error:.1f})", found.acceptance)


def _notes_on_drafts(rows: Sequence[MethodRow]) -> list[str]:
    """Explain the column of realised acceptance if the table has it."""
    if not any(row.realised for row in rows):
        return []
    return [
        "Realised: share of the drafted and verified tokens that the teacher accepted, over all "
        "seeds, with the standard error in brackets. Realised acceptance is measured on text that "
        "the students draft, acceptance on the held-out text."
    ]


def _angle(row: MethodRow) -> Cell:
    if row.gradient is None:
        return Cell("-")
    angle = row.gradient.sizes[-1].angle
    said = f"{angle.mean:.1f}"
    if angle.low is not None and angle.high is not None:
        said += f" ±{angle.high - angle.mean:.1f}"
    return Cell(said, angle.mean)


def _notes_on_gradients(rows: Sequence[MethodRow]) -> list[str]:
    """Explain the column of gradient angles if the table has it, and missing measurements."""
    said = []
    measured = next((row.gradient for row in rows if row.gradient), None)
    if measured is not None:
        size = measured.sizes[-1]
        said.append(
            "Gradient angle: angle between the gradient of a method's targets and full KD's, over "
            f"all parameters of the student of {measured.student_method}, seed "
            f"{measured.student_seed}; mean over {size.batches} batches of {size.batch_tokens:,} "
            "held-out tokens, ± half the width of a t interval over batches."
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
                _number(run.figures.get("loss"), 4),
                Cell("-") if run.steps is None else Cell(str(run.steps), run.steps),
                _number(run.seconds, 1),
            ],
        )
        for run in runs
    ]
    return Table("method", columns, lines)


def _tasks(rows: Sequence[MethodRow], results: Results) -> Table | None:
    """Return the table of zero-shot tasks; None if no method has scores."""
    names = list(dict.fromkeys(name for row in rows for name in row.tasks))
    if not names:
        return None
    columns = [(name, *column_of(name)) for name in names]
    lines = [
        (row.method, [_estimate(row.tasks.get(n), scale, d) for n, _, scale, d in columns])
        for row in rows
    ]
    last: list[Cell] = []
    if results.teacher is not None:
        of_teacher = results.teacher.tasks
        last = [_number(of_teacher.get(n), digits, scale) for n, _, scale, digits in columns]
    return Table("method", [Column(head) for _, head, _, _ in columns], lines, last)


def _facts(results: Results) -> list[tuple[str, str]]:
    facts: dict[str, Any] = dict(results.provenance)
    facts |= {k: v for k, v in results.settings.items() if k != "recipe"}
    facts["objective"] = results.objective.in_words()
    return [(name.replace("_", " "), in_words(value)) for name, value in facts.items()]


def _seeds(row: MethodRow) -> Cell:
    done = len(row.seeds_done)
    failed = f"{len(row.seeds_failed)} failed" if row.seeds_failed else ""
    if not done:
        return Cell(failed or "not run", 0)
    return Cell(f"{done} ({failed})" if failed else str(done), done)


def _number(value: float | None, digits: int, scale: float = 1) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("-")
    return Cell(f"{scale * value:.{digits}f}", scale * value)


def _estimate(found: MetricEstimate | None, scale: float, digits: int) -> Cell:
    if found is None:
        return Cell("-")
    value = scale * found.mean
    return Cell(found.text(scale, digits), value if math.isfinite(value) else None)
