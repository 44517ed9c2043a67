"""Test the rule of experiments/deciding.py on constructed outcomes, and its training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments import deciding
from experiments.compare.pages import Findings
from experiments.deciding import ARMS, RESULTS, judge
from experiments.planned import holm

from tests.lab.compare.conftest import assert_same_verdict, call

SEEDS = 12
KL = {  # a plausible outcome in which the hypothesis holds
    "CE": 0.40,
    "full KD": 0.150,
    "RS-KD 14": 0.191,
    "RS-KD 15": 0.190,
    "RS-KD 15, A/A": 0.190,
    "RS-KD 22": 0.180,
    "systematic 14": 0.180,
    "systematic 28": 0.162,
    "Top-12": 0.60,
    "Top-12, ghost": 0.25,
    "Top-50, ghost": 0.21,
}


def outcome(changes: Mapping[str, float] | None = None, *, seed: int = 0) -> dict[str, list[float]]:
    """Values of all arms: what a seed shares, noise of the arm with a deviation of 0.002."""
    generator = np.random.default_rng(seed)
    shared = 0.01 * generator.standard_normal(SEEDS)
    noise = generator.standard_normal((len(ARMS), SEEDS))
    noise = 0.002 * (noise - noise.mean(1, keepdims=True))  # means are those given
    means = {**KL, **(changes or {})}
    return {
        arm.title: (means[arm.title] + shared + own).tolist()
        for arm, own in zip(ARMS, noise, strict=True)
    }


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "confirmed", "level with RS-KD 22"),
        ({"systematic 14": 0.1895}, "refuted", "smaller than 0.003"),
        ({"Top-12, ghost": 0.19}, "refuted", "ghost token"),
        ({"Top-12, ghost": 0.15}, "refuted", "ghost token"),
        ({"systematic 14": 0.187}, "undecided", "upper limit"),
        ({"systematic 14": 0.200}, "undecided", "upper limit"),
        ({"RS-KD 15, A/A": 0.196}, "undecided", "A/A control"),
        ({"RS-KD 22": 0.170}, "undecided", "within 0.003"),
    ],
)
def test_the_rule(changes, verdict, reason):
    found = judge(outcome(changes))
    assert found["verdict"] == verdict
    assert reason in found["reason"]


def test_a_true_difference_of_nothing_is_hardly_ever_confirmed():
    """1 000 experiments in which nothing differs are confirmed in 2.5 % of cases at most.

    At a rate of 2.5 %, more than 50 would be seen once in a million times.
    """
    same = dict.fromkeys(KL, 0.19) | {"Top-12, ghost": 0.25}
    verdicts = []
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        noise = 0.006 * generator.standard_normal((len(ARMS), SEEDS))
        kl = {
            arm.title: (same[arm.title] + own).tolist()
            for arm, own in zip(ARMS, noise, strict=True)
        }
        verdicts.append(judge(kl)["verdict"])
    assert verdicts.count("confirmed") <= 50


def test_holm_is_the_step_down_procedure():
    p = [0.04, 0.001, 0.03, 0.012]
    assert holm(p) == pytest.approx([0.06, 0.004, 0.06, 0.036])
    generator = np.random.default_rng(0)
    for _ in range(200):
        own = (generator.random(6) ** 3).tolist()
        rejected, order = set(), sorted(range(6), key=lambda i: own[i])
        for rank, at in enumerate(order):  # stop at the first that is not rejected
            if own[at] > 0.05 / (6 - rank):
                break
            rejected.add(at)
        assert {i for i, x in enumerate(holm(own)) if x <= 0.05} == rejected


def test_secondary_differences_are_corrected_together():
    found = judge(outcome())["secondary"]
    assert len(found) == 10
    assert all(own["p"] <= own["p_holm"] <= 1 for own in found)
    assert all(
        own["high"] < 0 and own["p_holm"] < 0.05 for own in found if "Top-12" in own["difference"]
    )


@pytest.mark.skipif(not (RESULTS / "deciding.json").exists(), reason="not run")
def test_the_stored_verdict_is_that_of_the_stored_windows():
    stored = json.loads((RESULTS / "deciding.json").read_text())
    with np.load(RESULTS / "deciding_windows.npz") as windows:
        kl = windows["kl"].astype(np.float64).sum(2) / windows["positions"].sum()
    again = judge({arm.title: own.tolist() for arm, own in zip(ARMS, kl, strict=True)})
    assert_same_verdict(stored, again)


@pytest.mark.slow
def test_two_steps_run_are_interrupted_and_collected(material, tmp_path, monkeypatch):
    """The commands of the docstring, on a teacher of a few steps."""
    teacher, work, out = material[0], tmp_path / "work", tmp_path / "deciding.json"
    sizes = ("--seeds", "2", "--ancestor-steps", "2", "--steps", "2", "--heldout", "3")
    sizes += ("--width", "16", "--layers", "1", "--heads", "2", "--work", str(work))
    monkeypatch.setattr(deciding, "SAVE_STEPS", 1)
    save = deciding.torch.save

    def broken(state: Any, path: Path) -> None:
        save(state, path)
        if path.name.startswith("seed-1"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deciding.torch, "save", broken)
        with pytest.raises(KeyboardInterrupt):
            call(deciding.main, "run", "--teacher", str(teacher), *sizes)
    call(deciding.main, "collect", *sizes, "--out", str(out))
    assert json.loads(out.read_text())["verdict"] == "none yet"
    (work / "seed-1.tmp").rename(work / "seed-1.pt")  # as if stopped just after the rename
    call(deciding.main, "run", "--teacher", str(teacher), *sizes)
    call(deciding.main, "bytes", "--teacher", str(teacher), *sizes)
    call(deciding.main, "collect", *sizes, "--out", str(out))
    found = json.loads(out.read_text())
    assert found["verdict"] in ("confirmed", "refuted", "undecided")
    assert found["as_planned"] is False
    assert all(len(own) == 2 and min(own) > 0 for own in found["kl"].values())
    assert len({tuple(own) for own in found["kl"].values()}) == len(ARMS)  # no two arms are alike
    took = found["bytes_per_token"]
    assert set(took) == {arm.title for arm in ARMS if arm.sampler is not None}
    assert 0 < took["systematic 14"] < took["systematic 28"] < took["Top-50, ghost"]
    rows = Findings().arms_table(found, "full KD").splitlines()[2:]
    assert [line.split(" | ")[0] for line in rows] == [f"| {arm.title}" for arm in ARMS]
    assert f"| {took['RS-KD 15']:.1f} |" in rows[3]
    with pytest.raises(SystemExit, match="rehearsal"):
        call(deciding.main, "collect", *sizes)
