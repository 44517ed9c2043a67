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


def test_the_order_of_the_samplers_is_the_one_that_the_page_states():
    result = json.loads((ROOT / "experiments" / "results" / "languages.json").read_text())
    entropies, entries = [], []
    for text in result["texts"].values():
        errors = {name: own["error_x_entries"] for name, own in text["rounds of this text"].items()}
        assert sorted(errors, key=errors.get)[:2] == ["threshold", "systematic"]
        entropies.append(text["entropy"])
        entries.append(text["rounds of the first text"]["systematic"]["entries"])
    by_entropy = [entries[i] for i in sorted(range(len(entries)), key=entropies.__getitem__)]
    assert by_entropy == sorted(entries)
