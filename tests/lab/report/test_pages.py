"""Test every kind of page in Chromium, on a desktop and a phone, in light and dark.

Nothing is truncated or hard to read, no script fails, and nothing is requested from the network.
"""

import re
from pathlib import Path

import pytest

from sparselogits.lab.compare.results import read_results
from sparselogits.lab.report import view_page
from sparselogits.lab.report.comparison import report_page
from sparselogits.lab.report.walkthrough import walkthrough_page
from tests.lab.report.browser import DESKTOP, PHONE, cut_off, faint_texts, opened
from tests.lab.report.material import HOSTILE, RECORD, comparison, walkthrough

LARGEST = 3_000_000
"""Maximum size of a page in bytes."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory, viewer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "comparison": report_page(comparison()),
        "record": report_page(read_results(RECORD)),
        "walkthrough": walkthrough_page(walkthrough()),
        "view": view_page(viewer.view(0), rounds=12, link="/window/{}"),
    }
    found = {name: folder / f"{name}.html" for name in texts}
    for name, path in found.items():
        path.write_text(texts[name], encoding="utf-8")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", ["comparison", "record", "walkthrough", "view"])
def test_it_can_be_read(pages, browser, kind, size, scheme):
    with opened(browser, pages[kind].as_uri(), size=size, scheme=scheme) as page:
        assert cut_off(page) == []
        assert faint_texts(page) == []
        assert page.locator("img").count() == 0
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
        assert (lightness < 64) == (scheme == "dark")


def test_pages_are_small_and_carry_their_library_once(pages):
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.encode()) < LARGEST, name
        assert text.count("window.vegaEmbed") == (0 if name == "view" else 1)
        assert "'unsafe" not in text.partition("<style>")[0]  # the policy stays strict


def test_the_checks_find_what_they_are_for(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><body style='margin:0;background:#fff'>"
        "<p style='color:#999'>faint</p><p style='opacity:.4'>also faint</p><p>plain</p>"
        "<div style='overflow:hidden'><div style='width:3000px'>cut</div></div>"
        "<svg width=50 height=20><text y=15 fill='#ccc'>svg</text></svg>",
        encoding="utf-8",
    )
    page = browser.new_page(viewport=PHONE)
    page.goto(path.as_uri())
    assert [found["text"] for found in faint_texts(page)] == ["faint", "also faint", "svg"]
    assert [found[:27] for found in cut_off(page)] == ['<div style="width:3000px">c']
    page.close()


def test_pointing_shows_the_numbers_as_text(pages, browser):
    """A tooltip is markup that a library makes: a hostile name must not become any."""
    with opened(browser, pages["walkthrough"].as_uri(), size=DESKTOP) as page:
        mark = page.locator("#recovered svg .mark-symbol.role-mark > path").nth(1)
        mark.hover()
        tip = page.locator("#vg-tooltip-element.visible")
        tip.wait_for(timeout=5000)
        assert HOSTILE in tip.inner_text()
        assert "55.2" in tip.inner_text()
        assert page.locator("img").count() == 0
        assert page.title() == "sparselogits demo"
        assert faint_texts(page) == []


def test_a_script_that_is_slipped_in_does_not_run(pages, browser, tmp_path):
    path = tmp_path / "page.html"
    slipped = "<script>document.title = 'slipped in'</script></body>"
    text = pages["comparison"].read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", slipped), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.title().startswith("a comparison")
    page.close()
