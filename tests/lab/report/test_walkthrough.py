"""Test the demo's page: it contains the results, and text of models is never markup.

tests/lab/demo/test_demo.py has the page of a demo that ran. pytest
tests/lab/report/test_walkthrough.py
"""

from sparselogits.lab.demo.story import caution, drawings, headline, table
from sparselogits.lab.report.walkthrough import walkthrough_page
from tests.lab.report.browser import DESKTOP, opened
from tests.lab.report.material import HOSTILE, demo_results, walkthrough


def test_what_is_on_the_page_is_text(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(walkthrough_page(walkthrough()), encoding="utf-8")
    with opened(browser, path.as_uri(), size=DESKTOP) as page:
        words = page.inner_text("main")
        assert words.count(HOSTILE) >= 4  # headline, table, prompt, conditions
        assert page.title() == "sparselogits demo"
        # the axis of a chart has the name as text as well
        labels = page.locator("#recovered svg .role-axis-label text").all_text_contents()
        assert any(label.startswith("<img src") for label in labels)
        # one mark per cached method; full KD and CE, which cache nothing, are lines
        assert page.locator("#storage svg .mark-symbol.role-mark > path").count() == 2
        assert page.locator("#recovered svg .mark-symbol.role-mark > path").count() == 3


def test_the_table_and_the_sentences_have_the_numbers():
    results = demo_results()
    lines = {name: [cell.text for cell in cells] for name, cells in table(results).lines}
    assert lines["not healed"] == ["1.051", "-", "60.0 %", "4.051", "-", "-", "-"]
    assert lines["systematic"] == ["0.601", "99 %", "60.0 %", "3.601", "12.0", "16.6", "-"]
    assert lines["full KD"][4] == "all"
    best = {
        name: [at for at, cell in enumerate(cells) if cell.best]
        for name, cells in table(results).lines
    }
    assert {0, 1} <= set(best["systematic"])  # full KD is the aim, not a rival
    assert "reduce the KL to 0.601" in headline(results)
    assert f"55 % ({HOSTILE}, 50 bytes), 99 % (systematic, 17 bytes)" in headline(results)
    assert "12 held-out windows" in caution(results)


def test_without_a_recovery_to_compare_with_nothing_is_claimed():
    results = demo_results()
    rows = [row.model_copy(update={"recovered": None}) for row in results.methods]
    none = results.model_copy(update={"methods": rows})
    assert drawings(none) == []
    assert "not distinguishable from noise" in headline(none)
    assert all(cells[1].text == "-" for _, cells in table(none).lines)
