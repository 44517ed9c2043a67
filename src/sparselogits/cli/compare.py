"""Define `sparselogits compare`, which trains a student by several methods and compares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    Allow,
    Device,
    Json,
    print_json,
    print_next,
    resolve_device,
    stdout,
)
from sparselogits.console import messages, stage, styled

if TYPE_CHECKING:
    from sparselogits.lab.compare import MethodRow, Results
    from sparselogits.lab.compare.results import MetricEstimate

WIDTH = 132
"""Width of a table in characters when the output is not a terminal."""


def compare(
    recipe: Path = typer.Argument(help="YAML recipe of the comparison."),
    teacher: str | None = MODEL(f"Teacher model: {MODEL_NAMES}.", shown="the recipe's"),
    data: str | None = DATA(
        "Text to distil on, as for `sparselogits cache`.", shown="the recipe's"
    ),
    out: Path | None = OUTPUT("Folder of the comparison.", shown="the recipe's"),
    device: Device = "auto",
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Train the same student by each method of a recipe, and compare the results."""
    from sparselogits.lab.compare import compare as run_comparison
    from sparselogits.lab.compare import load_compare_recipe
    from sparselogits.lab.report import write_report

    loaded = load_compare_recipe(recipe, teacher=teacher, data=data, out=out)
    results = run_comparison(loaded, device=resolve_device(device), stage=stage)
    page = write_report(results, loaded.out)
    for run in results.runs:
        if run.status == "failed":
            name = f"{run.method}, {run.student}, seed {run.seed}"
            messages.print(styled("failed:", "yellow", f" {name}: {run.message}"))
    for message in results.tasks_not_measured:
        messages.print(styled("task not measured:", "yellow", f" {message}"))
    for message in results.outgrown_teacher:
        messages.print(styled("the teacher is not better:", "yellow", f" {message}"))
    failures = ((row.student, row.gradient_failure) for row in results.methods)
    for student, reason in dict.fromkeys(failures):
        if reason is not None:
            messages.print(styled("no gradients:", "yellow", f" {student}: {reason}"))
    if as_json:
        print_json(results.model_dump(mode="json"))
        return
    console = stdout()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for table in _tables(results):
        console.print(table)
    console.print(f"metrics, runs and settings in {loaded.out / 'results.json'}, results.csv")
    console.print(f"page: {page}", soft_wrap=True)
    print_next(otherwise=f"open {page} in a browser")


def _tables(results: Results) -> list[Table]:
    """Return one table per student, with a row per method."""
    titles = ["method", "seeds", "entries", "B/token", *(title for title, _ in _COLUMNS)]
    measured = any(row.gradient for row in results.methods)
    titles += ["angle °"] if measured else []
    students = dict.fromkeys(row.student for row in results.methods)
    tables = []
    for student in students:
        title = f"{results.title}: {student}"
        table = Table(*titles, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify, column.min_width = "right", 7
        for row in results.methods:
            if row.student == student:
                angle = [_angle(row)] if measured else []
                table.add_row(row.method, *_cells(row), *angle)
        table.caption = (
            "±: half of the 95 % interval, bootstrap over windows and seeds. gap: (CE - method) / "
            "(CE - full KD) in loss; over: overconfidence; acc.: expected speculative acceptance"
        )
        if measured:
            table.caption += "; angle: between the gradients of the targets and of full KD"
        table.caption_justify = "left"
        tables.append(table)
    if results.teacher is not None and tables:
        teacher = results.teacher.figures
        tables[-1].caption = (
            f"teacher: loss {teacher['loss']:.3f}, ECE {100 * teacher['ece']:.2f} %. "
            f"{tables[-1].caption}"
        )
    return tables


def _with_interval(metric: MetricEstimate | None, scale: float, digits: int) -> str:
    """Format the mean of a metric, times a scale, with ± half the width of its interval."""
    if metric is None:
        return "-"
    mean = f"{scale * metric.mean:.{digits}f}"
    low, high = metric.both.low, metric.both.high
    if low is None or high is None:
        return mean
    return f"{mean} ±{scale * (high - low) / 2:.{digits}f}"


def _angle(row: MethodRow) -> str:
    """Format the angle between a method's gradient and full KD's gradient, in degrees."""
    return "-" if row.gradient is None else f"{row.gradient.sizes[-1].angle.mean:.1f}"


def _metric(name: str, scale: float, digits: int) -> Callable[[MethodRow], str]:
    """Return a function that formats the metric `name` of a row."""
    return lambda row: _with_interval(row.figures.get(name), scale, digits)


_COLUMNS: tuple[tuple[str, Callable[[MethodRow], str]], ...] = (
    ("loss", _metric("loss", 1, 3)),
    ("- CE", lambda row: _with_interval(row.minus_ce.get("loss"), 1, 3)),
    ("gap %", lambda row: _with_interval(row.gap_closed, 1, 0)),
    ("KL", _metric("kl", 1, 3)),
    ("ECE %", _metric("ece", 100, 1)),
    ("over %", _metric("overconfidence", 100, 1)),
    ("acc. %", _metric("acceptance", 100, 1)),
)
"""Title of each metric column, and the function that formats the column's cells."""


def _cells(row: MethodRow) -> list[str]:
    """Return the table cells of a method, except its name and its angle."""
    seeds = str(len(row.seeds_done))
    if row.seeds_failed:
        seeds += f" ({len(row.seeds_failed)} failed)"
    if not row.seeds_done:
        seeds = "not run" if not row.seeds_failed else "failed"
    numbers = [
        "-" if value is None else f"{value:.{digits}f}"
        for value, digits in ((row.entries, 1), (row.bytes_per_token, 2))
    ]
    return [seeds, *numbers, *(cell(row) for _, cell in _COLUMNS)]
