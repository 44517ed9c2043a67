"""A page is one HTML file that needs nothing else: its shell, and the parts tables and charts.

Styles, scripts and data are in the file, and its content security policy allows exactly these, by
their hashes, and no request at all. Pages are Jinja templates with escaping on. Data are JSON, from
which the script of a page makes text nodes, never markup.

A table can be sorted, its columns can be chosen, the best value of a column is marked; a method can
be switched on and off in all charts at once (`static/report.js`).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparselogits.lab.report.charts import DASHES, Drawing, Look, static, vega_script
from sparselogits.untrusted import printable


@dataclass(frozen=True)
class Cell:
    """Hold one value of a table.

    Args:
        text: text that is displayed.
        value: number by which the column is sorted; None sorts last.
        best: whether the value is marked as the best of its column.
    """

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        head: heading of the column.
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
        columns: the other columns.
        lines: the lines, in order.
        last: cells of the teacher, shown below all lines however they are sorted; empty without a
            teacher.
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


def render_panels(
    template: str, *, title: str, panels: Sequence[Panel], methods: Methods, **values: Any
) -> str:
    """Render a page with tables and charts.

    Args:
        template: file in `static/`.
        title: plain text.
        panels: parts of the page.
        methods: methods that can be switched on and off.
        values: what else the template shows.
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
    """Render a self-contained page.

    Args:
        template: file in `static/` that extends `base.html`.
        kind: name of the style sheet and of the script of the page in `static/`.
        title: plain text.
        data: JSON values that the script reads from the element `data`.
        scripts: sources of scripts that run before that of the page.
        values: what the template shows; text is escaped there.
    """
    style = "\n".join([static("theme.css"), static(f"{kind}.css")])
    scripts = [*scripts, static(f"{kind}.js")]
    allowed = " ".join(f"'{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = (
        _environment()
        .get_template(template)
        .render(
            **values, policy=policy, title=title, style=style, scripts=scripts, data=_inert(data)
        )
    )
    # half of a surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark
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
    """Escape control and bidirectional characters; markup made by this package stays."""
    return printable(value) if type(value) is str else value


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _inert(data: Any) -> str:
    """Return JSON in which no HTML parser finds a tag or a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
