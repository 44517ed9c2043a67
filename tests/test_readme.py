"""What the README shows runs as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_commands_and_the_python_example(
    tmp_path: Path, teacher_folder: Path, text: Path
) -> None:
    pages = [json.loads(line)["text"] for line in text.open()]
    paragraphs = [part for page in pages for part in page.split("\n\n") if len(part) > 300]
    short = tmp_path / "TEXT.jsonl"  # many documents, so that 5 % of them are some
    short.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs[:120]))
    (commands,), examples = blocks("bash"), blocks("python")
    for line in commands.strip().splitlines():
        words = line.replace("MODEL", str(teacher_folder)).replace("TEXT", str(short)).split()
        assert words[0] == "sparselogits"
        if words[1] == "cache":
            words += ["--window", "64"]  # the tiny teacher reads no more at once
        subprocess.run([sys.executable, "-m", *words], check=True, cwd=tmp_path, timeout=300)
    assert "DEMO" + "_OUTPUT" not in README
    script = tmp_path / "example.py"
    script.write_text("\n".join(examples))  # the second goes on from the first
    done = subprocess.run(
        [sys.executable, str(script)], check=True, cwd=tmp_path, timeout=300, capture_output=True
    )
    assert b"entries in the first window" in done.stdout
