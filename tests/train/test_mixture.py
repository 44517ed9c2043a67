"""A student of two teachers: the step, the log, recipes, resuming, and what is refused."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sparselogits import CacheDataset
from sparselogits.cli import app
from sparselogits.corpus import PackedCorpus
from sparselogits.data import Schedule, Stage
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError, RecipeError
from sparselogits.samplers import TopK
from sparselogits.train import run
from sparselogits.train.recipe import parse_recipe
from tests.conftest import PADDED_VOCABULARY, build_cache, run_python, tiny_llama
from tests.train.test_trainer import trainer_of

WEIGHTS = [0.7, 0.3]
PADDED = PADDED_VOCABULARY + 8


def one_step(
    dataset: CacheDataset, out: Path, **options: object
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The log line and the change of every weight in one step of plain descent."""
    model = tiny_llama(seed=9, vocab_size=PADDED)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "max_steps": 1}
    trainer = trainer_of(dataset, out, model, **plain, **options)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    return line, {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_is_the_weighted_mean_of_the_teachers_steps(cache, second_cache, tmp_path, alpha):
    """Cross-entropy is linear in its target; so are its gradient and the reported KL."""
    mixed = CacheDataset([cache, second_cache], weights=WEIGHTS)
    found, step = one_step(mixed, tmp_path, alpha=alpha)
    alone = [one_step(CacheDataset(path), tmp_path, alpha=alpha) for path in (cache, second_cache)]
    for name, change in step.items():
        expected = sum(w * own[name] for w, (_, own) in zip(WEIGHTS, alone, strict=True))
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6, msg=name)
    for key in ("loss", "kd", "kl"):
        expected = sum(w * line[key] for w, (line, _) in zip(WEIGHTS, alone, strict=True))
        assert found[key] == pytest.approx(expected, rel=1e-4), key


def test_a_thinned_mixture_has_the_entries_of_its_rounds(cache, second_cache, tmp_path):
    mixed = CacheDataset([cache, second_cache])
    line, _ = one_step(mixed, tmp_path, rounds=4)
    assert 2 < line["entries"] <= 4
    for rounds, said in ((1, "use at least 2 rounds"), (28, "has 27 rounds")):
        with pytest.raises(InvalidArgumentError, match=said):
            one_step(mixed, tmp_path, rounds=rounds)
    with pytest.raises(InvalidArgumentError, match="rounds=1: a window mixes 2 teachers"):
        one_step(mixed, tmp_path, rounds=Schedule((Stage(1, until=0.5), Stage(6))))


def test_truncated_targets_are_mixed_without_a_ghost_token(
    cache, second_teacher, teacher_folder, tokenizer, tmp_path
):
    """Drop, smooth and ground_truth are linear in the target as well."""
    caches = [tmp_path / "one", tmp_path / "two"]
    for root, folder in zip(caches, (teacher_folder, second_teacher), strict=True):
        build_cache(folder, PackedCorpus.open(cache / "corpus"), root, TopK(3), tokenizer)
    mixed = CacheDataset(caches, weights=WEIGHTS)
    for rule in ("drop", "smooth", "ground_truth"):
        found, _ = one_step(mixed, tmp_path, missing_mass=rule)
        alone = [one_step(CacheDataset(c), tmp_path, missing_mass=rule)[0]["kd"] for c in caches]
        expected = sum(w * kd for w, kd in zip(WEIGHTS, alone, strict=True))
        assert found["kd"] == pytest.approx(expected, rel=1e-4), rule
        assert "kl" not in found
    with pytest.raises(InvalidArgumentError, match="ghost' is not defined for a mixture"):
        one_step(mixed, tmp_path, missing_mass="ghost")
    best, _ = one_step(CacheDataset(caches, weights="best"), tmp_path, missing_mass="ghost")
    assert best["kd"] > 0
    with pytest.raises(IdentityMismatchError, match=r"unbiased is True in .* and False"):
        CacheDataset([cache, caches[1]])


def mixed_recipe(caches: list[Path], out: Path, **changes: object) -> dict[str, object]:
    return {
        "cache": [str(path) for path in caches],
        "weights": WEIGHTS,
        "out": str(out),
        "student": {"hidden_size": 16, "layers": 1, "heads": 2},
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 16,
        "thinning": {"schedule": [{"until": 0.5, "rounds": 5}, {"rounds": 20}]},
        "save_steps": 3,
        "logging_steps": 1,
        **changes,
    }


KILLED = """
import os, signal, sys, json
from sparselogits.train import run
from sparselogits.train.recipe import parse_recipe

def stop(done, total, line):
    if done >= 11:
        os.kill(os.getpid(), signal.SIGKILL)

run(parse_recipe(json.loads(sys.argv[1]), source="x"), device="cpu", progress=stop)
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(cache, second_cache, tmp_path):
    """Across an epoch and a stage of the curriculum; other weights are another run."""

    caches = [cache, second_cache]
    whole = run(parse_recipe(mixed_recipe(caches, tmp_path / "whole"), source="x"), device="cpu")
    values = mixed_recipe(caches, tmp_path / "killed")
    killed = run_python("-c", KILLED, json.dumps(values))
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob("checkpoint-9"))
    with pytest.raises(RecipeError, match=r"different: .*weights"):
        run(parse_recipe(values | {"weights": [0.5, 0.5]}, source="x"), device="cpu")
    resumed = run(parse_recipe(values, source="x"), device="cpu")
    assert resumed.steps == whole.steps
    first, second = (load_file(r.model_path / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not run(parse_recipe(values, source="x"), device="cpu").fresh
    with pytest.raises(RecipeError, match=r"different: .*cache"):
        run(parse_recipe(values | {"cache": [values["cache"][1], values["cache"][0]]}, source="x"))
    card = (whole.model_path / "README.md").read_text()
    assert "0.7 x teacher" in card


def test_a_checkpoint_of_other_weights_is_refused(cache, second_cache, tmp_path):
    caches = [cache, second_cache]

    def train(weights: list[float], resume: str | None = None) -> None:
        trainer_of(
            CacheDataset(caches, weights=weights),
            tmp_path,
            tiny_llama(seed=9, vocab_size=PADDED),
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
        ).train(resume_from_checkpoint=resume)

    train(WEIGHTS)
    with pytest.raises(InvalidArgumentError, match="or the same caches and weights"):
        train([0.5, 0.5], str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("weights", ["0.12345678,0.87654322", "1,0"])
def test_mixtures_are_named_on_the_command_line(weights, cache, second_cache, tmp_path):
    """The command that is printed next has the same weights, without a teacher that is not used."""
    out = tmp_path / "run"
    words = ["train", "--cache", str(cache), "--cache", str(second_cache), "--weights", weights]
    words += ["--student-config", "layers=1,width=16,heads=2", "--out", str(out), "--device", "cpu"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    used = f"--cache {second_cache} --weights {weights} " if weights != "1,0" else ""
    assert f"eval {out} --cache {cache} {used}" in done.output.replace("\n", " ")
    assert ("--weights" in done.output.partition("Next:")[2]) == bool(used)
    assert (out / "model" / "tokenizer.json").exists()  # that of the first cache
    assert str(float(weights.partition(",")[0])) in (out / "recipe.json").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": [0.7, 0.7]}, "sum is 1, found .0.7, 0.7. with the sum 1.4"),
        ({"weights": "worst"}, "weights: give a list of numbers, .* or best"),
        ({"weights": ["a"]}, "weights: give a list of numbers"),
        ({"cache": []}, "cache: give the folder or URL of a cache, or a list"),
        ({"cache": 3}, "cache: give the folder or URL"),
        ({"cache": "one"}, "weights need several caches, found one: give a list"),
        ({"method": "full", "teacher": "t"}, "full runs one teacher online, and 2 caches are"),
    ],
)
def test_recipes_of_mixtures_say_what_is_wrong(cache, second_cache, tmp_path, change, said):
    values = mixed_recipe([cache, second_cache], tmp_path / "run", **change)
    with pytest.raises((RecipeError, InvalidArgumentError), match=said):
        run(parse_recipe(values, source="x"), device="cpu")
    assert not (tmp_path / "run" / "recipe.json").exists()
