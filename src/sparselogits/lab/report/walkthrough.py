"""The page of a run from text to students: what was done, what it cost, what the students say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparselogits.files import write_whole
from sparselogits.lab.report.charts import Drawing, can_draw, curve_chart, dot_chart, looks_of
from sparselogits.lab.report.page import Cell, Column, Line, Methods, Panel, Table, render_page

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Trained:
    """One method of the run.

    Args:
        name: of the method.
        cells: by the columns of `COLUMNS`.
        curve: (step, cross-entropy to the labels in training), comparable between methods.
        heldout: loss on held-out text.
        less_ce: held-out loss less that of the student without a teacher, with the ends of its
            95 % interval; None for that student.
    """

    name: str
    cells: Sequence[Cell]
    curve: Points
    heldout: float
    less_ce: tuple[float, float | None, float | None] | None = None


@dataclass(frozen=True)
class Continuation:
    """A prompt, and what each model writes after it.

    Args:
        prompt: text from the held-out part.
        texts: by model.
    """

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Walkthrough:
    """What the page says.

    Args:
        title: of the page.
        headline: what was distilled, what it cost and what it shows, in one sentence.
        caution: what the numbers cannot show.
        students: the methods, in order.
        teacher: cells of the teacher.
        rivals: methods among which the best values are marked.
        continuations: samples of text.
        sampled: how the samples were drawn.
        window: page of a window of the cache, relative to this page; None without one.
        next_steps: (what it does, command) pairs.
        conditions: (name, value) pairs: settings, versions, hashes.
    """

    title: str
    headline: str
    caution: str
    students: Sequence[Trained]
    teacher: Sequence[Cell]
    rivals: Sequence[str]
    continuations: Sequence[Continuation] = ()
    sampled: str = ""
    window: str | None = None
    next_steps: Sequence[tuple[str, str]] = ()
    conditions: Sequence[tuple[str, str]] = field(default=())


COLUMNS = (
    Column("loss", best="low", main=True, help="held-out cross-entropy, nats per token"),
    Column("perplexity", best="low", help="exp of the loss"),
    Column("KL", best="low", main=True, help="KL(teacher || student) on held-out text, nats"),
    Column("entries", help="stored entries per token"),
    Column("bytes", help="bytes per token of the whole cache, the text included"),
    Column("seconds", main=True, help="training alone, wall clock"),
)


def write_walkthrough(found: Walkthrough, path: Path) -> None:
    """Write the page as one file; without the packages that draw charts, without charts.

    Raises:
        StorageError: the file cannot be written.
    """
    write_whole(path, walkthrough_page(found))


def walkthrough_page(found: Walkthrough) -> str:
    """Return the page."""
    names = [student.name for student in found.students]
    looks = looks_of({name: name for name in names})
    lines: list[Line] = [(student.name, student.cells) for student in found.students]
    table = Table("method", COLUMNS, lines, found.teacher).with_best(found.rivals)
    panel = Panel("", found.headline, table, drawings=_drawings(found) if can_draw() else [])
    return render_page(
        "walkthrough.html",
        title=found.title,
        panels=[panel],
        methods=Methods(looks, {name: name for name in names}),
        charts_drawn=can_draw(),
        found=found,
    )


def _drawings(found: Walkthrough) -> list[Drawing]:
    looks = looks_of({student.name: student.name for student in found.students})
    points = [
        {"method": student.name, "x": step, "y": loss}
        for student in found.students
        for step, loss in student.curve
    ]
    ends = [
        {"method": student.name, "x": student.curve[-1][0], "y": student.heldout}
        for student in found.students
        if student.curve
    ]
    drawings = []
    if points:
        chart = curve_chart(
            points, looks, x="optimiser steps", y="loss on the labels (nats)", ends=ends
        )
        note = "lines: training text; diamonds: held-out text, at the end"
        drawings.append(Drawing("losses", "Loss on the labels", chart, note))
    gaps = [
        {"method": student.name, "x": student.less_ce[0]}
        | {"low": student.less_ce[1], "high": student.less_ce[2]}
        for student in found.students
        if student.less_ce is not None
    ]
    if gaps:
        chart = dot_chart(gaps, looks, x="held-out loss less that of CE (nats)")
        note = "95 % interval over held-out windows; left of zero is better than no teacher"
        drawings.append(Drawing("gaps", "What the teacher adds", chart, note))
    return drawings
