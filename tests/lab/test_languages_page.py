"""docs/languages.md has the numbers of the stored result."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    page_of = importlib.import_module("languages").page_of
    result = json.loads((ROOT / "experiments" / "results" / "languages.json").read_text())
    assert page_of(result) == (ROOT / "docs" / "languages.md").read_text()
