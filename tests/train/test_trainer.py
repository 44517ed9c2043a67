"""Training from a cache: repeatable, resumable, equal over ranks and batch divisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.errors import InvalidArgumentError, InvalidTargetsError, RecipeError
from sparselogits.train import run
from sparselogits.train.recipe import parse_recipe
from tests.conftest import tiny_llama


def arguments(out: Path, **changes: object) -> TrainingArguments:
    settings: dict[str, object] = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**(settings | changes))


def trained(cache: Path, out: Path, resume: str | None = None, **options: object):
    changes = options.pop("arguments", {})
    model = tiny_llama(seed=9)
    trainer = SparseKDTrainer(
        model, arguments(out, **changes), train_dataset=CacheDataset(cache), **options
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_loss_falls_and_repeats(cache: Path, tmp_path: Path) -> None:
    first, weights = trained(cache, tmp_path, arguments={"max_steps": 30})
    again, same = trained(cache, tmp_path, arguments={"max_steps": 30})
    assert first == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert sum(first[-5:]) < sum(first[:5]) - 0.5


def test_accumulated_gradients_are_those_of_the_large_batch(cache: Path, tmp_path: Path) -> None:
    _, large = trained(cache, tmp_path, arguments={"optim": "sgd"})
    changes = {"optim": "sgd", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    _, small = trained(cache, tmp_path, arguments=changes)
    for name, weight in large.items():
        torch.testing.assert_close(small[name], weight, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_resumes_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "num_train_epochs": 3}
    options = {"rounds": 4, "alpha": 0.1}
    expected, weights = trained(cache, tmp_path, arguments=changes, **options)
    _, resumed = trained(
        cache, tmp_path, str(tmp_path / "checkpoint-3"), arguments=changes, **options
    )
    assert len(expected) == 7
    for name, weight in weights.items():
        assert torch.equal(resumed[name], weight), name


def test_logs_split_the_loss(cache: Path, tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            lines.append(dict(logs))

    trained(cache, tmp_path, alpha=0.25, callbacks=[Keep()])
    first = lines[0]
    assert abs(0.75 * first["kd"] + 0.25 * first["ce"] - first["loss"]) < 1e-4
    assert 5 < first["entries"] <= 12


def test_evaluation_inside_training_reports_the_labels_loss(cache: Path, tmp_path: Path) -> None:
    dataset = CacheDataset(cache)
    trainer = SparseKDTrainer(
        tiny_llama(), arguments(tmp_path), train_dataset=dataset, eval_dataset=dataset, alpha=0.5
    )
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 5}, "does not divide the cache's 12 rounds"),
        ({"missing_mass": "ghost"}, "would bias"),
        ({"method": "full"}, "needs a teacher"),
    ],
)
def test_contradictions_are_refused(cache: Path, tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        SparseKDTrainer(
            tiny_llama(), arguments(tmp_path), train_dataset=CacheDataset(cache), **options
        )


def test_a_student_with_too_few_ids_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidTargetsError, match="vocabulary has 100 ids"):
        SparseKDTrainer(
            tiny_llama(vocab_size=100), arguments(tmp_path), train_dataset=CacheDataset(cache)
        )


def test_a_student_with_more_ids_learns(cache: Path, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=640)
    SparseKDTrainer(model, arguments(tmp_path), train_dataset=CacheDataset(cache)).train()


def small_recipe(cache: Path, out: Path, **changes: object):
    values = {
        "cache": cache,
        "out": out,
        "student": {"hidden_size": 16, "layers": 1, "heads": 2},
        "log_steps": 1,
        "batch_windows": 16,
    }
    return parse_recipe(values | changes, source="test")


def test_a_finished_run_is_not_repeated(cache: Path, tmp_path: Path) -> None:
    recipe = small_recipe(cache, tmp_path / "run")
    first = run(recipe, device="cpu")
    second = run(recipe, device="cpu")
    assert first.fresh
    assert not second.fresh
    assert first.curve == second.curve
    assert load_file(first.model_path / "model.safetensors")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == first.steps


def test_another_recipe_does_not_overwrite_a_run(cache: Path, tmp_path: Path) -> None:
    run(small_recipe(cache, tmp_path / "run"), device="cpu")
    with pytest.raises(RecipeError, match="differ in alpha"):
        run(small_recipe(cache, tmp_path / "run", alpha=0.5), device="cpu")
