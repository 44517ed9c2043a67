"""The page of the demo: settings, results, cost, and samples of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselogits.files import write_whole
from sparselogits.lab.report.charts import Drawing, can_draw, looks_of
from sparselogits.lab.report.page import Methods, Panel, Table, render_panels


@dataclass(frozen=True)
class Continuation:
    """A prompt, and what each model writes after it.

    Args:
        prompt: a question, or the beginning of a text.
        texts: continuation by model.
    """

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Walkthrough:
    """The content of the page.

    Args:
        title: title of the page.
        headline: what was distilled, what it cost and what it shows, in a few sentences.
        caution: what the numbers cannot show.
        table: one line per method, and one for the teacher.
        drawings: charts of the methods, whose looks are `looks_of` the table's names.
        continuations: samples of text.
        sampled: how the samples were drawn.
        window: page of a window of the cache, relative to this page; None without one.
        next_steps: (what it does, command) pairs.
        conditions: (name, value) pairs: settings, versions, hashes.
    """

    title: str
    headline: str
    caution: str
    table: Table
    drawings: Sequence[Drawing] = ()
    continuations: Sequence[Continuation] = ()
    sampled: str = ""
    window: str | None = None
    next_steps: Sequence[tuple[str, str]] = ()
    conditions: Sequence[tuple[str, str]] = ()


def write_walkthrough(found: Walkthrough, path: Path) -> None:
    """Write the page as one file; without the packages that draw charts, without charts.

    Raises:
        StorageError: the file cannot be written.
    """
    write_whole(path, walkthrough_page(found))


def walkthrough_page(found: Walkthrough) -> str:
    """Return the page."""
    names = {name: name for name, _ in found.table.lines}
    panel = Panel("", found.headline, found.table, drawings=found.drawings)
    return render_panels(
        "walkthrough.html",
        title=found.title,
        panels=[panel],
        methods=Methods(looks_of(names), names),
        charts_drawn=can_draw(),
        found=found,
    )
