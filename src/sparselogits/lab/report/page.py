"""Render self-contained HTML pages, and describe their tables and charts.

Styles, scripts and data are in the file. The content security policy of a page allows exactly these
scripts and styles, by their hashes, and nothing from the network. Pages are Jinja templates that
escape text by default. Data are JSON, from which scripts create text nodes but no markup.

Tables can be sorted, and their columns can be selected; the best value of a column is marked. A
method can be shown or hidden in all charts at once (`static/report.js`).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparselogits.lab.report.charts import DASHES, Drawing, Look, static, vega_script
from sparselogits.untrusted import printable


@dataclass(frozen=True)
class Cell:
    """Value in a table.

    Args:
        text: displayed text.
        value: number by which the column is sorted; None is sorted last.
        best: whether the value is marked as the best of its column.
    """

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """Column of a table.

    Args:
        head: heading of the column.
        best: which value is marked as the best: the lowest, the highest, or the one closest to
            zero; None for no mark.
        main: whether the column is shown on a narrow screen by default.
        help: explanation of the column.
    """

    head: str
    best: Literal["low", "high", "zero"] | None = None
    main: bool = False
    help: str = ""


Line = tuple[str, Sequence[Cell]]
"""Row of a table: its name, and one cell per column."""


@dataclass(frozen=True)
class Table:
    """Table whose first column contains names.

    Args:
        head: heading of the first column.
        columns: the other columns.
        lines: the rows, in order.
        last: cells of the teacher's row, which is always the last; empty without a teacher.
    """

    head: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    last: Sequence[Cell] = ()

    def with_best(self, rivals: Collection[str]) -> Table:
        """Return a table in which the best value of each column that has `best` is marked.

        Args:
            rivals: names of the rows that are compared. In a column in which fewer than two of them
                have a value, none is marked.
        """
        lines = [(name, list(cells)) for name, cells in self.lines]
        for at, column in enumerate(self.columns):
            if column.best is None:
                continue
            ranks: dict[str, Callable[[float], float]]
            ranks = {"low": float, "high": lambda value: -value, "zero": abs}
            rank = ranks[column.best]
            found = [
                (rank(value), row)
                for row, (name, cells) in enumerate(lines)
                if name in rivals and (value := cells[at].value) is not None
            ]
            if len(found) > 1:
                cells = lines[min(found)[1]][1]
                cells[at] = replace(cells[at], best=True)
        return replace(self, lines=lines)


@dataclass(frozen=True)
class Panel:
    """Section of a page: a summary, a table, and charts.

    Args:
        title: heading; empty for none.
        headline: summary of the result in a sentence or two.
        table: table of the results.
        notes: explanations of the table.
        drawings: charts; may be empty.
        more: second table, or None.
    """

    title: str
    headline: str
    table: Table
    notes: Sequence[str] = ()
    drawings: Sequence[Drawing] = ()
    more: Table | None = None


@dataclass(frozen=True)
class Methods:
    """Methods that can be shown or hidden in the charts of a page.

    Args:
        looks: look of each method.
        groups: group of each method; a button of the page shows or hides all methods of a group.
        hidden: methods that are hidden when the page opens.
    """

    looks: Mapping[str, Look]
    groups: Mapping[str, str]
    hidden: Sequence[str] = field(default=())

    def by_group(self) -> dict[str, list[str]]:
        """Return the names of the methods in each group."""
        found: dict[str, list[str]] = {}
        for method, group in self.groups.items():
            found.setdefault(group, []).append(method)
        return found


def render_panels(
    template: str, *, title: str, panels: Sequence[Panel], methods: Methods, **values: Any
) -> str:
    """Render a page with tables and charts as HTML.

    Args:
        template: name of a file in `static/`.
        title: title of the page.
        panels: sections of the page.
        methods: methods that can be shown or hidden.
        values: other variables of the template.
    """
    charts = {drawing.key: drawing.spec() for panel in panels for drawing in panel.drawings}
    return render_page(
        template,
        "report",
        title=title,
        scripts=[vega_script()] if charts else [],
        data={"charts": charts, "hidden": list(methods.hidden)},
        panels=panels,
        methods=methods,
        dashes=[" ".join(str(part) for part in dash) for dash in DASHES],
        **values,
    )


def render_page(
    template: str,
    kind: Literal["report", "view"],
    *,
    title: str,
    data: Any,
    scripts: Sequence[str] = (),
    **values: Any,
) -> str:
    """Render a self-contained page as HTML.

    Args:
        template: name of a file in `static/` that extends `base.html`.
        kind: name of the page's style sheet and script in `static/`.
        title: title of the page.
        data: JSON value that the script reads from the element `data`.
        scripts: sources of scripts that run before the page's script.
        values: other variables of the template; text is escaped.
    """
    style = "\n".join([static("theme.css"), static(f"{kind}.css")])
    scripts = [*scripts, static(f"{kind}.js")]
    allowed = " ".join(f"'{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    values |= {"policy": policy, "title": title, "style": style, "scripts": scripts}
    page = _environment().get_template(template).render(**values, data=_inert(data))
    # an unpaired surrogate, which JSON may contain but UTF-8 may not, is replaced by "?"
    return page.encode("utf-8", "replace").decode()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("sparselogits.lab.report", "static"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: object) -> object:
    """Escape control and bidirectional characters in text; `Markup` of templates is unchanged."""
    return printable(value) if type(value) is str else value


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _inert(data: Any) -> str:
    """Convert a value to JSON in which the characters that HTML interprets are escaped."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
