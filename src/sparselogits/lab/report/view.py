"""A window's page: the text with what predicted each token, as one file or served on loopback."""

from __future__ import annotations

import math
from typing import Any

from sparselogits.lab.report.document import render, static
from sparselogits.lab.report.window import MEASURES, Position, WindowView


def view_page(view: WindowView, *, rounds: int | None, link: str | None = None) -> str:
    """The page of a window.

    Args:
        view: what it shows.
        rounds: of the cache, if it draws any.
        link: with a place for the number (`/window/{}`), where other windows are to be had.
    """
    title = f"Window {view.index}"
    near = (("← before", view.previous, "prev"), ("next →", view.following, "next"))
    return render(
        "view.html",
        title=f"{title} of {view.facts[0][1]}",
        styles=["theme.css", "view.css"],
        scripts=[static("view.js")],
        data=_data(view, rounds),
        heading=title,
        summary=f"{len(view.tokens)} tokens of {view.facts[0][1]}",
        facts=view.facts,
        links=[
            (relation, link.format(window), name)
            for name, window, relation in near
            if link is not None and window is not None
        ],
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
    """Round to five digits; what is not finite, which JSON has no number for, becomes None."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
