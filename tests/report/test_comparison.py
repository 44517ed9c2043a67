"""The page of a comparison: every number in it from the results, rendered in Chromium.

pytest tests/report/test_comparison.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser

from sparselogits.compare.results import (
    Ends,
    Figure,
    Gradient,
    GradientSize,
    MethodRow,
    OfBatches,
    ReliabilityBin,
    Results,
    RunRow,
    TeacherRow,
)
from sparselogits.report import write_report
from sparselogits.report.charts import Chart, Point, Series, draw_svg
from tests.report.browser import DESKTOP, PHONE, chromium, opened

HOSTILE = "<img src=x onerror=document.title=1>"


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
        figures={} if loss is None else {"loss": figure(loss)},
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
        assert page.locator("#loss-0 circle").count() == 3
        assert page.locator("#loss-0 .level").count() == 2
        assert "abc1234" in page.inner_text("dl")
        marks = page.locator("#loss-0 circle").first
        stroke = marks.evaluate("mark => getComputedStyle(mark).stroke")
        assert stroke not in ("none", "rgb(0, 0, 0)")  # the style sheet's colours are in force
        # pointing at a name dims the others
        page.locator("#loss-0 .legend li").first.hover()
        dimmed = page.locator("#loss-0 circle").evaluate_all("all => all.map(c => c.style.opacity)")
        assert dimmed == ["", "", "0.12"]
        assert len(page.screenshot(full_page=True)) > 20_000
    pictures = sorted(found.name for found in (tmp_path / "figures").iterdir())
    assert pictures == ["calibration-0.png", "loss-0.png", "storage-0.png", "training-0.png"]


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
    teacher = TeacherRow(figures={"loss": 3.5}, reliability=[], positions=10, windows=1)
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
        words = page.inner_text("main")
        assert "4 batches of 1,024 held-out tokens" in words
        assert f"Gradients not measured: {HOSTILE}" in words
        assert page.locator("#gradient-0 circle").count() == 3
        assert page.locator("#gradient-0 .level").count() == 1
        # on a logarithmic axis a third is as far down whatever it is a third of
        heights = page.locator("#gradient-0 circle").evaluate_all(
            "all => all.map(c => [c.textContent, +c.getAttribute('cy')])"
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
    places = re.findall(r'cx="([-\d.naif]+)" cy="([-\d.naif]+)"', svg)
    assert len(places) == len(points)
    for x, y in places:
        assert 52 <= float(x) <= 448
        assert 10 <= float(y) <= 268
        assert math.isfinite(float(x))
