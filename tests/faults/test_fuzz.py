"""Test a part of the fuzzing; `python -m tests.faults.run --only fuzz` runs a million inputs."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_hostile_bytes_are_refused_within_a_memory_bound(tmp_path):
    out = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "tests.faults.fuzz", "--inputs", "2000", "--seed", "7"]
    subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=True, timeout=300)
    answers = json.loads(out.read_text())["answers"]
    assert set(answers) == {"block", "tables", "footer", "frame", "forged", "identity"}
    for door, count in answers.items():
        refused = sum(n for answer, n in count.items() if answer != "decoded")
        assert refused > 0.6 * sum(count.values()), door
