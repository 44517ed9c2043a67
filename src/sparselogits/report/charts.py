"""Charts as values, drawn twice: as SVG in the page's own colours, and by matplotlib as PNG.

The SVG is small enough to be read on a phone without being shrunk, and takes its colours from the
page's style sheet by class, so that it follows light and dark; the PNG has the light ones.

Series are told apart by colour, and without it by dashes and the shape of marks: of the eight
colours those four apart, which share a dash and a shape, differ most to eyes that confuse red and
green or blue and yellow. The second eight have open marks; lines without marks therefore come in
panels of at most eight, charts with marks in panels of at most sixteen (`Chart.most`).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sparselogits.errors import MissingDependencyError
from sparselogits.files import write_whole
from sparselogits.report.document import static

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 8
"""`--c0` to `--c7` of theme.css."""

_STROKE = 1.8  # of `.line` in report.css; dashes are in widths of a line
_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.8), (1.1, 1.5), (5, 1.4, 1.1, 1.4))
_SHAPES = (  # a disc, square, triangle and diamond; their names in matplotlib
    ("M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z", "o"),
    ("M-3.2-3.2h6.4v6.4h-6.4z", "s"),
    ("M0-4.4L4.2 3.2H-4.2z", "^"),
    ("M0-4.6L4.6 0L0 4.6L-4.6 0z", "D"),
)

_WIDTH, _HEIGHT = 460, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 42


@dataclass(frozen=True)
class Point:
    """A point, and where an interval is known its ends on the y axis."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Series:
    """Points under one name, joined by a line."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """What a figure shows.

    Args:
        key: its file's name.
        title: above it.
        x_label: with unit.
        y_label: with unit.
        series: each in a style of its own.
        levels: (name, y) of horizontal lines.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is; then every y of a point is above zero.
        marks: whether points are drawn, not the line alone.
        diagonal: whether y = x is drawn, from 0 to 1 on both axes.
        panels: the series anew, some perhaps in each, where they are too many for one drawing; all
            panels have the same axes.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    levels: tuple[tuple[str, float], ...] = ()
    log_x: bool = False
    log_y: bool = False
    marks: bool = True
    diagonal: bool = False
    panels: tuple[tuple[Series, ...], ...] = ()

    @property
    def most(self) -> int:
        """How many series of a drawing can be told apart."""
        return 2 * COLOURS if self.marks else COLOURS

    @property
    def drawings(self) -> tuple[tuple[Series, ...], ...]:
        """The panels, or all series as the only one."""
        return self.panels or (self.series,)


def draw_svg(chart: Chart) -> str:
    """A `figure` element: title, and for each panel a drawing and its legend. Text is escaped."""
    panels = "".join(
        f'<div class="panel">{_drawing(chart, series, number)}{_legend(chart, series)}</div>'
        for number, series in enumerate(chart.drawings, 1)
    )
    several = ' class="several"' if len(chart.drawings) > 1 else ""
    return (
        f'<figure id="{escape(chart.key)}"{several}><figcaption>{escape(chart.title)}</figcaption>'
        f'<div class="panels">{panels}</div></figure>'
    )


def draw_png(chart: Chart, path: Path) -> None:
    """The same chart as a file.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "figures as PNG need matplotlib: pip install 'sparselogits[report]'"
        ) from error
    panels = chart.drawings
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (7, 4.6) if len(panels) == 1 else (4.6 * columns, 3.7 * rows)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for number, axes in enumerate(grid):
        if number >= len(panels):
            axes.remove()
            continue
        _plot(chart, panels[number], axes)
        axes.tick_params(labelbottom=True)  # also above a place that has no panel
        if len(panels) == 1 and len(chart.series) > COLOURS:  # it would cover half the drawing
            figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
            figure.set_figwidth(9.5)
        elif panels[number]:
            axes.legend(frameon=False, fontsize=8, handlelength=3)
    figure.suptitle(chart.title)
    figure.supxlabel(chart.x_label, fontsize="medium")
    figure.supylabel(chart.y_label, fontsize="medium")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def _plot(chart: Chart, panel: Sequence[Series], axes: Axes) -> None:
    hues = _light_hues()
    for index, series in enumerate(panel):
        hue, own = hues[index % COLOURS], index % len(_DASHES)
        dashes = (0, _DASHES[own]) if _DASHES[own] else "-"
        axes.plot(
            [p.x for p in series.points],
            [p.y for p in series.points],
            color=hue,
            linestyle=dashes if len(series.points) > 1 else "none",
            marker=_SHAPES[own][1] if chart.marks else None,
            markerfacecolor="none" if index >= COLOURS else hue,
            markersize=5.5,
            label=series.name,
        )
        for point in series.points:
            if point.low is not None and point.high is not None:
                axes.vlines(point.x, point.low, point.high, color=hue, alpha=0.6)
    for name, value in chart.levels:
        axes.axhline(value, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    if chart.diagonal:
        axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
    if chart.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xticks(_log_ticks(*axes.get_xlim()))
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_yticks(_log_ticks(*axes.get_ylim()))
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def _light_hues() -> list[str]:
    """`--c0` to `--c7` as theme.css first says them, which is for light pages."""
    return re.findall(r"--c\d: *(#\w+)", static("theme.css"))[:COLOURS]


def _drawing(chart: Chart, panel: Sequence[Series], number: int) -> str:
    x_ticks, y_ticks, across, up = _axes(chart)
    parts = []
    for value in x_ticks:
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(_text(x, _HEIGHT - _BOTTOM + 15, f"{value:g}", "middle"))
    for value in y_ticks:
        y = up(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:g}", "end"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_text(middle, _HEIGHT - 6, chart.x_label, "middle"))
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'transform="rotate(-90 12 {height:.0f})"'
    parts.append(_text(12, height, chart.y_label, "middle", turned))
    if chart.diagonal:
        ends = f"M{across(0):.1f} {up(0):.1f}L{across(1):.1f} {up(1):.1f}"
        parts.append(f'<path class="level" d="{ends}"/>')
    for _, value in chart.levels:
        y = up(value)
        parts.append(f'<path class="level" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
    for index, series in enumerate(panel):
        parts += _drawn(series, index, chart.marks, across, up)
    parts += [
        _text(_WIDTH - _RIGHT - 2, up(value) - 4, name, "end", 'class="over"')
        for name, value in chart.levels
    ]
    said = f"{chart.title}: {chart.y_label} against {chart.x_label}"
    if len(chart.drawings) > 1:
        said += f", {number} of {len(chart.drawings)}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said)}">'
        f"{''.join(parts)}</svg>"
    )


def _legend(chart: Chart, panel: Sequence[Series]) -> str:
    """Names, each after a piece of its line with its mark."""
    names = []
    for index, series in enumerate(panel):
        piece = _line(index, "M1 6H37") if len(series.points) > 1 else ""
        piece += _mark(index, 19, 6) if chart.marks else ""
        swatch = f'<svg class="swatch" viewBox="0 0 38 12" aria-hidden="true">{piece}</svg>'
        names.append(f'<li class="s{index}">{swatch}{escape(series.name)}</li>')
    return f'<ul class="legend">{"".join(names)}</ul>'


def _drawn(
    series: Series,
    index: int,
    marks: bool,
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> list[str]:
    places = [(across(p.x), up(p.y), p) for p in series.points]
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
    parts = [_line(index, line)] if len(places) > 1 else []
    for x, y, point in places if marks else ():
        if point.low is not None and point.high is not None:
            ends = f"M{x:.1f} {up(point.low):.1f}V{up(point.high):.1f}"
            parts.append(f'<path class="line {_class(index)}" d="{ends}"/>')
        said = f"{point.name or series.name}: {point.x:.4g}, {point.y:.4g}"
        parts.append(_mark(index, x, y, said))
    return parts


def _line(index: int, path: str) -> str:
    lengths = _DASHES[index % len(_DASHES)]
    # an attribute: the page allows no style outside its style sheet
    dashes = " ".join(f"{_STROKE * length:.1f}" for length in lengths)
    more = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path class="line {_class(index)}" d="{path}"{more}/>'


def _mark(index: int, x: float, y: float, said: str = "") -> str:
    shape, _ = _SHAPES[index % len(_SHAPES)]
    title = f"<title>{escape(said)}</title>" if said else ""
    return (
        f'<path class="mark {_class(index)}" transform="translate({x:.1f} {y:.1f})" d="{shape}">'
        f"{title}</path>"
    )


def _class(index: int) -> str:
    """Its own, that of its colour, and whether its marks are open."""
    return f"s{index} c{index % COLOURS}" + (" open" if index >= COLOURS else "")


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


_Map = Callable[[float], float]


def _axes(chart: Chart) -> tuple[list[float], list[float], _Map, _Map]:
    """Ticks of both axes, and what takes values to places in the drawing."""
    points = [p for series in chart.series for p in series.points]
    ys = [y for p in points for y in (p.low, p.y, p.high) if y is not None]
    ys += [level for _, level in chart.levels]
    if chart.log_y:  # an interval may reach zero
        ys = [y for y in ys if y > 0]
    xs = [p.x for p in points if p.x > 0 or not chart.log_x]
    if chart.diagonal:
        xs, ys = [*xs, 0.0, 1.0], [*ys, 0.0, 1.0]
    x_low, x_high = _widened(xs, 0 if chart.diagonal else 0.04, chart.log_x)
    y_low, y_high = _widened(ys, 0 if chart.diagonal else 0.06, chart.log_y)
    along_x, along_y = _share(x_low, x_high, chart.log_x), _share(y_low, y_high, chart.log_y)

    def across(value: float) -> float:
        return _LEFT + along_x(value) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - along_y(value) * (_HEIGHT - _TOP - _BOTTOM)

    x_ticks = _log_ticks(x_low, x_high) if chart.log_x else _ticks(x_low, x_high)
    y_ticks = _log_ticks(y_low, y_high) if chart.log_y else _ticks(y_low, y_high)
    return x_ticks, y_ticks, across, up


def _share(low: float, high: float, log: bool) -> _Map:
    """From a value to its share of the way along an axis; on a logarithmic one 0 below the low."""
    if not log:
        return lambda value: (value - low) / (high - low)
    return lambda value: math.log(max(value, low) / low) / math.log(high / low)


def _widened(values: Sequence[float], margin: float, log: bool) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if log:
        ends = _widened([math.log(low), math.log(high)], margin, False)
        return math.exp(ends[0]), math.exp(ends[1])
    spread = (high - low) or max(abs(low), 1.0) * 0.1
    return low - margin * spread, high + margin * spread


def _ticks(low: float, high: float) -> list[float]:
    """Five or so round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten; the powers alone over many decades."""
    steps = (1, 2, 5) if high / low < 1e4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [10.0**power * f for power in powers for f in steps if low <= 10.0**power * f <= high]
