"""The experiment on two teachers: the plan's rule, and two steps of every arm."""

import json

import numpy as np
import pytest
from experiments import two_teachers
from experiments.compare import documents

from tests.lab.compare.test_claims import call, outcome

MIXED = two_teachers.MIXED
MEANS = {**dict.fromkeys(two_teachers.TITLES, 3.40), "first teacher": 3.50, "second teacher": 3.45}


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "confirmed", "ahead of each teacher alone"),
        ({"second teacher": 3.40}, "refuted", "not ahead of a teacher"),
        ({"second teacher": 3.35}, "refuted", "not ahead of a teacher"),
        ({"second teacher": 3.403}, "undecided", "contains -0.003"),
    ],
)
def test_the_rule_of_two_teachers(changes, verdict, reason):
    found = two_teachers.judge(outcome({**MEANS, **changes}))
    assert found["verdict"] == verdict
    assert reason in found["reason"]
    assert len(found["secondary"]) == len(two_teachers.SECONDARY)


def test_one_seed_has_no_verdict():
    one = {title: [mean] for title, mean in MEANS.items()}
    found = two_teachers.judge({"loss": one, "kl": one})
    assert (found["verdict"], found["secondary"]) == ("none", [])


def test_a_true_difference_of_nothing_is_hardly_ever_confirmed():
    """At a rate of at most 2.5 %, more than 50 of 1 000 would be seen once in a million times."""
    confirmed = 0
    for seed in range(1000):
        noise = 0.006 * np.random.default_rng(seed).standard_normal((len(MEANS), 6))
        same = {t: (1 + own).tolist() for t, own in zip(MEANS, noise, strict=True)}
        confirmed += two_teachers.judge({"loss": same, "kl": same})["verdict"] == "confirmed"
    assert confirmed <= 50


@pytest.mark.slow
def test_two_steps_of_every_arm_run_and_are_collected(tmp_path):
    texts = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for text, words in zip(texts, ("a play that is long", "a speech of a president"), strict=True):
        text.write_text("\n\n".join(f"Line {i} of {words}." for i in range(2000)))
    shape = "--width 16 --layers 1 --heads 2 --window 32 --vocabulary 300 --epochs 0.05"
    halves = tmp_path / "halves"
    own = ("--first", str(texts[0]), "--second", str(texts[1]), "--work", str(halves))
    call(two_teachers.main, "teachers", *own, *shape.split())
    tokenizers = [(halves / half / "tokenizer.json").read_text() for half in two_teachers.HALVES]
    assert tokenizers[0] == tokenizers[1]
    data = [str(halves / half / "documents.jsonl") for half in two_teachers.HALVES]
    part, work, out = tmp_path / "part.jsonl", tmp_path / "work", tmp_path / "out.json"
    call(documents.main, "--data", *data, "--out", str(part), "--characters", "30000")
    sizes = "--seeds 2 --windows 2 --steps 2 --heldout 3 --width 16 --layers 1 --heads 2"
    given = ("--teachers", str(halves), "--text", str(part))
    call(two_teachers.main, "run", "--work", str(work), *given, *sizes.split())
    call(two_teachers.main, "collect", "--work", str(work), "--out", str(out), *sizes.split())
    found = json.loads(out.read_text())
    assert set(found["loss"]) == set(found["kl"]) == set(two_teachers.TITLES)
    found["loss"].pop("best teacher per window")  # one of these teachers may be the better always
    assert len({tuple(own) for own in found["loss"].values()}) == len(two_teachers.TITLES) - 1
    assert set(found["loss_of_teachers"]) == set(two_teachers.HALVES)
    with pytest.raises(SystemExit):  # a rehearsal does not replace the planned result
        call(two_teachers.main, "collect", "--work", str(work), *sizes.split())
