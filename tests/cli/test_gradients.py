"""Test `sparselogits gradients`. Run with `pytest tests/cli/test_gradients.py`."""

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import command
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    tiny_llama(seed=4).save_pretrained(folder / "model")  # a run, as `train` leaves it
    return folder


def test_a_table_and_its_results(student, teacher_folder, text, tmp_path):
    out = tmp_path / "results.json"
    run = command(
        *("gradients", student, "--teacher", teacher_folder, "--data", text, "--window", 32),
        *("--batch", 32, "--batch", 64, "--batches", 2, "--draws", 2, "--budget", 4),
        *("--top-k", 4, "--missing-mass", "drop", "--missing-mass", "ghost"),
        *("--adaptive", student / "model", "--fresh", "--out", out),
    )
    assert run.returncode == 0, run.stderr
    assert "fresh: all parameters, 2 batches of 64 tokens" in run.stdout
    assert "small: hidden, 2 batches of 64 tokens" in run.stdout
    found = json.loads(out.read_text())
    assert found["conditions"]["tokens"] == 128
    assert len(found["conditions"]["text_sha256"]) == 64
    assert found["conditions"]["students"]["small"]["parameters"] > 0
    names = ["Top-4", "Top-4, ghost", "RS-KD", "systematic", "threshold", "uniform", "adaptive"]
    rows = {
        (row["student"], row["target"], row["space"], row["batch_tokens"]) for row in found["rows"]
    }
    assert len(rows) == len(found["rows"]) == 2 * 8 * 5 * 2
    assert {target for _, target, _, _ in rows} == {*names, "label (CE)"}
