"""Test a part of the forged caches; `python -m tests.faults.run --only strangers` runs all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARE = (
    "start of -2^31",
    "a gigabyte of targets",
    "a name of 8e8",
    "cache.json of 192 MiB",
    "a shard that is a pipe",
    "a teacher of escapes",
    "corpus.json a pipe",
)


@pytest.mark.slow
def test_a_strangers_cache_costs_no_command_its_memory_or_its_time(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.faults.strangers", "--out", str(out)]
    subprocess.run(
        [*command, "--only", *SHARE, "--commands", "info", "verify", "view", "train", "merge"],
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )
    found = json.loads(out.read_text())
    assert found["failures"] == []
    assert found["mutations"] == len(SHARE)
