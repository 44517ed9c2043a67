"""A small cache to train from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    short = folder / "short.jsonl"
    short.write_text("".join(line for line in text.open() if len(line) < 4000))
    subprocess.run(
        [
            *(sys.executable, "-m", "sparselogits", "cache", "--device", "cpu"),
            *("--teacher", str(teacher_folder), "--data", str(short)),
            *("--out", str(folder / "cache"), "--window", "32", "--rounds", "12"),
            *("--holdout", "0.2"),
        ],
        check=True,
    )
    return folder / "cache"
