"""The page of a comparison: every number in it from the results, rendered in Chromium.

pytest tests/report/test_comparison.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from playwright.sync_api import Browser, Page

from sparselogits.compare.results import (
    Ends,
    Figure,
    Gradient,
    GradientSize,
    MethodRow,
    OfBatches,
    Realised,
    ReliabilityBin,
    Results,
    RunRow,
    TeacherRow,
    read_results,
)
from sparselogits.report import write_report
from sparselogits.report.charts import COLOURS, Chart, Point, Series, draw_png, draw_svg
from sparselogits.report.comparison import report_page
from sparselogits.report.comparison_charts import charts_of
from sparselogits.report.document import static
from tests.report.browser import DESKTOP, PHONE, chromium, opened

HOSTILE = "<img src=x onerror=document.title=1>"
RECORD = Path(__file__).parents[2] / "experiments" / "results" / "compare_small_teacher.json"
DRAWN = ".panel > svg .mark"  # not those of the legend


def figure(mean: float) -> Figure:
    ends = Ends(low=mean - 0.1, high=mean + 0.1)
    return Figure(mean=mean, windows=ends, seeds=Ends(low=None, high=None), both=ends)


def gradient(entries: float | None, angle: float) -> Gradient:
    def size(tokens: int, mean: float) -> GradientSize:
        over = OfBatches(mean=mean, low=mean - 3.5, high=mean + 3.5)
        return GradientSize(
            batch_tokens=tokens,
            batches=4,
            angle=over,
            norm_ratio=OfBatches(mean=1.0, low=None, high=None),
            bias=None,
            bias_below=0.1,
            noise=0.2,
        )

    return Gradient(
        student_method="CE",
        student_seed=0,
        student_folder="runs/ce",
        entries=entries,
        draws=2,
        sizes=[size(256, 1.6 * angle), size(1024, angle)],
    )


def method(name: str, family: str, loss: float | None, entries: float | None) -> MethodRow:
    budget = {"k": 5} if family == "topk" else {"budget": entries}
    bins = [ReliabilityBin(low=0, high=0.5, confidence=0.3, accuracy=0.2, count=10)]
    bins += [ReliabilityBin(low=0.5, high=1, confidence=0.8, accuracy=0.7, count=10)]
    return MethodRow(
        method=name,
        student="small",
        family=family,
        spec={"sampler": family, **budget},
        sampler=None,
        unbiased=None,
        entries=entries,
        bytes_per_token=None if entries is None else 1.5 * entries,
        seeds_done=[] if loss is None else [0],
        seeds_failed=[],
        seeds_not_run=[],
        figures={} if loss is None else {"loss": figure(loss), "ece_equal_mass": figure(0.2)},
        minus_ce={},
        gap_closed=None,
        reliability=[] if loss is None else bins,
        realised=None,
        tokens_per_second=None,
        tokens_per_cpu_second=7719.4,
    )


@pytest.fixture
def results() -> Results:
    rows = [
        method("CE", "ce", 4.321, None),
        method("full KD", "full", 3.987, None),
        method("RS-KD 5", "multinomial", 4.1, 5.0),
        method("RS-KD 12", "multinomial", 4.0, 12.0),
        method(HOSTILE, "topk", 4.5, 5.0),
        method("never run", "systematic", None, 7.0),
    ]
    drafts = Realised(verified=147, accepted=61, acceptance=0.41497, expected=0.46, error=0.04014)
    rows[2] = rows[2].model_copy(update={"realised": drafts})
    runs = [
        RunRow(
            method=row.method,
            student="small",
            seed=0,
            status="done" if row.figures else "not run",
            curve=[(1, 6.0), (2, 5.0)] if row.figures else [],
        )
        for row in rows
    ]
    return Results(
        title=f"a comparison {HOSTILE}",
        complete=False,
        settings={"recipe": {"window": 32}, "teacher": {"name": "t", "parameters": 1234}},
        provenance={"commit": "abc1234"},
        teacher=None,
        methods=rows,
        runs=runs,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_it_renders(
    results: Results, browser: Browser, tmp_path: Path, size: dict[str, int], scheme: str
) -> None:
    path = write_report(results, tmp_path)
    with opened(browser, path.as_uri(), size=size, scheme=scheme) as page:
        table = page.locator("table").first.inner_text()
        for said in ("4.321 ±0.100", "3.987 ±0.100", "never run\tnot run", HOSTILE):
            assert said in table
        assert page.locator("img").count() == 0
        figures = page.locator("figure")
        assert [f.get_attribute("id") for f in figures.all()] == [
            "loss-0",
            "storage-0",
            "calibration-0",
            "training-0",
        ]
        # two families with entries, CE and full KD as lines
        assert page.locator(f"#loss-0 {DRAWN}").count() == 3
        assert page.locator("#loss-0 .level").count() == 2
        assert "abc1234" in page.inner_text("dl")
        # pointing at a name dims the others
        page.locator("#loss-0 .legend li").first.hover()
        dimmed = page.locator(f"#loss-0 {DRAWN}").evaluate_all(
            "all => all.map(mark => mark.style.opacity)"
        )
        assert dimmed == ["", "", "0.12"]
        assert_nothing_is_cut_off(page)
        if size == PHONE:  # figures that are wider than the screen can be reached
            wide = page.locator(".wide").first
            assert wide.evaluate("e => { e.scrollLeft = 9999; return e.scrollLeft; }") > 100
        assert len(page.screenshot(full_page=True)) > 20_000


def assert_nothing_is_cut_off(page: Page) -> None:
    """Everything lies within the width of the screen, but for what scrolls by itself."""
    outside = page.evaluate(
        """() => {
          document.querySelectorAll("details").forEach((each) => { each.open = true; });
          return [...document.querySelectorAll("main, main *")]
            .filter((each) => !each.parentElement.closest(".wide, pre"))
            .filter((each) => {
              const box = each.getBoundingClientRect();
              return box.left < -0.5 || box.right > innerWidth + 0.5;
            })
            .map((each) => each.outerHTML.slice(0, 200));
        }"""
    )
    assert outside == []


def test_the_figures_beside_the_page_have_their_curves_in_colour(
    results: Results, tmp_path: Path
) -> None:
    write_report(results, tmp_path)
    pictures = {found.name: colours_of(found) for found in (tmp_path / "figures").iterdir()}
    counts = {"calibration-0.png": 5, "loss-0.png": 2, "storage-0.png": 2, "training-0.png": 5}
    assert pictures.keys() == counts.keys()
    for name, count in counts.items():
        assert set(hues()[:count]) <= pictures[name], name
        assert not set(hues()[count:]) & pictures[name], name


def hues(scheme: str = "light") -> list[str]:
    """The colours of series, in order, as theme.css has them: light ones first."""
    all_of = re.findall(r"--c\d: (#\w{6});", static("theme.css"))
    assert len(set(all_of)) == 2 * COLOURS
    return all_of[:COLOURS] if scheme == "light" else all_of[COLOURS:]


def colours_of(picture: Path) -> set[str]:
    pixels = (imread(picture)[..., :3] * 255).round().astype(np.uint32)
    height, width, _ = pixels.shape
    assert width > 600
    assert height > 400
    found = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1], np.uint32))
    return {f"#{colour:06x}" for colour in found.tolist()}


def test_light_and_dark_are_two_themes(results: Results, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report_page(results), encoding="utf-8")
    shown: dict[str, dict[str, list[int]]] = {}
    for scheme in ("light", "dark"):
        with opened(browser, path.as_uri(), size=DESKTOP, scheme=scheme) as page:
            of = {
                "paper": ("body", "backgroundColor"),
                "first column": ("td", "backgroundColor"),
                "ink": ("body", "color"),
                "cell": ("td", "color"),
                "axis": ("figure text", "fill"),
                "grid": ("figure .grid", "stroke"),
                "level": ("figure .level", "stroke"),
                "curve": ("#training-0 .line", "stroke"),
                "mark": (DRAWN, "fill"),
            }
            shown[scheme] = {
                name: [int(part) for part in re.findall(r"\d+", said)[:3]]
                for name, (element, style) in of.items()
                if (
                    said := page.locator(element).first.evaluate(
                        "(element, style) => getComputedStyle(element)[style]", style
                    )
                )
            }
    light, dark = shown["light"], shown["dark"]
    assert light.keys() == dark.keys()
    assert [name for name in light if light[name] == dark[name]] == []
    assert sum(light["paper"]) > 600 > 200 > sum(dark["paper"])
    for own in (light, dark):  # read on its own paper
        for name in ("ink", "cell", "axis", "curve", "mark"):
            assert contrast(own[name], own["paper"]) > 3, name


def contrast(one: list[int], other: list[int]) -> float:
    """As WCAG 2.2 defines it; it asks for 3 of graphics and 4.5 of text."""

    def luminance(colour: list[int]) -> float:
        parts = [value / 255 for value in colour]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_no_two_curves_of_a_drawing_look_alike(
    browser: Browser, tmp_path: Path, size: dict[str, int], scheme: str
) -> None:
    """A comparison of 35 methods; what is looked at is what Chromium makes of the style sheet."""
    stored = read_results(RECORD)
    path = tmp_path / "report.html"
    path.write_text(report_page(stored), encoding="utf-8")
    methods = {row.method for row in stored.methods}
    with opened(browser, path.as_uri(), size=size, scheme=scheme) as page:
        looks: list[dict[str, Any]] = page.locator(".panel").evaluate_all(
            """panels => panels.map((panel) => {
              const style = (each) => {
                const { stroke, strokeDasharray, fill } = getComputedStyle(each);
                const shape = each.matches(".mark") ? each.getAttribute("d") : "";
                const whose = [...each.classList].find((name) => /^s[0-9]/.test(name));
                return [whose, shape ? "" : strokeDasharray, stroke, fill, shape].join();
              };
              // the ends of an interval are a line of their own, never dashed
              const seen = (all) => [...all].filter((e) => !/^M[^L]*V/.test(e.getAttribute("d")))
                .map((each) => style(each));
              return {
                figure: panel.closest("figure").id,
                drawn: seen(panel.querySelectorAll(":scope > svg :is(.line, .mark)")),
                legend: seen(panel.querySelectorAll(".swatch *")),
                names: [...panel.querySelectorAll("li")].map((each) => each.innerText.trim()),
              };
            })"""
        )
        assert_nothing_is_cut_off(page)
    shown: dict[str, set[str]] = {}
    for look in looks:
        assert set(look["drawn"]) == set(look["legend"])  # and which is whose is the same
        kinds: dict[str, set[str]] = {}
        for said in look["legend"]:
            own, _, style = said.partition(",")
            kinds.setdefault(own, set()).add(style)
        assert len(kinds) == len(look["names"])
        # not one piece of a curve's look is another's
        assert sum(map(len, kinds.values())) == len(set().union(*kinds.values()))
        shown.setdefault(look["figure"], set()).update(look["names"])
        if look["figure"] in ("calibration-0", "training-0"):
            assert len(look["names"]) <= COLOURS
            assert look["names"][:2] == ["CE", "full KD"]  # in every panel
    assert shown["calibration-0"] == shown["training-0"] == methods
    assert len(shown["loss-0"]) == 14


def test_a_figure_in_panels_has_all_colours_too(tmp_path: Path) -> None:
    stored = read_results(RECORD)
    charts = charts_of(stored, stored.methods[0].student)
    chart = next(chart for chart in charts if chart.panels)
    draw_png(chart, tmp_path / "figure.png")
    assert set(hues()) <= colours_of(tmp_path / "figure.png")


@pytest.mark.parametrize("count", [6, 7, 40])
def test_methods_that_differ_by_budget_alone_stay_together(results: Results, count: int) -> None:
    lines = results.methods[:2]
    many = [method(f"Top-K {k}", "topk", 5 - k / 100, float(k)) for k in range(count, 0, -1)]
    rows = [*lines, results.methods[2], *many, results.methods[3]]
    charts = charts_of(results.model_copy(update={"methods": rows}), "small")
    chart = next(chart for chart in charts if chart.key == "calibration-0")
    panels = [[series.name for series in panel] for panel in chart.drawings]
    assert all(panel[:2] == ["CE", "full KD"] for panel in panels)
    assert all(len(panel) <= COLOURS for panel in panels)
    rest = [name for panel in panels for name in panel[2:]]
    assert rest == ["RS-KD 5", "RS-KD 12", *(f"Top-K {k}" for k in range(1, count + 1))]
    assert panels[0][2:] == ["RS-KD 5", "RS-KD 12"]


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "dark"), (PHONE, "light")])
def test_gradients_have_a_column_and_a_chart(
    results: Results, browser: Browser, tmp_path: Path, size: dict[str, int], scheme: str
) -> None:
    angles = {"CE": (None, 32.1), "RS-KD 5": (5.2, 12.8), "RS-KD 12": (12.3, 3.0)}
    angles |= {"never run": (7.0, 5.0)}
    rows = [
        row.model_copy(update={"gradient": gradient(*angles[row.method])})
        if row.method in angles
        else row.model_copy(update={"gradient_failure": HOSTILE if "<" in row.method else None})
        for row in results.methods
    ]
    known = {"loss": 3.5, "perplexity": 33.1, "ece_equal_mass": 0.021}
    teacher = TeacherRow(figures=known, reliability=[], positions=10, windows=1)
    full = results.model_copy(update={"methods": rows, "teacher": teacher})
    path = write_report(full, tmp_path)
    with opened(browser, path.as_uri(), size=size, scheme=scheme) as page:
        lines = page.locator("table").first.locator("tr").all()
        cells = [line.locator("th, td").all_inner_texts() for line in lines]
        assert {len(line) for line in cells} == {len(cells[0])}  # the teacher's row included
        last = {line[0]: line[-1] for line in cells}
        assert last["method"] == "gradient angle °"
        speeds = dict(zip(cells[0], cells[1], strict=True))["tokens/s of a core"]
        assert speeds == "7719"
        assert last["CE"] == "32.1 ±3.5"
        assert last["RS-KD 12"] == "3.0 ±3.5"
        assert last["full KD"] == "-"
        columns = dict(zip(cells[0], zip(*cells[1:], strict=True), strict=True))
        assert columns["perplexity"][0] == f"{math.exp(4.321):.1f} ±7.5"
        assert columns["perplexity"][-1] == "33.1"
        assert columns["ECE % (equal mass)"][0] == "20.0 ±10.0"
        assert columns["ECE % (equal mass)"][-1] == "2.1"
        assert columns["realised % (SE)"] == ("-", "-", "41.5 (4.0)", "-", "-", "-", "")
        words = page.inner_text("main")
        assert "in brackets the standard error" in words
        assert "4 batches of 1,024 held-out tokens" in words
        assert f"Gradients not measured: {HOSTILE}" in words
        assert page.locator(f"#gradient-0 {DRAWN}").count() == 3
        assert page.locator("#gradient-0 .level").count() == 1
        # on a logarithmic axis a third is as far down whatever it is a third of
        heights = page.locator(f"#gradient-0 {DRAWN}").evaluate_all(
            "all => all.map(mark => [mark.textContent, mark.transform.baseVal[0].matrix.f])"
        )
        at = {name.split(":")[0]: y for name, y in heights}
        per_e_fold = (at["RS-KD 12"] - at["never run"]) / math.log(5.0 / 3.0)
        expected = at["RS-KD 12"] - per_e_fold * math.log(12.8 / 3.0)
        assert at["RS-KD 5"] == pytest.approx(expected, abs=0.5)
    assert (tmp_path / "figures" / "gradient-0.png").stat().st_size > 10_000


@pytest.mark.parametrize("behind", [True, False])
def test_says_when_the_teacher_is_no_better_than_its_student(
    results: Results, tmp_path: Path, behind: bool
) -> None:
    ce = next(row for row in results.methods if row.family == "ce").figures["loss"].mean
    loss = ce + 0.1 if behind else ce - 0.1
    teacher = TeacherRow(figures={"loss": loss}, reliability=[], positions=10, windows=1)
    found = results.model_copy(update={"teacher": teacher})
    page = write_report(found, tmp_path).read_text(encoding="utf-8")
    assert ("The teacher is no better" in page) == behind
    assert (f"the teacher has {loss:.3f} on the same windows" in page) == behind


def test_says_what_the_teacher_alone_was_not_scored_on(results: Results, tmp_path: Path) -> None:
    failed = {"agreement": "no space left"}
    teacher = TeacherRow(
        figures={"loss": 3.5}, reliability=[], positions=10, windows=1, tasks_failed=failed
    )
    found = results.model_copy(update={"teacher": teacher})
    assert found.tasks_not_measured == ["agreement: no space left"]
    page = write_report(found, tmp_path).read_text(encoding="utf-8")
    assert "Not measured: agreement: no space left" in page


def test_nothing_run_yet(results: Results, tmp_path: Path) -> None:
    rows = [method("CE", "ce", None, None)]
    empty = results.model_copy(update={"methods": rows, "runs": results.runs[-1:]})
    text = write_report(empty, tmp_path).read_text(encoding="utf-8")
    assert "not run" in text
    assert "<figure" not in text


numbers = st.floats(1e-3, 1e5)


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_every_point_lies_within_the_drawing(
    points: list[tuple[float, float]], log_x: bool, log_y: bool
) -> None:
    # an interval may go below zero, which a logarithm cannot show
    series = Series("s", tuple(Point(x, y, -y if log_y else y * 0.9, y * 1.1) for x, y in points))
    svg = draw_svg(Chart("k", "t", "x", "y", (series,), log_x=log_x, log_y=log_y))
    assert "nan" not in svg
    drawing, _, _ = svg.partition('<ul class="legend">')
    places = re.findall(r"translate\(([-\d.naif]+) ([-\d.naif]+)\)", drawing)
    assert len(places) == len(points)
    for x, y in places:
        assert 52 <= float(x) <= 448
        assert 10 <= float(y) <= 268
        assert math.isfinite(float(x))
