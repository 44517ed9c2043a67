"""Test the experiment on masked language models: the plan's rule, a rehearsal, its tables."""

from __future__ import annotations

import importlib.util
import json
import random
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from experiments import small_teacher
from experiments.masked import masked

from sparselogits.lab.compare import read_results
from tests.lab.compare.test_claims import call

TRAINED = [name for name in masked.NAMES if name != "before training"]
KL = {**dict.fromkeys(TRAINED, 0.20), "CE": 0.50, "Top-12": 0.55}
TABLES = Path(masked.__file__).parents[1] / "healing" / "tables.py"


def outcome(means: Mapping[str, float], noise: float = 0.002) -> dict[str, list[float]]:
    """Return three seeds per method, whose deviations differ between methods."""
    drawn = np.random.default_rng(0).standard_normal((len(means), 3))
    drawn -= drawn.mean(1, keepdims=True)
    return {
        name: (m + noise * own).tolist()
        for (name, m), own in zip(means.items(), drawn, strict=True)
    }


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "confirmed", "at least 90 %"),
        ({"RS-KD 12": 0.26}, "refuted", "less than 90 %"),
        ({"RS-KD 12": 0.23}, "undecided", "contains 90 %"),
        ({"full KD": 0.50, "RS-KD 12": 0.50}, "undecided", "not distinguishable from CE's"),
    ],
)
def test_the_rule_of_the_verdict(changes: Mapping[str, float], verdict: str, reason: str) -> None:
    found = masked.judge(outcome({**KL, **changes}))
    assert (found["verdict"], reason in found["reason"]) == (verdict, True), found
    assert len(found["secondary"]) == len(masked.SECONDARY)
    assert min(row["p_holm"] - row["p"] for row in found["secondary"]) >= 0


def test_one_seed_has_no_verdict() -> None:
    found = masked.judge({name: [mean] for name, mean in KL.items()})
    assert (found["verdict"], found["secondary"]) == ("none", [])


@pytest.mark.skipif(not masked.RESULT.exists(), reason="not run")
def test_the_stored_verdict_is_that_of_the_stored_metrics() -> None:
    stored = json.loads(masked.RESULT.read_text())
    assert stored["as_planned"]
    again = masked.judge({name: stored["methods"][name]["kl"] for name in TRAINED})
    for name, value in again.items():
        assert stored[name] == value


def write_texts(folder: Path) -> list[Path]:
    """Write two sources of text that differ in four of ten words."""
    drawn, paths = random.Random(0), []
    common = ["the", "of", "and", "to", "in", "that"]
    for name, words in (("plays", "king crown sword night"), ("speeches", "union state law tax")):
        own = words.split()
        paths.append(folder / f"{name}.txt")
        lines = (
            " ".join(drawn.choice(own if drawn.random() < 0.4 else common) for _ in range(60))
            for _ in range(500)
        )
        paths[-1].write_text("\n\n".join(lines))
    return paths


SIZES = shlex.split(
    "--vocabulary 64 --layers 4 --width 16 --heads 2 --window 32 --batch 4 --teacher-steps 6 "
    "--characters 15000 --seeds 2 --heldout 6 --passage 16 --passages 60 --causal-windows 8"
)


@pytest.mark.slow
def test_a_rehearsal_runs_resumes_and_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_teacher, "DOCUMENT_CHARACTERS", 300)
    work, out = tmp_path / "work", tmp_path / "out.json"
    given = ("--work", str(work), *SIZES)
    with pytest.raises(SystemExit, match="two files with different names"):
        call(masked.main, "teacher", "--text", str(write_texts(tmp_path)[0]), *given)
    with pytest.raises(SystemExit, match="there is no teacher"):
        call(masked.main, "run", *given)
    texts = [str(path) for path in write_texts(tmp_path)]
    call(masked.main, "teacher", "--text", *texts, *given)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(masked.Passages, "accuracy", stop)
        with pytest.raises(KeyboardInterrupt):
            call(masked.main, "run", *given)
    call(masked.main, "run", *given)
    call(masked.main, "collect", "--out", str(out), *given)
    found = json.loads(out.read_text())
    assert not found["as_planned"]
    assert list(found["methods"]) == list(masked.NAMES)
    runs = read_results(work / "students").runs
    for name, row in found["methods"].items():
        own = [run.figures["kl"] for run in runs if run.method == name]
        assert row["kl"] == own
        assert len(row["probe"]) == len(own) == (1 if name == "before training" else 2)
    assert found["teacher"]["probe"] > 0.8  # the sources differ in four of ten words
    for name, causal in found["causal_bytes_per_token"].items():
        # 0.3 of the tokens carry a target, of the same number of entries
        assert 0.1 < found["methods"][name]["bytes_per_token"] / causal < 0.6
    assert found["verdict"] in ("confirmed", "refuted", "undecided")
    sheet = tables().masked_table(found)
    cells = {line.strip("| ").split(" | ")[0]: line for line in sheet if line.startswith("|")}
    mean = sum(found["methods"]["RS-KD 12"]["kl"]) / 2
    assert f"| {mean:.3f} (" in cells["RS-KD 12"]
    rows, note = tables()._masked_rows(found)
    assert rows[0][4] == f"{sum(found['methods']['full KD']['kl']) / 2:.3f}"
    assert "mean of 2 seeds" in note
    with pytest.raises(SystemExit):  # a rehearsal does not replace the planned result
        call(masked.main, "collect", *given)


def test_the_tables_say_that_the_experiment_was_not_run() -> None:
    rows, note = tables()._masked_rows(None)
    assert [row[2:5] for row in rows] == [["not run"] * 3] * 2
    assert "not run" in note


def tables() -> ModuleType:
    """Load experiments/healing/tables.py as a module."""
    spec = importlib.util.spec_from_file_location("healing_tables", TABLES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
