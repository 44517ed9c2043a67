"""Open pages in Chromium, and fail a test if the browser logs an error.

The browser is $SPARSELOGITS_BROWSER, or one on the path, or one installed by playwright. Without a
browser these tests fail with a message on how to install one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
MISSING = (
    "these tests need Chromium: `make browser`, or `apt-get install chromium`, or "
    "`playwright install chromium`, or name one in SPARSELOGITS_BROWSER"
)
CONTRAST = 4.5
"""Minimum contrast of text by WCAG 2.2 (1.4.3, level AA)."""


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
    browser: Browser,
    address: str,
    *,
    size: dict[str, int],
    scheme: str = "light",
    own: str | None = None,
    expected: str | None = None,
) -> Iterator[Page]:
    """Yield an open page, and check at the end that it logged nothing and requested nothing else.

    Args:
        browser: browser that opens the page.
        address: address of the page.
        size: width and height of the screen in pixels.
        scheme: light or dark.
        own: prefix of the addresses of all allowed requests; by default the address of the page.
        expected: part of log messages that are allowed.
    """
    page = browser.new_page(viewport=size, color_scheme=scheme)
    errors: list[str] = []
    asked: list[str] = []
    bad = ("error", "warning")
    page.on("console", lambda said: errors.append(said.text) if said.type in bad else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    if page.locator(".chart").count():
        page.wait_for_function("document.documentElement.dataset.ready === 'yes'")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
    assert [error for error in errors if expected is None or expected not in error] == []
    if own is None:
        assert {url.partition("#")[0] for url in asked} == {address.partition("#")[0]}
    else:
        assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []


def cut_off(page: Page) -> list[str]:
    """Return the elements beyond the screen's width that do not scroll, with all details open."""
    found: list[str] = page.evaluate(
        """() => {
          document.querySelectorAll("details").forEach((each) => { each.open = true; });
          const scrolls = (each) => ["auto", "scroll"].includes(getComputedStyle(each).overflowX);
          const inside = (each) => {
            for (let up = each.parentElement; up && up !== document.body; up = up.parentElement)
              if (scrolls(up)) return true;
            return false;
          };
          return [...document.querySelectorAll("body *")]
            .filter((each) => each.checkVisibility({ visibilityProperty: true }) && !inside(each))
            .filter((each) => {
              const box = each.getBoundingClientRect();
              if (box.width === 0 || box.right <= 0) return false;  // wholly outside: a drawer
              return box.left < -0.5 || box.right > innerWidth + 0.5;
            })
            .map((each) => each.outerHTML.slice(0, 200));
        }"""
    )
    return found


def faint_texts(page: Page) -> list[dict[str, Any]]:
    """Return the visible texts whose contrast to their background is below `CONTRAST`."""
    found: list[dict[str, Any]] = page.evaluate(
        """(least) => {
          const canvas = new OffscreenCanvas(1, 1);
          const brush = canvas.getContext("2d", { willReadFrequently: true });
          const known = new Map();
          const rgba = (colour) => {  // whatever the syntax; [r, g, b, alpha]
            if (!known.has(colour)) {
              brush.clearRect(0, 0, 1, 1);
              brush.fillStyle = colour;
              brush.fillRect(0, 0, 1, 1);
              const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
              known.set(colour, [r, g, b, a / 255]);
            }
            return known.get(colour);
          };
          const over = (top, alpha, below) => below.map((c, i) => alpha * top[i] + (1 - alpha) * c);
          const behind = (each) => {
            const layers = [];
            for (let up = each; up; up = up.parentElement) {
              const [r, g, b, a] = rgba(getComputedStyle(up).backgroundColor);
              if (a > 0) layers.push([[r, g, b], a]);
              if (a === 1) break;
            }
            const mix = (below, [top, a]) => over(top, a, below);
            return layers.reverse().reduce(mix, [255, 255, 255]);
          };
          const bright = (colour) => {
            const [r, g, b] = colour.map((c) => c / 255)
              .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const faint = [];
          let texts = 0;
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const each = node.parentElement;
            if (!node.data.trim() || each.closest("script, style, noscript, option")) continue;
            if (!each.checkVisibility({ visibilityProperty: true })) continue;
            texts += 1;
            const style = getComputedStyle(each);
            const ink = each instanceof SVGElement ? style.fill : style.color;
            let [r, g, b, a] = rgba(ink);
            for (let up = each; up; up = up.parentElement)
              a *= Number(getComputedStyle(up).opacity);
            if (a === 0) continue;  // a label that would overlap another one is there, not seen
            const paper = behind(each);
            const both = [bright(over([r, g, b], a, paper)), bright(paper)];
            const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
            if (ratio < least)
              faint.push({ text: node.data.trim().slice(0, 40), ratio, ink, paper });
          }
          if (texts === 0) faint.push({ text: "the page shows no text" });
          return faint;
        }""",
        CONTRAST,
    )
    return found
