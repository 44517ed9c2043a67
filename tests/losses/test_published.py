"""Test that the speeds in docs/loss.md are those of the committed run."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_holds_the_table_of_the_committed_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where the script finds its own kin
    spec = importlib.util.spec_from_file_location("loss_benchmark", ROOT / "benchmarks" / "loss.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = json.loads((ROOT / "benchmarks" / "loss.json").read_text())["results"]
    assert benchmark.table(results) in (ROOT / "docs" / "loss.md").read_text()
