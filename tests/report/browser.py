"""A real Chromium for the pages: what it logs as an error fails the test.

Found as $SPARSELOGITS_BROWSER, or on the path, or among playwright's own; a machine without one
fails these tests and says how to get one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
MISSING = (
    "these tests need Chromium: `make browser`, or `apt-get install chromium`, or "
    "`playwright install chromium`, or name one in SPARSELOGITS_BROWSER"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = os.environ.get("SPARSELOGITS_BROWSER")
        found = found or next(filter(None, map(shutil.which, NAMES)), None)
        found = found or (own if Path(own).exists() else None)
        if found is None:
            pytest.fail(MISSING)
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser, address: str, *, size: dict[str, int], scheme: str = "light"
) -> Iterator[Page]:
    """A page; at the end nothing was logged as an error and nothing else was asked for."""
    page = browser.new_page(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
    assert errors == []
    assert {url.partition("#")[0] for url in asked} == {address.partition("#")[0]}
