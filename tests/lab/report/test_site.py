"""Test the documentation site in Chromium: the first page and the longest tables."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import REPOSITORY
from tests.lab.report.browser import DESKTOP, PHONE, cut_off, faint_texts, opened


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["index", "results", "results/small-teacher"])
def test_it_can_be_read(address, browser, name, size, scheme):
    page_address = f"{address}/{name}.html"
    with opened(browser, page_address, size=size, scheme=scheme, own=address) as page:
        page.wait_for_selector(".md-typeset__scrollwrap")
        assert cut_off(page) == []
        assert faint_texts(page) == []
        pictures = page.locator("article img").filter(visible=True)
        assert pictures.count() == {"index": 1, "results": 1}.get(name, 5)
        assert pictures.evaluate_all("all => all.every((each) => each.naturalWidth > 300)")


def test_the_first_page_leads_on(address, browser):
    with opened(browser, f"{address}/index.html", size=DESKTOP, own=address) as page:
        words = page.locator("article").inner_text()
        assert "pip install sparselogits" in words
        assert "SparseKDTrainer(student" in words
        links = page.locator(f"a.md-source[href='{REPOSITORY}']").filter(visible=True)
        assert links.count() == 1
        assert "Quickstart" in page.locator(".md-footer__link--next").inner_text()
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(ground)
        for _ in range(2):  # from the system's theme to the light one, then to the dark one
            page.locator("label[for^=__palette]").filter(visible=True).first.click()
        assert page.evaluate(ground) != light


def test_tables_keep_their_headings(address, browser):
    with opened(
        browser, f"{address}/results/small-teacher.html", size=DESKTOP, own=address
    ) as page:
        page.wait_for_selector(".md-typeset__scrollwrap")
        wraps = page.locator(".md-typeset__scrollwrap")
        heights = wraps.evaluate_all("all => all.map((e) => e.scrollHeight - e.clientHeight)")
        long = max(range(len(heights)), key=lambda at: heights[at])
        assert heights[long] > 100  # 35 methods are more than a screen
        wrap = wraps.nth(long)
        moved = wrap.evaluate(
            """(each) => {
              const head = each.querySelector("th");
              const before = head.getBoundingClientRect().top;
              each.scrollTop = 300;
              return [each.scrollTop, head.getBoundingClientRect().top - before];
            }"""
        )
        assert moved[0] == 300
        assert abs(moved[1]) < 20
