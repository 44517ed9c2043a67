"""Create charts as Vega-Lite specifications with Altair, for pages and as PNG.

In a page, Vega draws a chart as SVG; colours are written `var(--c0)` and resolved by the page's
style sheet, so that they follow the light or dark mode. For PNG files, vl-convert draws the chart
with a legend, in the colours of one mode.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselogits.errors import MissingDependencyError
from sparselogits.files import write_whole

if TYPE_CHECKING:
    import altair as alt

COLOURS = 16
"""Number of colours for series, `--c0` to `--c15` in theme.css."""
DASHES: tuple[tuple[float, ...], ...]
DASHES = ((1, 0), (7, 3), (2, 2.5), (8, 2.5, 2, 2.5), (12, 3), (3, 5))
"""Dash patterns of lines: alternating lengths of dashes and gaps in pixels; the first is solid."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
"""Shapes of points, by their names in Vega."""

WIDTH, HEIGHT = 460, 290
"""Size of a chart in pixels; in a page, the column determines the width."""


@dataclass(frozen=True)
class Look:
    """Colour, dash pattern and point shape with which a method is drawn.

    Args:
        colour: index of a colour in theme.css.
        dash: index into `DASHES`.
        shape: index into `SHAPES`.
    """

    colour: int
    dash: int = 0
    shape: int = 0

    @property
    def css(self) -> str:
        """CSS expression of the colour."""
        return f"var(--c{self.colour})"


def looks_of(groups: Mapping[str, str]) -> dict[str, Look]:
    """Assign a look to each method.

    Args:
        groups: group of each method, in order. Methods in a group share colour and shape, and
            differ in dashes; colours, shapes and dashes repeat if there are too few.
    """
    names = list(dict.fromkeys(groups.values()))
    ranks: dict[str, int] = {}
    found = {}
    for method, group in groups.items():
        number, rank = names.index(group), ranks.get(group, 0)
        ranks[group] = rank + 1
        found[method] = Look(number % COLOURS, rank % len(DASHES), number % len(SHAPES))
    return found


@dataclass(frozen=True)
class Drawing:
    """Chart with its title.

    Args:
        key: name of the PNG file and of the element in the page.
        title: title of the chart.
        chart: Altair chart, whose parameter `hidden` is the list of methods that are not drawn.
        note: explanation of the chart; may be empty.
    """

    key: str
    title: str
    chart: alt.LayerChart = field(repr=False)
    note: str = ""

    def spec(self) -> dict[str, Any]:
        """Return the Vega-Lite specification of the chart, for use in a page."""
        return _specification(self.chart, still=False)


def can_draw() -> bool:
    """Return whether the packages that draw charts are installed."""
    return find_spec("altair") is not None and find_spec("vl_convert") is not None


def require_drawing() -> None:
    """Check that the packages that draw charts are installed.

    Raises:
        MissingDependencyError: If altair or vl-convert is not installed.
    """
    if not can_draw():
        raise MissingDependencyError(
            "charts need altair and vl-convert-python, which are not installed: pip install "
            "'sparselogits[report]'"
        )


@lru_cache(maxsize=1)
def vega_script() -> str:
    """Return one script with Vega, Vega-Lite and vega-embed, as bundled with vl-convert."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def draw_png(
    drawing: Drawing,
    path: Path,
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    scale: float = 2,
    dark: bool = False,
) -> None:
    """Draw a chart with a legend as a PNG file.

    Args:
        drawing: the chart.
        path: path of the file.
        width: width of the chart in pixels, without axes and legend.
        height: height of the chart in pixels, without title and horizontal axis.
        scale: number of pixels in the file per pixel of the chart.
        dark: whether to use the colours of the dark mode.

    Raises:
        MissingDependencyError: If altair or vl-convert is not installed.
        StorageError: If the file cannot be written.
    """
    require_drawing()
    chart = drawing.chart.properties(width=width, height=height, title=drawing.title)
    import vl_convert

    text = json.dumps(_specification(chart, still=True))
    for name, colour in colours(dark=dark).items():
        text = text.replace(f"var({name})", colour)
    write_whole(path, bytes(vl_convert.vegalite_to_png(text, scale=scale)))


def static(name: str) -> str:
    """Read a text file from the folder `static/`."""
    return files("sparselogits.lab.report").joinpath("static", name).read_text(encoding="utf-8")


def colours(*, dark: bool) -> dict[str, str]:
    """Return the colours of the light or dark mode, by their names in theme.css."""
    light_mode, _, dark_mode = static("theme.css").partition("@media")
    return dict(re.findall(r"(--\w+): *(#\w+)", dark_mode if dark else light_mode))


def budget_chart(
    points: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Look],
    *,
    x: str,
    y: str,
    levels: Sequence[tuple[str, float]] = (),
    log_y: bool = False,
) -> alt.LayerChart:
    """Create a chart of a metric against a budget on a logarithmic axis, with a line per series.

    Args:
        points: mappings with `series`, `method`, `x`, `y`, `low` and `high` (None without an
            interval), and optionally `label`, a text that is written above the point.
        looks: look of each series.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        levels: pairs of name and value of methods without a budget, drawn as horizontal lines.
        log_y: whether the vertical axis is logarithmic too.
    """
    import altair as alt

    with_points = {point["series"] for point in points}
    looks = {name: look for name, look in looks.items() if name in with_points}
    upwards: dict[str, Any] = {"title": y, "scale": alt.Scale(zero=False, nice=True)}
    if log_y:
        values = [end for p in points for end in (p["y"], p["low"], p["high"]) if end is not None]
        upwards = _log_axis([*values, *(value for _, value in levels)], y)
        bottom = upwards["scale"].domain[0]
        # an interval may end at zero, which is not on a logarithmic axis
        points = [p | {"low": p["low"] and max(p["low"], bottom)} for p in map(dict, points)]
    base = _base(points, "series", looks).encode(
        x=alt.X("x:Q", **_log_axis([p["x"] for p in points], x)), y=alt.Y("y:Q", **upwards)
    )
    lines = base.mark_line(strokeWidth=2).encode(detail="series:N")
    ends = base.mark_rule(strokeWidth=1.4, opacity=0.55).encode(y="low:Q", y2="high:Q")
    shapes = [SHAPES[look.shape] for look in looks.values()]
    shape = alt.Shape("series:N", scale=alt.Scale(domain=list(looks), range=shapes))
    marks = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=shape, tooltip=_tooltip(x=x, y=y)
    )
    layers: list[Any] = [*_levels(levels), ends, lines, marks]
    if any("label" in point for point in points):
        named = base.transform_filter("isValid(datum.label)")
        layers.append(named.mark_text(dx=9, dy=-10, fontSize=11).encode(text="label:N"))
    return _finished(layers)


def curve_chart(
    points: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Look],
    *,
    x: str,
    y: str,
    diagonal: bool = False,
    marks: bool = False,
    logarithmic: bool = False,
) -> alt.LayerChart:
    """Create a chart with a line per method; pointing at a line dims the others.

    Args:
        points: mappings with `method`, `x` and `y`.
        looks: look of each method.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        diagonal: whether to draw the line y = x, with both axes from 0 to 1.
        marks: whether to draw the points; a single point of a method is always drawn.
        logarithmic: whether both axes are logarithmic; has no effect with `diagonal`.
    """
    import altair as alt

    counts: dict[str, int] = {}
    for point in points:
        counts[point["method"]] = counts.get(point["method"], 0) + 1
    shown = [dict(p, alone=marks or counts[p["method"]] == 1) for p in points]
    pointed = alt.selection_point(
        name="pointed", on="pointerover", clear="pointerout", fields=["method"], nearest=True
    )
    faded = alt.condition(pointed, alt.value(1), alt.value(0.12))
    axes: list[dict[str, Any]] = [
        {"title": x, "scale": alt.Scale(zero=False, nice=False)},
        {"title": y, "scale": alt.Scale(zero=False, nice=True)},
    ]
    if diagonal:
        axes = [{"title": title, "scale": alt.Scale(domain=[0, 1])} for title in (x, y)]
    elif logarithmic:
        axes = [_log_axis([p[name] for p in points], title) for name, title in (("x", x), ("y", y))]
    base = _base(shown, "method", looks).encode(
        x=alt.X("x:Q", **axes[0]), y=alt.Y("y:Q", **axes[1])
    )
    dashes = [list(DASHES[look.dash]) for look in looks.values()]
    dash = alt.StrokeDash("method:N", scale=alt.Scale(domain=list(looks), range=dashes))
    lines = base.mark_line(strokeWidth=2, clip=True).encode(
        detail="method:N", strokeDash=dash, opacity=faded
    )
    catching = base.mark_point(size=160, opacity=0).encode(tooltip=_tooltip(x=x, y=y))
    layers: list[Any] = [lines, catching.add_params(pointed)]
    if any(point["alone"] for point in shown):
        visible = base.transform_filter("datum.alone").mark_point(filled=True, size=34)
        layers.insert(1, visible.encode(opacity=faded))
    if diagonal:
        ends = alt.Chart(_rows([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        line = ends.mark_line(strokeDash=[5, 4], color="var(--soft)")
        layers.insert(0, line.encode(x="x:Q", y="y:Q"))
    return _finished(layers)


def dot_chart(
    points: Sequence[Mapping[str, Any]], looks: Mapping[str, Look], *, x: str
) -> alt.LayerChart:
    """Create a chart with a value and its interval per method, one method per row.

    Args:
        points: mappings with `method`, `x`, `low` and `high`, in the order of the rows.
        looks: look of each method.
        x: title of the horizontal axis.
    """
    import altair as alt

    base = _base(points, "method", looks).encode(
        y=alt.Y("method:N", sort=None, title=None, axis=alt.Axis(labelLimit=150, domain=False)),
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False, nice=True)),
    )
    ends = base.mark_rule(strokeWidth=2, opacity=0.6).encode(x="low:Q", x2="high:Q")
    marks = base.mark_point(filled=True, size=110, opacity=1).encode(
        tooltip=_tooltip(x=x, low="from", high="to")
    )
    return _finished([ends, marks])


def _rows(points: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    import altair as alt

    return alt.InlineData(values=[dict(point) for point in points])


def _base(points: Iterable[Mapping[str, Any]], name: str, looks: Mapping[str, Look]) -> alt.Chart:
    import altair as alt

    colours = [look.css for look in looks.values()]
    colour = alt.Color(f"{name}:N", scale=alt.Scale(domain=list(looks), range=colours))
    shown = alt.Chart(_rows(points)).transform_filter("indexof(hidden, datum.method) < 0")
    return shown.encode(color=colour)


def _tooltip(**titles: str) -> list[alt.Tooltip]:
    """Return tooltips with the method and the given fields, each with its title."""
    import altair as alt

    shown = [alt.Tooltip(f"{k}:Q", title=title, format=".4~g") for k, title in titles.items()]
    return [alt.Tooltip("method:N"), *shown]


def _levels(levels: Sequence[tuple[str, float]]) -> list[alt.Chart]:
    """Return labelled horizontal lines; the highest has its label above its left end."""
    import altair as alt

    ordered = sorted(levels, key=lambda level: -level[1])
    layers = []
    for number, (name, value) in enumerate(ordered):
        base = alt.Chart(_rows([{"name": name, "y": value}])).encode(y="y:Q")
        layers.append(base.mark_rule(strokeDash=[5, 4], color="var(--soft)", strokeWidth=1.3))
        first = number == 0
        text = base.mark_text(
            align="left" if first else "right",
            dx=4 if first else -4,
            dy=-7 if first else 9,
            color="var(--soft)",
            fontSize=12,
        )
        layers.append(text.encode(text="name:N", x=alt.value(0 if first else "width")))
    return layers


def _finished(layers: Sequence[Any]) -> alt.LayerChart:
    import altair as alt

    return alt.LayerChart(layer=list(layers)).add_params(alt.param(name="hidden", value=[]))


def _specification(chart: alt.LayerChart, *, still: bool) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart; `still` adds a legend, for a PNG file."""
    if not still:  # in a page, the table serves as the legend
        chart = chart.properties(width="container", height=HEIGHT)
    soft, ink, line = "var(--soft)", "var(--ink)", "var(--line)"
    spec: dict[str, Any] = chart.configure(
        background="var(--paper)" if still else "transparent",
        font="system-ui, sans-serif",
        padding={"left": 2, "right": 6, "top": 6, "bottom": 2},
        view={"stroke": None},
        title={"color": ink, "fontSize": 14, "anchor": "start", "offset": 12},
        axis={
            **{"labelColor": soft, "titleColor": ink, "gridColor": line, "tickColor": line},
            **{"domainColor": line, "labelFontSize": 12, "titleFontSize": 12},
            **{"titleFontWeight": "normal", "titlePadding": 8, "labelPadding": 5},
        },
        legend={
            **{"disable": not still, "title": None, "labelColor": ink, "labelFontSize": 12},
            **{"symbolSize": 90, "symbolStrokeWidth": 2, "labelLimit": 0, "symbolLimit": 0},
            **{"symbolType": "stroke", "symbolOpacity": 1},
        },
    ).to_dict()
    return spec


def _log_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """Return the options of a logarithmic axis that covers all positive values."""
    import altair as alt

    positive = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = min(positive), max(positive)
    margin = max((high / low) ** 0.05, 1.12)
    low, high = low / margin, high * margin
    axis = alt.Axis(values=log_ticks(low, high), format="~g", labelOverlap=False)
    if high > 1e5:  # B for billions instead of the SI prefix G
        axis.labelExpr = "replace(format(datum.value, '~s'), 'G', 'B')"
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return {"title": title, "scale": scale, "axis": axis}


def log_ticks(low: float, high: float) -> list[float]:
    """Return at least two round numbers between `low` and `high` for a logarithmic axis.

    `high` must be at least 1.25 times `low`.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), fine):
        ticks = [10.0**p * f for p in powers for f in steps if low <= 10.0**p * f <= high]
        if len(ticks) >= 3:
            return ticks
    step = 10 ** math.floor(math.log10((high - low) / 2))  # linear steps in a narrow range
    step *= next(f for f in (5, 2, 1) if (high - low) / (step * f) >= 2)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
