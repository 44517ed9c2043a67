"""Charts of pages and of the documentation, as Vega-Lite specifications built by Altair.

In a page, Vega draws them as SVG in the page's own colours: a colour is written `var(--c0)` and
resolved by the style sheet, so that charts follow light and dark. As PNG, for documents that
cannot run scripts, vl-convert draws the same specification in the light colours.
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
"""Number of colours for series: `--c0` to `--c15` of theme.css."""
DASHES: tuple[tuple[float, ...], ...] = (
    (1, 0),  # Vega draws it solid
    (7, 3),
    (2, 2.5),
    (8, 2.5, 2, 2.5),
    (12, 3),
    (3, 5),
)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")

WIDTH, HEIGHT = 460, 290
"""Pixels of a chart drawn as PNG; in a page the width is that of the column."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Args:
        colour: index of a colour of theme.css.
        dash: index into `DASHES`.
        shape: index into `SHAPES`.
    """

    colour: int
    dash: int = 0
    shape: int = 0

    @property
    def css(self) -> str:
        """The colour as a variable of the style sheet."""
        return f"var(--c{self.colour})"


def looks_of(groups: Mapping[str, str]) -> dict[str, Look]:
    """Assign a look to every method.

    Args:
        groups: the group of each method, in order; methods of one group share a colour and differ
            in their dashes.
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
    """A chart with the words around it.

    Args:
        key: name of the file and of the element in the page.
        title: what the chart shows.
        chart: Altair chart; a parameter `hidden` lists the methods that are not drawn.
        note: how to read the chart, where that is not obvious.
    """

    key: str
    title: str
    chart: alt.LayerChart = field(repr=False)
    note: str = ""

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification of the page's chart."""
        return _configured(self.chart, still=False)


def can_draw() -> bool:
    """Whether the packages that draw charts are installed."""
    return find_spec("altair") is not None and find_spec("vl_convert") is not None


def require_drawing() -> None:
    """Raise MissingDependencyError unless charts can be drawn."""
    if not can_draw():
        raise MissingDependencyError(
            "charts need altair and vl-convert-python: pip install 'sparselogits[report]'"
        )


@lru_cache(maxsize=1)
def vega_script() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script from vl-convert's wheel; no network."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def draw_png(
    drawing: Drawing, path: Path, *, width: int = WIDTH, scale: float = 2, dark: bool = False
) -> None:
    """Draw the chart of a page, with a legend, as a PNG file.

    Args:
        drawing: the chart.
        path: path of the file.
        width: pixels of the chart itself.
        scale: pixels of the file per pixel.
        dark: whether in the colours of dark pages.

    Raises:
        MissingDependencyError: altair or vl-convert is not installed.
    """
    require_drawing()
    chart = drawing.chart.properties(width=width, height=HEIGHT, title=drawing.title)
    import vl_convert

    text = json.dumps(_configured(chart, still=True))
    for name, colour in colours(dark=dark).items():
        text = text.replace(f"var({name})", colour)
    write_whole(path, bytes(vl_convert.vegalite_to_png(text, scale=scale)))


def static(name: str) -> str:
    """Return the text of a file of `static/`."""
    return files("sparselogits.lab.report").joinpath("static", name).read_text(encoding="utf-8")


def colours(*, dark: bool) -> dict[str, str]:
    """Return the colours of light or dark pages by their names in theme.css."""
    light, _, other = static("theme.css").partition("@media")
    return dict(re.findall(r"(--\w+): *(#\w+)", other if dark else light))


def budget_chart(
    points: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Look],
    *,
    x: str,
    y: str,
    levels: Sequence[tuple[str, float]] = (),
    log_y: bool = False,
) -> alt.LayerChart:
    """Chart a metric against a budget on a logarithmic axis, one line per series.

    Args:
        points: rows with `series`, `method`, `x`, `y`, `low` and `high`; text of `label`, where
            a row has one, is written above its point.
        looks: by series.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        levels: (name, value) of methods without a budget, drawn as horizontal lines.
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
        # an interval may reach zero, which a logarithmic axis does not have
        points = [p | {"low": p["low"] and max(p["low"], bottom)} for p in map(dict, points)]
    base = _base(points, "series", looks).encode(
        x=alt.X("x:Q", **_log_axis([p["x"] for p in points], x)), y=alt.Y("y:Q", **upwards)
    )
    lines = base.mark_line(strokeWidth=2).encode(detail="series:N")
    ends = base.mark_rule(strokeWidth=1.4, opacity=0.55).encode(y="low:Q", y2="high:Q")
    marks = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=_shapes(looks, "series"), tooltip=_tooltip(x, y)
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
    ends: Sequence[Mapping[str, Any]] = (),
    diagonal: bool = False,
    marks: bool = False,
    logarithmic: bool = False,
) -> alt.LayerChart:
    """Chart one line per method; pointing at a line dims the others.

    Args:
        points: rows with `method`, `x` and `y`.
        looks: by method.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        ends: rows of the same kind, drawn as large open marks.
        diagonal: whether to draw y = x from 0 to 1.
        marks: whether to draw the points; a method with a single point always shows it.
        logarithmic: whether both axes are.
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
    lines = base.mark_line(strokeWidth=2, clip=True).encode(
        detail="method:N", strokeDash=_dashes(looks), opacity=faded
    )
    catching = base.mark_point(size=160, opacity=0).encode(tooltip=_tooltip(x, y))
    layers: list[Any] = [lines, catching.add_params(pointed)]
    if any(point["alone"] for point in shown):
        visible = base.transform_filter("datum.alone").mark_point(filled=True, size=34)
        layers.insert(1, visible.encode(opacity=faded))
    if diagonal:
        line = alt.Chart(_rows([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        layers.insert(
            0, line.mark_line(strokeDash=[5, 4], color="var(--soft)").encode(x="x:Q", y="y:Q")
        )
    if ends:
        last = _base(ends, "method", looks).mark_point(
            filled=True, shape="diamond", size=130, stroke="var(--paper)", strokeWidth=1.2
        )
        layers.append(
            last.encode(x="x:Q", y="y:Q", opacity=faded, tooltip=_tooltip(x, "held-out loss"))
        )
    return _finished(layers)


def dot_chart(
    points: Sequence[Mapping[str, Any]], looks: Mapping[str, Look], *, x: str
) -> alt.LayerChart:
    """Chart one value with its interval per method, one method per line.

    Args:
        points: rows with `method`, `x`, `low` and `high`, in the order to draw them.
        looks: by method.
        x: title of the horizontal axis.
    """
    import altair as alt

    base = _base(points, "method", looks).encode(
        y=alt.Y("method:N", sort=None, title=None, axis=alt.Axis(labelLimit=150, domain=False)),
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False, nice=True)),
    )
    ends = base.mark_rule(strokeWidth=2, opacity=0.6).encode(x="low:Q", x2="high:Q")
    marks = base.mark_point(filled=True, size=110, opacity=1).encode(
        tooltip=[
            alt.Tooltip("method:N"),
            alt.Tooltip("x:Q", title=x, format=".4~g"),
            alt.Tooltip("low:Q", title="from", format=".4~g"),
            alt.Tooltip("high:Q", title="to", format=".4~g"),
        ]
    )
    return _finished([ends, marks])


def _rows(points: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    import altair as alt

    return alt.InlineData(values=[dict(point) for point in points])


def _base(points: Iterable[Mapping[str, Any]], name: str, looks: Mapping[str, Look]) -> alt.Chart:
    import altair as alt

    return (
        alt.Chart(_rows(points))
        .transform_filter("indexof(hidden, datum.method) < 0")
        .encode(
            color=alt.Color(
                f"{name}:N",
                scale=alt.Scale(domain=list(looks), range=[look.css for look in looks.values()]),
            )
        )
    )


def _shapes(looks: Mapping[str, Look], name: str) -> alt.Shape:
    import altair as alt

    shapes = [SHAPES[look.shape] for look in looks.values()]
    return alt.Shape(f"{name}:N", scale=alt.Scale(domain=list(looks), range=shapes))


def _dashes(looks: Mapping[str, Look]) -> alt.StrokeDash:
    import altair as alt

    dashes = [list(DASHES[look.dash]) for look in looks.values()]
    return alt.StrokeDash("method:N", scale=alt.Scale(domain=list(looks), range=dashes))


def _tooltip(x: str, y: str) -> list[alt.Tooltip]:
    import altair as alt

    return [
        alt.Tooltip("method:N"),
        alt.Tooltip("x:Q", title=x, format=".4~g"),
        alt.Tooltip("y:Q", title=y, format=".4~g"),
    ]


def _levels(levels: Sequence[tuple[str, float]]) -> list[alt.Chart]:
    """Return horizontal lines, named above the left end of the highest and below the others."""
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


def _configured(chart: alt.LayerChart, *, still: bool) -> dict[str, Any]:
    """Return a chart's Vega-Lite specification with the fonts and colours of the page.

    Args:
        chart: chart to draw.
        still: whether the chart is a picture with its own legend; a page has its legend elsewhere.
    """
    if not still:
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
    """Return a logarithmic axis for all values above zero, with at least two labelled ticks."""
    import altair as alt

    above = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = min(above), max(above)
    margin = max((high / low) ** 0.05, 1.12)
    low, high = low / margin, high * margin
    axis = alt.Axis(values=log_ticks(low, high), format="~g", labelOverlap=False)
    if high > 1e5:  # billions, not the gigas of the SI
        axis.labelExpr = "replace(format(datum.value, '~s'), 'G', 'B')"
    return {
        "title": title,
        "scale": alt.Scale(type="log", domain=[low, high], nice=False),
        "axis": axis,
    }


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two ends: powers of ten over many decades, more within one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 2, 3, 5, 7),
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8),
    ):
        ticks = [10.0**p * f for p in powers for f in steps if low <= 10.0**p * f <= high]
        if len(ticks) >= 3:
            return ticks
    step = 10 ** math.floor(math.log10((high - low) / 2))  # a narrow range: linear steps
    step *= next(f for f in (5, 2, 1) if (high - low) / (step * f) >= 2)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
