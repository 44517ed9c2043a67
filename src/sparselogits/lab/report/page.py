"""What pages with tables and charts are made of, and how they become a file.

A table can be sorted, its columns can be chosen, the best value of a column is marked; a method can
be switched on and off in all charts at once (`static/report.js`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparselogits.lab.report.charts import DASHES, Drawing, Look, vega_script
from sparselogits.lab.report.document import render, static


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Args:
        text: as shown.
        value: by which the column is sorted; None sorts last.
        best: whether the value is marked as the best of its column.
    """

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        head: its heading.
        best: which value is the best: the lowest, the highest or the one nearest to zero.
        main: whether the column is shown on a narrow screen before columns are chosen.
        help: what the column holds.
    """

    head: str
    best: Literal["low", "high", "zero"] | None = None
    main: bool = False
    help: str = ""


Line = tuple[str, Sequence[Cell]]
"""A line of a table: its name and one cell per column."""


@dataclass(frozen=True)
class Table:
    """A table whose first column holds names.

    Args:
        head: heading of the first column.
        columns: the others.
        lines: in order.
        last: cells of the teacher, below all lines in any order; empty without a teacher.
    """

    head: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    last: Sequence[Cell] = ()

    def with_best(self, rivals: Collection[str]) -> Table:
        """Mark the best value of each column among the lines named in `rivals`."""
        lines = [(name, list(cells)) for name, cells in self.lines]
        for at, column in enumerate(self.columns):
            if column.best is None:
                continue
            found = [
                (_rank(cells[at].value or 0.0, column.best), number)
                for number, (name, cells) in enumerate(lines)
                if name in rivals and cells[at].value is not None
            ]
            if len(found) > 1:
                cells = lines[min(found)[1]][1]
                cells[at] = replace(cells[at], best=True)
        return replace(self, lines=lines)


def _rank(value: float, best: str) -> float:
    return {"low": value, "high": -value, "zero": abs(value)}[best]


@dataclass(frozen=True)
class Panel:
    """One part of a page: a headline, a table, the charts that belong to it.

    Args:
        title: heading; empty for none.
        headline: the result in a sentence or two.
        table: the numbers.
        notes: how to read them.
        drawings: charts; empty where charts cannot be drawn.
        more: a second table.
    """

    title: str
    headline: str
    table: Table
    notes: Sequence[str] = ()
    drawings: Sequence[Drawing] = ()
    more: Table | None = None


@dataclass(frozen=True)
class Methods:
    """The methods that a page can switch on and off.

    Args:
        looks: by method.
        groups: the group of each method, which is switched as a whole.
        hidden: methods that are off when the page opens.
    """

    looks: Mapping[str, Look]
    groups: Mapping[str, str]
    hidden: Sequence[str] = field(default=())

    def by_group(self) -> dict[str, list[str]]:
        """Return the methods of each group."""
        found: dict[str, list[str]] = {}
        for method, group in self.groups.items():
            found.setdefault(group, []).append(method)
        return found


def render_page(
    template: str, *, title: str, panels: Sequence[Panel], methods: Methods, **values: Any
) -> str:
    """Render a page with tables and charts.

    Args:
        template: file in `static/`.
        title: plain text.
        panels: its parts.
        methods: what can be switched on and off.
        values: what else the template shows.
    """
    charts = {drawing.key: drawing.spec() for panel in panels for drawing in panel.drawings}
    scripts = [vega_script()] if charts else []
    return render(
        template,
        title=title,
        styles=["theme.css", "report.css"],
        scripts=[*scripts, static("report.js")],
        data={"charts": charts, "hidden": list(methods.hidden)},
        panels=panels,
        methods=methods,
        dashes=[" ".join(str(part) for part in dash) for dash in DASHES],
        **values,
    )
