"""Test the experiments on public claims: the rules of the plans, equal bytes, two steps each."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.claims import many_epochs, small_vocabulary, training
from experiments.compare import pages

from sparselogits.samplers import Systematic, TopK
from tests.lab.compare.conftest import assert_same_verdict, call

SEEDS = 6
TOP, SAMPLED, TIMED = small_vocabulary.CLAIMED, small_vocabulary.SAMPLED, small_vocabulary.TIMED
LOSS = {  # a plausible outcome in which the claim is repeated and the cut tail is the reason
    **dict.fromkeys(small_vocabulary.TITLES, 3.40),
    "full KD": 3.30,
    TOP: 3.40,
    SAMPLED: 3.35,
    TOP + TIMED: 3.41,
    SAMPLED + TIMED: 3.36,
}
KL = dict.fromkeys(many_epochs.TITLES, 0.30)
KL |= {"CE": 0.60, "full KD": 0.25, "4 rounds, fresh": 0.28}


def outcome(means: Mapping[str, float], noise: float = 0.001, seed: int = 0) -> dict[str, Any]:
    """Values of all arms: what a seed shares, and noise of the arm around the given mean."""
    generator = np.random.default_rng(seed)
    shared = 0.01 * generator.standard_normal(SEEDS)
    own = generator.standard_normal((len(means), SEEDS))
    own = noise * (own - own.mean(1, keepdims=True))
    found = {name: (means[name] + shared + x).tolist() for name, x in zip(means, own, strict=True)}
    return {"loss": found, "kl": found}


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "confirmed", "cut tail is the reason"),
        ({TOP + TIMED: 3.37}, "not repeated", "ahead of CE"),
        ({TOP + TIMED: 3.397}, "undecided", "not resolved"),
        ({SAMPLED + TIMED: 3.41}, "refuted", "gains nothing either"),
        ({SAMPLED + TIMED: 3.45}, "refuted", "gains nothing either"),
        ({SAMPLED + TIMED: 3.399}, "undecided", "not ahead of both"),
        ({TOP: 3.38}, "confirmed", "cost per step is a reason"),
        ({"full KD": 3.40}, "confirmed", "Full KD is not ahead"),
    ],
)
def test_the_rule_of_the_small_vocabulary(changes, verdict, reason):
    found = small_vocabulary.judge(outcome({**LOSS, **changes}))
    assert found["verdict"] == verdict
    assert reason in found["reason"]
    assert len(found["secondary"]) == len(small_vocabulary.TITLES) - 3


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "confirmed", "more than 0.003"),
        ({"4 rounds, fresh": 0.30}, "refuted", "not ahead"),
        ({"4 rounds, fresh": 0.35}, "refuted", "not ahead"),
        ({"4 rounds, fresh": 0.297}, "undecided", "contains -0.003"),
        ({"4 rounds, frozen, A/A": 0.31}, "undecided", "A/A control"),
    ],
)
def test_the_rule_of_many_epochs(changes, verdict, reason):
    found = many_epochs.judge(outcome({**KL, **changes}))
    assert found["verdict"] == verdict
    assert reason in found["reason"]


def test_one_seed_has_no_verdict():
    for judge, means in ((small_vocabulary.judge, LOSS), (many_epochs.judge, KL)):
        found = judge({name: {k: [x] for k, x in means.items()} for name in ("loss", "kl")})
        assert (found["verdict"], found["secondary"]) == ("none", [])


def test_a_true_difference_of_nothing_is_hardly_ever_confirmed():
    """1 000 experiments each in which nothing differs are confirmed in 2.5 % of cases at most.

    At a rate of 2.5 %, more than 50 would be seen once in a million times.
    """
    for judge, titles in (
        (small_vocabulary.judge, small_vocabulary.TITLES),
        (many_epochs.judge, many_epochs.TITLES),
    ):
        confirmed = 0
        for seed in range(1000):
            noise = 0.006 * np.random.default_rng(seed).standard_normal((len(titles), SEEDS))
            same = {t: (1 + own).tolist() for t, own in zip(titles, noise, strict=True)}
            confirmed += judge({"loss": same, "kl": same})["verdict"] == "confirmed"
        assert confirmed <= 50


def test_rounds_at_equal_bytes_are_the_most_that_fit():
    """Compared with a search over every number of rounds."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(48, 256, generator=generator) for _ in range(2)]
    tokens = [torch.randint(256, (48,), generator=generator) for _ in range(2)]

    def size(rounds: int) -> float:
        return small_vocabulary.bytes_per_token(Systematic(rounds), logits, tokens)

    most = small_vocabulary.bytes_per_token(TopK(4), logits, tokens)
    found = small_vocabulary.rounds_within(Systematic, most, logits, tokens)
    assert size(found) <= most < size(found + 1)
    assert found > 4
    assert all(size(rounds) <= most for rounds in range(1, found))


@pytest.mark.parametrize("experiment", [small_vocabulary, many_epochs])
def test_the_stored_verdict_is_that_of_the_stored_windows(experiment):
    if not experiment.RESULT.exists():
        pytest.skip("not run")
    stored = json.loads(experiment.RESULT.read_text())
    with np.load(experiment.RESULT.with_name(f"{experiment.RESULT.stem}_windows.npz")) as windows:
        means = {
            name: dict(
                zip(
                    windows["arms"].tolist(),
                    (windows[name].astype(np.float64).sum(2) / windows["positions"].sum()).tolist(),
                    strict=True,
                )
            )
            for name in ("loss", "kl")
        }
    assert_same_verdict(stored, experiment.judge(means))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), [("small_vocabulary", 1), ("many_epochs", 2)], ids=str)
def test_two_steps_run_are_interrupted_and_collected(name, epochs, material, tmp_path, monkeypatch):
    experiment = {"small_vocabulary": small_vocabulary, "many_epochs": many_epochs}[name]
    monkeypatch.setattr(small_vocabulary, "K", 8)
    monkeypatch.setattr(training, "SAVE_STEPS", 1)
    sizes = f"--seeds 2 --windows 2 --steps 2 --epochs {epochs} --heldout 3 --width 16 --layers 1"

    def command(what: str, folder: str, *more: str) -> None:
        words = (what, "--work", str(tmp_path / folder), *sizes.split(), "--heads", "2", *more)
        own = experiment
        call(
            lambda: training.command(
                own.__doc__, own.PLAN, own.RESULT, own.TITLES, own.judge, own.run
            ),
            *words,
        )

    teacher = ("--teacher", str(material[0]), "--text", str(material[1]))
    command("run", "whole", *teacher)
    out = tmp_path / "whole.json"
    command("collect", "whole", "--out", str(out))
    whole = json.loads(out.read_text())
    assert whole["as_planned"] is False
    assert set(whole["loss"]) == set(whole["kl"]) == set(experiment.TITLES)
    assert all(len(own) == 2 and min(own) > 0 for own in whole["loss"].values())
    if name == "many_epochs":  # no two arms are alike; at equal time some are, where time is equal
        assert len({tuple(own) for own in whole["loss"].values()}) == len(experiment.TITLES)

    # stopped after each write of a state, and started again, it comes to the same numbers
    if name == "small_vocabulary":  # seconds per step would differ
        (tmp_path / "again").mkdir()
        seconds = (tmp_path / "whole" / "seconds_per_step.json").read_text()
        (tmp_path / "again" / "seconds_per_step.json").write_text(seconds)
    save, left = training._save, itertools.count()

    def broken(state: Any, file: Path) -> None:
        save(state, file)
        if next(left) in (0, 1, 5, 45):
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", broken)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            command("run", "again", *teacher)
    monkeypatch.setattr(training, "_save", save)
    command("collect", "again", "--out", str(tmp_path / "part.json"))
    assert json.loads((tmp_path / "part.json").read_text())["verdict"] == "none yet"
    command("run", "again", *teacher)
    command("collect", "again", "--out", str(tmp_path / "again.json"))
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == whole

    stored = pages.stored
    monkeypatch.setattr(pages, "stored", lambda file: again if name in file else stored(file))
    page = " ".join(pages.findings().split())
    assert f"`experiments/claims/{name}.py`; 2 seeds" in page
    for title in again["endpoints"]:
        assert f"| {title} |" in page
    with pytest.raises(SystemExit):  # a rehearsal does not replace the planned result
        command("collect", "whole")
