"""Rehearse the experiment with retokenized caches, with a tiny teacher.

.venv/bin/pytest tests/lab/compare/test_retokenize_experiment.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from experiments import retokenize as experiment

SIZES = {
    **{"seeds": 2, "windows": 2, "steps": 4, "heldout": 3, "width": 16, "layers": 1, "heads": 2},
    **{"window": 48, "vocabulary": 300},
}


def rehearse(what: str, work: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> None:
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", value)]
    words = ["retokenize", what, "--work", work, *sizes, *more]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    experiment.main()


def test_every_arm_is_trained_and_judged(
    teacher_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "result.json"
    short = tmp_path / "short.jsonl"
    short.write_text("".join(line for line in text.open() if len(line) < 4000))
    rehearse("run", work, monkeypatch, "--teacher", teacher_folder, "--text", short)
    kept = {path: path.stat().st_mtime_ns for path in work.glob("seed-*.json")}
    assert len(kept) == 2
    rehearse("run", work, monkeypatch, "--teacher", teacher_folder, "--text", short)
    assert kept == {path: path.stat().st_mtime_ns for path in work.glob("seed-*.json")}
    rehearse("collect", work, monkeypatch, "--out", out)
    result = json.loads(out.read_text())
    assert not result["as_planned"]
    assert set(result["loss"]) == set(experiment.TITLES)
    # an untrained student has about log(300) nats per token of one or two bytes
    for own in result["loss"].values():
        assert all(1 < value < math.log(300) * 1.2 for value in own)
    assert all(value > 0 for own in result["kl"].values() for value in own)
    assert result["verdict"] in ("confirmed", "refuted", "undecided")


@pytest.mark.parametrize(
    ("drawn", "verdict"),
    [
        ([0.9, 0.91, 0.9, 0.9], "confirmed"),
        ([1.001, 1.002, 1.002, 1.001], "refuted"),
        ([1.0, 0.9, 1.1, 0.8], "undecided"),
    ],
)
def test_the_rule_of_the_verdict(drawn: list[float], verdict: str) -> None:
    means = {title: [1.0, 1.0, 1.001, 1.0] for title in experiment.TITLES}
    losses = {**means, experiment.DRAWN: drawn}
    assert experiment.judge({"loss": losses, "kl": losses})["verdict"] == verdict
