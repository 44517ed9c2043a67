"""Test the page of a comparison in Chromium: every number comes from the results."""

import itertools
import json
import math
import re

import pytest
from playwright.sync_api import Page

from sparselogits.errors import SparseLogitsWarning
from sparselogits.lab.compare.results import Results, TeacherRow, read_results
from sparselogits.lab.report import comparison, write_report
from sparselogits.lab.report.charts import (
    COLOURS,
    DASHES,
    SHAPES,
    colours,
    log_ticks,
    looks_of,
    static,
)
from sparselogits.lab.report.comparison import report_page
from sparselogits.lab.report.comparison_charts import (
    ALL_SHOWN,
    drawings_of,
    hidden_at_first,
    in_words,
)
from sparselogits.lab.report.headline import headline
from tests.lab.report.browser import DESKTOP, PHONE, opened
from tests.lab.report.material import HOSTILE, RECORD, gradient, method
from tests.lab.report.material import comparison as made_up


@pytest.fixture
def results() -> Results:
    return made_up()


CELLS = "all => all.map((each) => each.textContent.trim())"  # also of columns that are not shown


def texts(page: Page, chart: str, kind: str) -> list[str]:
    """What Vega wrote in one chart: labels of an axis, titles, names of lines."""
    return page.locator(f"#{chart} svg .{kind} text").all_text_contents()


def shown_marks(page: Page, chart: str) -> int:
    return page.locator(f"#{chart} svg .mark-symbol.role-mark > path").count()


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_it_renders(results, browser, tmp_path, size, scheme):
    path = write_report(results, tmp_path)
    with opened(browser, path.as_uri(), size=size, scheme=scheme) as page:
        table = page.locator("table").first.inner_text()
        for said in ("4.321 ±0.100", "3.987 ±0.100", HOSTILE):
            assert said in table
        assert page.locator("img").count() == 0
        assert [each.get_attribute("id") for each in page.locator("figure").all()] == [
            "loss-0",
            "storage-0",
            "calibration-0",
            "training-0",
        ]
        assert texts(page, "loss-0", "mark-text.role-mark") == ["CE", "full KD"]
        assert shown_marks(page, "loss-0") == 3  # two families with entries
        assert "abc1234" in page.locator("dl").first.inner_text()
        assert len(page.screenshot(full_page=True)) > 20_000
    names = {found.name for found in (tmp_path / "figures").iterdir()}
    assert names == {"calibration-0.png", "loss-0.png", "storage-0.png", "training-0.png"}
    for found in (tmp_path / "figures").iterdir():
        assert found.read_bytes().startswith(b"\x89PNG")


def test_a_method_can_be_switched_off_and_on(results, browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_page(results), encoding="utf-8")
    # Vega says so of an axis that has nothing to show
    with opened(browser, path.as_uri(), size=DESKTOP, expected="Infinite extent") as page:

        def settled(chart: str, marks: int) -> None:
            page.wait_for_function(
                "([id, n]) => document.querySelectorAll("
                "`#${id} svg .mark-symbol.role-mark > path`).length === n",
                arg=[chart, marks],
                timeout=5000,
            )

        settled("loss-0", 3)
        row = page.locator("tbody tr", has_text=HOSTILE).first
        row.locator("button.toggle").click()  # its own line of the table
        settled("loss-0", 2)
        assert row.locator("button.toggle").get_attribute("aria-pressed") == "false"
        page.locator(".switches button", has_text="RS-KD").click()  # two methods at once
        settled("loss-0", 0)
        page.locator("[data-all=on]").first.click()
        settled("loss-0", 3)
        page.locator("[data-all=off]").first.click()
        settled("storage-0", 0)
        lines = "#training-0 svg .mark-line path"
        page.wait_for_function(f"document.querySelectorAll('{lines}').length === 0", timeout=5000)


def test_a_table_is_sorted_and_its_columns_are_chosen(results, browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_page(results), encoding="utf-8")

    def names(page: Page) -> list[str]:
        return page.locator("#methods-0 tbody .name").all_inner_texts()

    with opened(browser, path.as_uri(), size=DESKTOP) as page:
        head = page.locator("#methods-0 thead th", has_text=re.compile("^loss$"))
        head.locator("button").click()
        losses = [4.0, 4.1, 4.321, 4.5]
        by_loss = ["full KD", "RS-KD 12", "RS-KD 5", "CE", HOSTILE, "never run"]
        assert names(page) == by_loss
        assert head.get_attribute("aria-sort") == "ascending"
        head.locator("button").click()  # the other way; what has no value stays last
        assert names(page) == [*by_loss[:5][::-1], "never run"]
        assert losses == sorted(losses)
    with opened(browser, path.as_uri(), size=PHONE) as page:
        heads = page.locator("#methods-0 thead th").filter(visible=True)
        assert heads.all_inner_texts() == ["method", "entries", "loss", "gap closed %"]
        page.locator("summary", has_text="Columns").click()
        page.locator(".choices label", has_text="perplexity").locator("input").check()
        assert "perplexity" in heads.all_inner_texts()
        page.locator(".choices label", has_text="entries").locator("input").uncheck()
        assert "entries" not in heads.all_inner_texts()
        # the names stay where they are while the rest is scrolled
        name = page.locator("#methods-0 tbody .name").first
        before = name.bounding_box()
        page.locator(".wide").first.evaluate("each => { each.scrollLeft = 500; }")
        after = name.bounding_box()
        assert before is not None
        assert after is not None
        assert before["x"] == after["x"]


def test_pointing_near_a_line_names_it_and_dims_the_others(results, browser, tmp_path):
    path = tmp_path / "report.html"
    curves = [[(1, 6.0), (2, 5.0 + number)] for number in range(len(results.runs))]
    runs = [
        run.model_copy(update={"curve": curve if run.curve else []})
        for run, curve in zip(results.runs, curves, strict=True)
    ]
    path.write_text(report_page(results.model_copy(update={"runs": runs})), encoding="utf-8")
    with opened(browser, path.as_uri(), size=DESKTOP) as page:
        chart = page.locator("#training-0 svg")
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        assert box is not None
        # near the end of the lowest line, not on it
        page.mouse.move(box["x"] + box["width"] - 40, box["y"] + box["height"] - 75)
        tip = page.locator("#vg-tooltip-element.visible")
        tip.wait_for(timeout=5000)
        words = tip.inner_text()
        assert "CE" in words
        assert "undefined" not in words
        assert re.search(r"optimiser steps\s+2\b", words)
        page.wait_for_function(
            """() => [...document.querySelectorAll("#training-0 svg .mark-line path")]
              .filter((each) => Number(each.getAttribute("opacity")) < 0.5).length === 4""",
            timeout=5000,
        )


def test_the_best_value_is_that_of_a_student_without_a_teacher(results):
    rows = {row.method: row for row in results.methods}
    found = re.findall(r'<td data-value="([\d.]+)" class="best"', report_page(results))
    assert str(rows["RS-KD 12"].figures["loss"].mean) in found  # not full KD's, which is lower
    assert str(rows["full KD"].figures["loss"].mean) not in found


def test_headline(results):
    page = report_page(results)
    said = re.search(r'<p class="headline">(.*?)</p>', page, re.DOTALL)
    assert said is not None
    assert "RS-KD 12 has the lowest held-out loss" in said[1]
    assert "4.000 nats from 12.0 entries (18.0 bytes) per token" in said[1]
    assert "CE without a teacher 4.321 and full KD with the teacher online 3.987" in said[1]
    assert "not distinguishable from noise" in said[1]  # no gap was given


def test_headline_without_a_common_seed(results):
    rows = [
        row.model_copy(update={"seeds_done": [1]}) if row.family == "full" else row
        for row in results.methods
    ]
    said = headline(results.model_copy(update={"methods": rows}), "small")
    assert "no finished seed in common" in said
    assert "noise" not in said


def test_headlines_of_stored_comparisons():
    stored = read_results(RECORD.with_name("compare_small_teacher_converged.json"))
    page = report_page(stored)
    assert "systematic 12 has the lowest held-out loss" in page
    assert "It closes 80 % of the gap between CE and full KD (95 % interval 78 to 83 %)" in page
    alone = read_results(RECORD.with_name("compare_small_teacher_convergence.json"))
    assert "CE has the lowest held-out loss" in report_page(alone)


def test_labels_of_logarithmic_axes(browser, tmp_path):
    """Also where all methods have nearly the same budget, and for a single one."""
    stored = read_results(RECORD.with_name("compare_small_teacher_converged.json"))
    single = stored.model_copy(update={"methods": [stored.methods[0], stored.methods[2]]})
    path = tmp_path / "report.html"
    for found in (stored, single):
        path.write_text(report_page(found), encoding="utf-8")
        for size in (DESKTOP, PHONE) if found is single else (PHONE,):
            with opened(browser, path.as_uri(), size=size) as page:
                for chart in ("loss-0", "storage-0", "gradient-0"):
                    labels = texts(page, chart, "role-axis-label")
                    assert len(labels) >= 4, (chart, labels)  # two of each axis
                    boxes = [
                        box
                        for label in page.locator(f"#{chart} svg .role-axis-label text").all()
                        if (box := label.bounding_box())
                    ]
                    bottom = max(box["y"] for box in boxes)
                    along = sorted(
                        (box["x"], box["x"] + box["width"])
                        for box in boxes
                        if box["y"] > bottom - 2
                    )
                    pairs = itertools.pairwise(along)
                    assert all(end < start for (_, end), (start, _) in pairs), chart


@pytest.mark.parametrize(
    ("low", "high"), [(11.5, 12.4), (3, 6), (1, 100), (0.5, 3e6), (12, 12.001), (1e9, 1e13)]
)
def test_ticks_lie_within_and_are_few(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_one_bin_per_method_draws_its_point(results, browser, tmp_path):
    rows = [row.model_copy(update={"reliability": row.reliability[:1]}) for row in results.methods]
    runs = [run.model_copy(update={"curve": run.curve[:1]}) for run in results.runs]
    path = tmp_path / "report.html"
    found = results.model_copy(update={"methods": rows, "runs": runs})
    path.write_text(report_page(found), encoding="utf-8")
    with opened(browser, path.as_uri(), size=DESKTOP) as page:
        for chart in ("calibration-0", "training-0"):
            points = page.locator(f"#{chart} svg .mark-symbol.role-mark > path")
            seen = points.evaluate_all(
                "all => all.filter((e) => Number(e.getAttribute('opacity') ?? 1) > 0.5).length"
            )
            assert seen == 5, chart


def test_light_and_dark_are_two_themes():
    names = [f"--c{number}" for number in range(COLOURS)]
    light, _, dark = static("theme.css").partition("@media")
    for half in (light, dark):
        hues = [found[1] for name in names if (found := re.search(rf"{name}: (#\w+)", half))]
        assert len(set(hues)) == COLOURS
    for scheme in (False, True):
        assert set(colours(dark=scheme)) >= {*names, "--paper", "--ink", "--soft", "--line"}


def test_no_two_methods_look_alike():
    stored = read_results(RECORD)
    assert len(stored.methods) > ALL_SHOWN
    student = stored.methods[0].student
    specs = {d.key: json.dumps(d.spec()) for d in drawings_of(stored, student)}
    from sparselogits.lab.report.comparison_charts import looks_of_methods

    looks = looks_of_methods(stored)
    assert len(set(looks.values())) == len(looks) == len(stored.methods)
    for name in looks:
        assert json.dumps(name) in specs["training-0"]
        assert json.dumps(name) in specs["calibration-0"]
    hidden = set(hidden_at_first(stored))
    assert {"CE", "full KD", "RS-KD 12", "systematic 12", "Top-K 12"}.isdisjoint(hidden)
    assert "Top-K 12, smooth" in hidden


def test_settings_in_words():
    setting = {"tokens": 12_000, "thinning": {"rounds": 5, "fresh_noise": False}, "name": "a"}
    assert in_words(setting) == "tokens 12,000, thinning rounds 5, fresh_noise False, name a"


def test_looks_of_methods_in_groups():
    looks = looks_of({"a 1": "a", "b 1": "b", "a 2": "a"})
    assert looks["a 1"].colour == looks["a 2"].colour != looks["b 1"].colour
    assert looks["a 1"].dash != looks["a 2"].dash
    many = looks_of({f"{g} {n}": g for g in map(str, range(20)) for n in range(len(DASHES))})
    assert len(set(many.values())) == len(many)
    assert {look.shape for look in many.values()} == set(range(len(SHAPES)))


def test_gradients_have_a_column_and_a_chart(results, browser, tmp_path):
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
    with opened(browser, path.as_uri(), size=PHONE, scheme="dark") as page:
        lines = page.locator("table").first.locator("tr").all()
        cells = [line.locator("th, td").evaluate_all(CELLS) for line in lines]
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
        assert "the standard error in brackets" in words
        assert "4 batches of 1,024 held-out tokens" in words
        assert f"Gradients not measured: {HOSTILE}" in words
        assert shown_marks(page, "gradient-0") == 3
        assert texts(page, "gradient-0", "mark-text.role-mark") == ["CE"]
        # on a logarithmic axis a third is as far down whatever it is a third of
        places = page.locator("#gradient-0 svg .mark-symbol.role-mark > path").evaluate_all(
            "all => all.map(mark => mark.transform.baseVal[0].matrix).map(at => [at.e, at.f])"
        )
        first, second, third = (y for _, y in sorted(places))  # 5.2, 7 and 12.3 entries
        per_e_fold = (third - second) / math.log(5.0 / 3.0)
        assert first == pytest.approx(third - per_e_fold * math.log(12.8 / 3.0), abs=0.5)
    assert (tmp_path / "figures" / "gradient-0.png").stat().st_size > 10_000


@pytest.mark.parametrize("behind", [True, False])
def test_says_when_the_teacher_is_no_better_than_its_student(results, behind):
    ce = next(row for row in results.methods if row.family == "ce").figures["loss"].mean
    loss = ce + 0.1 if behind else ce - 0.1
    teacher = TeacherRow(figures={"loss": loss}, reliability=[], positions=10, windows=1)
    found = results.model_copy(update={"teacher": teacher})
    page = report_page(found)
    assert ("The teacher is not better than CE" in page) == behind
    assert (f"that of the teacher is {loss:.3f} on the same windows" in page) == behind


def test_says_what_the_teacher_alone_was_not_scored_on(results):
    failed = {"agreement": "no space left"}
    teacher = TeacherRow(
        figures={"loss": 3.5}, reliability=[], positions=10, windows=1, tasks_failed=failed
    )
    found = results.model_copy(update={"teacher": teacher})
    assert found.tasks_not_measured == ["agreement: no space left"]
    page = report_page(found)
    assert "Not measured: <bdi>agreement: no space left</bdi>" in page


def test_nothing_run_yet(results):
    rows = [method("CE", "ce", None, None)]
    empty = results.model_copy(update={"methods": rows, "runs": results.runs[-1:]})
    text = report_page(empty)
    assert "not run" in text
    assert "<figure" not in text


@pytest.mark.parametrize("missing", ["altair", "vl_convert"])
def test_without_the_packages_that_draw(results, tmp_path, missing, monkeypatch):
    import sparselogits.lab.report.charts as charts

    known = charts.find_spec
    monkeypatch.setattr(charts, "find_spec", lambda name: None if name == missing else known(name))
    with pytest.warns(SparseLogitsWarning, match=r"pip install 'sparselogits\[report\]'"):
        path = comparison.write_report(results, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "4.321 ±0.100" in text
    assert "Charts need two more packages" in text
    assert len(text) < 100_000
    assert not (tmp_path / "figures").exists()
