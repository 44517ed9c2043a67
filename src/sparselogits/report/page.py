"""One HTML page with a table and curves, that opens from disk and loads nothing.

Figures are drawn by matplotlib as SVG with text as text, in the page's own colours, so that they
follow light and dark. Everything else is one Jinja template with escaping on.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselogits.errors import MissingDependencyError
from sparselogits.files import write_whole


@dataclass(frozen=True)
class Row:
    """One line of the table: its name and cells, as shown."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """A line: points (x, y), and its name in the legend."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Page:
    """What a report says.

    Args:
        title: of the page.
        summary: paragraphs under the title.
        columns: headings of the table, the first one of the names.
        rows: the table.
        curves: training curves.
        x_label: of the curves, with unit.
        y_label: of the curves, with unit.
        conditions: (name, value) pairs: settings, versions, hashes.
    """

    title: str
    summary: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Row]
    curves: Sequence[Curve]
    x_label: str
    y_label: str
    conditions: Sequence[tuple[str, str]]


def write_page(page: Page, path: Path) -> None:
    """Write a page as one file.

    Raises:
        MissingDependencyError: without matplotlib and jinja2.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise _missing() from error
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    html = template.render(page=page, figure=_figure(page))
    write_whole(path, html)


def _missing() -> MissingDependencyError:
    return MissingDependencyError("reports need matplotlib: pip install 'sparselogits[report]'")


def _figure(page: Page) -> str:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise _missing() from error
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sparselogits",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for curve in page.curves:
            axes.plot(*zip(*curve.points, strict=True), label=curve.name, linewidth=1.6)
        axes.set_xlabel(page.x_label)
        axes.set_ylabel(page.y_label)
        axes.grid(alpha=0.2)
        if page.curves:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r'\1width="100%"', svg, count=1)
    # black ink becomes the page's ink, so that the figure can be read in the dark
    return svg.replace("#000000", "currentColor").replace(
        '<text style="', '<text style="fill: currentColor; '
    )


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
svg { height: auto; }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
{% for paragraph in page.summary %}<p>{{ paragraph }}</p>
{% endfor %}
<div class="wide"><table>
<thead><tr>{% for column in page.columns %}
<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in page.rows %}<tr><td>{{ row.name }}</td>
{%- for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
<h2>Training curves</h2>
<div class="wide">{{ figure | safe }}</div>
<h2>Conditions</h2>
<dl>{% for name, value in page.conditions %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</body>
</html>
"""
