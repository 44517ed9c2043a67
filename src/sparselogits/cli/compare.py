"""Define `sparselogits compare`, which trains students by several methods and compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    Allow,
    Json,
    TrainingDevice,
    print_json,
    print_next,
)
from sparselogits.console import messages, results, stage, styled

if TYPE_CHECKING:
    from sparselogits.lab.compare import MethodRow, Results
    from sparselogits.lab.compare.results import MetricEstimate

WIDTH = 132
"""Minimum width of the output in characters if it is not a terminal."""


def compare(
    recipe: Path = typer.Argument(help="YAML recipe of the comparison."),
    teacher: str | None = MODEL(f"Teacher model: {MODEL_NAMES}.", shown="the recipe's"),
    data: str | None = DATA(
        "Text to distil on, as for `sparselogits cache`.", shown="the recipe's"
    ),
    out: Path | None = OUTPUT("Folder of the comparison.", shown="the recipe's"),
    device: TrainingDevice = "auto",
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Train each student of a recipe by each of the recipe's methods, and compare the results."""
    from sparselogits.lab.compare import compare as run_comparison
    from sparselogits.lab.compare import load_compare_recipe
    from sparselogits.lab.report import write_report

    loaded = load_compare_recipe(recipe, teacher=teacher, data=data, out=out)
    found = run_comparison(loaded, device=device, stage=stage)
    page = write_report(found, loaded.out)
    for run in found.runs:
        if run.status == "failed":
            _warn("failed", f"{run.method}, {run.student}, seed {run.seed}: {run.message}")
    for message in found.tasks_not_measured:
        _warn("task not measured", message)
    for message in found.outgrown_teacher:
        _warn("the teacher is not better", message)
    unmeasured = [f"{r.student}: {r.gradient_failure}" for r in found.methods if r.gradient_failure]
    for message in dict.fromkeys(unmeasured):
        _warn("no gradients", message)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    console = results()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for table in _tables(found):
        console.print(table)
    console.print(f"metrics, runs and settings in {loaded.out / 'results.json'}, results.csv")
    console.print(f"page: {page}", soft_wrap=True)
    print_next(otherwise=f"open {page} in a browser")


def _warn(label: str, text: str) -> None:
    messages.print(styled(f"{label}:", "yellow", f" {text}"))


def _tables(found: Results) -> list[Table]:
    """Return one table per student, with a row per method."""
    from sparselogits.objectives import Masked

    masked = isinstance(found.objective, Masked)
    columns = (*_COLUMNS, _AGREEMENT if masked else _ACCEPTANCE)
    titles = ["method", "seeds", "entries", "B/token", *(title for title, *_ in columns)]
    measured = any(row.gradient for row in found.methods)
    titles += ["angle °"] if measured else []
    caption = (
        "±: half of the 95 % interval, bootstrap over windows and seeds. gap: (CE - method) / "
        "(CE - full KD) in loss; over: overconfidence; "
    )
    if masked:
        caption += "agree: share of masked positions with the teacher's top token"
    else:
        caption += "acc.: expected speculative acceptance"
    if measured:
        caption += "; angle: between the gradients of the targets and of full KD"
    tables = []
    for student in dict.fromkeys(row.student for row in found.methods):
        table = Table(*titles, title=f"{found.title}: {student}", caption=caption, box=SIMPLE_HEAD)
        table.title_justify = table.caption_justify = "left"
        table.padding = (0, 1)
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify, column.min_width = "right", 7
        for row in found.methods:
            if row.student == student:
                angle = [_angle(row)] if measured else []
                table.add_row(row.method, *_cells(row, columns), *angle)
        tables.append(table)
    if found.teacher is not None and tables:
        loss, ece = (found.teacher.figures[name] for name in ("loss", "ece"))
        tables[-1].caption = f"teacher: loss {loss:.3f}, ECE {100 * ece:.2f} %. {caption}"
    return tables


_Column: TypeAlias = "tuple[str, Callable[[MethodRow], MetricEstimate | None], float, int]"
_COLUMNS: tuple[_Column, ...] = (
    ("loss", lambda row: row.figures.get("loss"), 1, 3),
    ("- CE", lambda row: row.minus_ce.get("loss"), 1, 3),
    ("gap %", lambda row: row.gap_closed, 1, 0),
    ("KL", lambda row: row.figures.get("kl"), 1, 3),
    ("ECE %", lambda row: row.figures.get("ece"), 100, 1),
    ("over %", lambda row: row.figures.get("overconfidence"), 100, 1),
)
"""Title, metric, scale factor and number of decimals of each metric column."""

_ACCEPTANCE: _Column = ("acc. %", lambda row: row.figures.get("acceptance"), 100, 1)
_AGREEMENT: _Column = ("agree %", lambda row: row.figures.get("agreement"), 100, 1)
"""Last metric columns of causal and of masked language models."""


def _cells(row: MethodRow, columns: Sequence[_Column]) -> list[str]:
    """Return the table cells of a method, except its name and its angle."""
    failed = f"{len(row.seeds_failed)} failed"
    seeds = str(len(row.seeds_done)) + (f" ({failed})" if row.seeds_failed else "")
    if not row.seeds_done:
        seeds = "failed" if row.seeds_failed else "not run"
    numbers = [
        "-" if value is None else f"{value:.{digits}f}"
        for value, digits in ((row.entries, 1), (row.bytes_per_token, 2))
    ]
    metrics = [(metric_of(row), scale, digits) for _, metric_of, scale, digits in columns]
    return [seeds, *numbers, *("-" if m is None else m.text(s, d) for m, s, d in metrics)]


def _angle(row: MethodRow) -> str:
    """Format the angle between a method's gradient and full KD's at the largest batch size."""
    return "-" if row.gradient is None else f"{row.gradient.sizes[-1].angle.mean:.1f}"
