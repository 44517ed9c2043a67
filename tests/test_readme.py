"""What the README shows runs as it stands there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks


@pytest.mark.slow
def test_the_commands_and_the_python_example(
    tmp_path: Path, teacher_folder: Path, text: Path
) -> None:
    pages = [json.loads(line)["text"] for line in text.open()]
    paragraphs = [part for page in pages for part in page.split("\n\n") if len(part) > 300]
    short = tmp_path / "TEXT.jsonl"  # many documents, so that 5 % of them are some
    short.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs[:120]))
    run = [block for block in blocks(ROOT / "README.md") if not block.mark]
    names = {"MODEL": str(teacher_folder), "TEXT": str(short)}
    for words in (words for block in run if block.language == "bash" for words in block.commands):
        words = [names.get(word, word) for word in words]
        assert words[0] == "sparselogits"
        if words[1] == "cache":
            words += ["--window", "64"]  # the tiny teacher reads no more at once
        subprocess.run([sys.executable, "-m", *words], check=True, cwd=tmp_path, timeout=300)
    script = tmp_path / "example.py"  # the second goes on from the first
    script.write_text("\n".join(block.code for block in run if block.language == "python"))
    done = subprocess.run(
        [sys.executable, str(script)], check=True, cwd=tmp_path, timeout=300, capture_output=True
    )
    assert b"entries in the first window" in done.stdout
