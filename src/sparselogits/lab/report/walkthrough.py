"""Render the page of the demo: results, samples of text, next steps and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparselogits.lab.report.charts import Drawing, can_draw, looks_of
from sparselogits.lab.report.page import Methods, Panel, Table, render_panels


@dataclass(frozen=True)
class Continuation:
    """Prompt, with the continuation that each model generated.

    Args:
        prompt: question, or beginning of a text.
        texts: continuation by name of the model.
    """

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Walkthrough:
    """Content of the demo's page.

    Args:
        title: title of the page.
        headline: summary of the results in a few sentences.
        caution: limits of the results.
        table: table with a row per method, and one for the teacher if it has results.
        drawings: charts, in which each method has the look that `looks_of` assigns to its name.
        continuations: samples of generated text.
        sampled: description of how the samples were generated.
        window: path, relative to this page, of the page that shows a window; None without one.
        next_steps: pairs of a description and a command.
        conditions: pairs of name and value: settings, versions, hashes.
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


def walkthrough_page(found: Walkthrough) -> str:
    """Return the page of the demo as HTML."""
    names = {name: name for name, _ in found.table.lines}
    return render_panels(
        "walkthrough.html",
        title=found.title,
        panels=[Panel("", found.headline, found.table, drawings=found.drawings)],
        methods=Methods(looks_of(names), names),
        charts_drawn=can_draw(),
        found=found,
    )
