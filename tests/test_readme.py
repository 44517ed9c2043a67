"""What the README shows runs as it stands there, word for word."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparselogits.cli import main
from tests.journeys.material import write_material
from tests.pages import ROOT, blocks
from tests.stand_ins import stand_in_for_named_models


def test_the_commands_and_the_python_example(
    tmp_path: Path,
    tokenizer: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
