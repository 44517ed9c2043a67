"""A window's page: the text with what predicted each token, as one file or served on loopback."""

from __future__ import annotations

from html import escape
from typing import Any

from sparselogits.report.document import document
from sparselogits.report.window import MEASURES, Position, WindowView

_BODY = """<main>
<header>
<h1>{title}</h1>
<details><summary>{summary}</summary><dl>{facts}</dl></details>
<nav aria-label="Window">
<label>Colour: <select id="measure"></select></label>
<span class="scale">0 <i></i> <span id="most"></span></span>
{links}
<span class="soft">arrow keys, Home, End; c changes the colour</span>
</nav>
</header>
<div id="text" role="listbox" tabindex="0" aria-label="Tokens of the window"></div>
<aside id="panel" aria-live="polite" aria-label="The selected token"></aside>
</main>
<noscript>This page draws the window with its own script, which is switched off.</noscript>"""


def view_page(view: WindowView, *, rounds: int | None, link: str | None = None) -> str:
    """The page of a window.

    Args:
        view: what it shows.
        rounds: of the cache, if it draws any.
        link: with a place for the number (`/window/{}`), where other windows are to be had.
    """
    title = f"Window {view.index}"
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in view.facts
    )
    body = _BODY.format(
        title=escape(title),
        summary=escape(f"{len(view.tokens)} tokens of {view.facts[0][1]}"),
        facts=facts,
        links="" if link is None else _links(view, link),
    )
    return document(
        f"{title} of {view.facts[0][1]}",
        body,
        styles=["theme.css", "view.css"],
        script="view.js",
        data=_data(view, rounds),
    )


def _links(view: WindowView, link: str) -> str:
    near = (("← before", view.previous, "prev"), ("next →", view.following, "next"))
    return " ".join(
        f'<a rel="{relation}" href="{escape(link.format(window))}">{name}</a>'
        for name, window, relation in near
        if window is not None
    )


def _data(view: WindowView, rounds: int | None) -> dict[str, Any]:
    ids = {row.id for position in view.positions for row in position.rows}
    measures = [dict(zip(("name", "unit"), MEASURES[k], strict=True), key=k) for k in view.measures]
    return {
        "tokens": view.texts.running(),
        "starts": list(view.document_starts),
        "texts": {token: view.texts.alone(token) for token in sorted(ids)},
        "measures": measures,
        "models": list(view.models),
        "rounds": rounds,
        "positions": [_position(position) for position in view.positions],
    }


def _position(position: Position) -> dict[str, Any]:
    return {
        "label": position.label,
        "entries": position.entries,
        "mass": _short(position.mass),
        "figures": {name: _short(value) for name, value in position.figures.items()},
        "rows": [
            [row.id, _short(row.weight), row.count, _short(row.teacher), _short(row.student)]
            for row in position.rows
        ],
    }


def _short(value: float | None) -> float | None:
    """Five digits; infinities, which JSON has none of, as None."""
    if value is None or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.5g}")
