"""The demo's page from real students, caches and measurements, of tiny models.

pytest tests/lab/report/test_walkthrough.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from sparselogits.corpus import open_source, pack, packing_for
from sparselogits.data import TextDataset
from sparselogits.evaluate import evaluate
from sparselogits.lab.demo.story import (
    PROMPT_TOKENS,
    PROMPTS,
    Told,
    continuations,
    prompts_of,
    write_story,
    write_window,
)
from sparselogits.lab.report import WindowViewer
from sparselogits.lab.report.walkthrough import walkthrough_page
from tests.conftest import tiny_llama
from tests.lab.report.browser import DESKTOP, cut_off, opened
from tests.lab.report.material import HOSTILE, walkthrough


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, viewer: WindowViewer, tokenizer: object, text: Path
) -> Path:
    out = tmp_path_factory.mktemp("story")
    teacher = viewer.teacher
    assert teacher is not None
    packing = packing_for(tokenizer, window_length=48, separator_id=0, holdout=0.2)
    corpus = pack(
        open_source(str(text)), tokenizer, packing, out / "corpus", vocab_size=teacher.vocab_size
    )
    students = {"ce": tiny_llama(seed=5), "systematic": tiny_llama(seed=3)}
    heldout = evaluate(students, TextDataset(corpus, limit=6), teacher)
    prompts = prompts_of(corpus)
    assert len(prompts) == PROMPTS
    assert all(len(prompt) == PROMPT_TOKENS for prompt in prompts)
    models = {"the teacher": teacher.model, "systematic": students["systematic"]}
    samples = continuations(models, tokenizer, prompts, seed=7)
    again = continuations(models, tokenizer, prompts, seed=7)
    assert samples == again
    window = write_window(
        out, Path(str(viewer.dataset.cache.root)), tokenizer, teacher, students["systematic"]
    )
    curve = [(1, 6.2), (2, 6.1)]
    write_story(
        out / "report.html",
        [
            Told("ce", "CE", None, None, 1.0, curve),
            Told("systematic", "systematic", 9.0, 20.0, 1.0, curve),
        ],
        heldout,
        headline="A teacher taught a student.",
        caution="Little text.",
        continuations=samples,
        window=window,
        next_steps=[("Look:", "sparselogits info cache")],
        conditions=[("seed", "7")],
    )
    return out / "report.html"


def test_it_shows_what_was_measured_and_leads_on(story: Path, browser: Browser) -> None:
    with opened(browser, story.as_uri(), size=DESKTOP) as page:
        assert page.inner_text(".headline") == "A teacher taught a student."
        table = page.locator("#methods-0").inner_text()
        assert "the teacher" in table
        assert "20.0" in table
        # one diamond per method where training ends, at its held-out loss
        ends = page.locator("#losses svg path[stroke='var(--paper)']")
        assert ends.count() == 2
        assert page.locator("#gaps svg .mark-symbol.role-mark > path").count() == 1
        assert page.locator(".sample").count() == PROMPTS
        assert page.locator(".sample").first.locator("p").count() == 3
        assert cut_off(page) == []
        link = page.locator("a", has_text="token by token").get_attribute("href")
    assert link is not None
    assert (story.parent / link).is_file()
    with opened(browser, (story.parent / link).as_uri(), size=DESKTOP) as page:
        assert page.inner_text("h1") == "Window 0"


def test_what_is_on_the_page_is_text(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(walkthrough_page(walkthrough()), encoding="utf-8")
    with opened(browser, path.as_uri(), size=DESKTOP) as page:
        words = page.inner_text("main")
        assert words.count(HOSTILE) >= 4  # headline, table, prompt, conditions
        assert page.title() == "sparselogits demo"
        # the axis of a chart has the name as text as well
        labels = page.locator("#gaps svg .role-axis-label text").all_text_contents()
        assert any(label.startswith("<img src") for label in labels)
