"""Test that the code of the README runs unchanged."""

import runpy
import sys
from pathlib import Path

import pytest

from sparselogits.cli import main
from tests.journeys.material import write_material
from tests.pages import ROOT, blocks
from tests.stand_ins import stand_in_for_named_models


def test_the_commands_and_the_python_example(tmp_path, tokenizer, monkeypatch, capsys):
    write_material(tmp_path / "desk", 30_000)
    monkeypatch.chdir(tmp_path / "desk")
    Path("text.jsonl").replace("pages.jsonl")
    stand_in_for_named_models(tmp_path / "home", tokenizer, monkeypatch)
    names: dict[str, object] = {}  # a block goes on from the one before
    for block in (block for block in blocks(ROOT / "README.md") if not block.mark):
        if block.language == "python":
            exec(compile(block.code, "README.md", "exec"), names)
            continue
        for words in block.commands:
            assert words[0] == "sparselogits"
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stop:
                main()
            assert stop.value.code in (0, None), (words, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "CacheDataset(my-cache: " in said
    assert "'loss': " in said, "the Trainer's example logs"


def test_the_first_table_and_the_samples_are_those_of_the_stored_run():
    script = runpy.run_path(str(ROOT / "experiments" / "demo.py"))
    results, samples = script["read"]()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["markdown_table"](results) in readme
    assert script["markdown_samples"](samples) in readme
    tokens = results.settings["corpus"]["heldout_windows"] * results.settings["recipe"]["window"]
    assert f"{tokens:,}".replace(",", " ") + " held-out tokens" in " ".join(readme.split())
    run = next(run for run in results.runs if run.steps)
    assert run.tokens == run.steps * 512
    assert run.steps == 10  # "ten steps of 512 tokens"
    shares = {row.method: round(row.recovered.mean) for row in results.methods if row.recovered}
    for page in (readme, (ROOT / "docs" / "index.md").read_text(encoding="utf-8")):
        assert f"Top-12 at {shares['Top-12']} %" in page
        assert f"ghost token at {shares['Top-12 ghost']} %" in page
        assert f"CE without a teacher at {shares['CE']} %" in page
