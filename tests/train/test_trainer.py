"""Test training from a cache: repeatable, resumable, independent of ranks and batches."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.corpus import PackedCorpus
from sparselogits.data import Schedule, Stage, WindowOrder, collate
from sparselogits.errors import (
    InvalidArgumentError,
    InvalidTargetsError,
    SparseLogitsWarning,
    TrainingError,
)
from sparselogits.methods import ONLINE
from sparselogits.samplers import Systematic
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.train import run
from sparselogits.train.recipe import parse_recipe
from tests.conftest import build_cache, tiny_llama
from tests.train.conftest import HOT


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


FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}


def trainer_of(
    data: Path | CacheDataset, out: Path, model: torch.nn.Module | None = None, **options: Any
) -> SparseKDTrainer:
    """Return a trainer; options are fields of TrainingArguments and arguments of the trainer."""
    args = arguments(out, **{name: options.pop(name) for name in FIELDS & set(options)})
    data = data if isinstance(data, CacheDataset) else CacheDataset(data)
    model = tiny_llama(seed=9) if model is None else model
    return SparseKDTrainer(model, args, train_dataset=data, **options)


def trained(cache: Path, out: Path, resume: str | None = None, **options: object):
    changes = options.pop("arguments", {})
    model = tiny_llama(seed=9)
    trainer = trainer_of(cache, out, model, **changes, **options)
    trainer.train(resume_from_checkpoint=resume)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


class KeepLogs(TrainerCallback):
    def __init__(self, lines: list[dict[str, float]]) -> None:
        self.lines = lines

    def on_log(self, args, state, control, logs=None, **_):
        self.lines.append(dict(logs))


def test_the_loss_falls_and_repeats(cache, tmp_path):
    first, weights = trained(cache, tmp_path, arguments={"max_steps": 30})
    again, same = trained(cache, tmp_path, arguments={"max_steps": 30})
    assert first == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert sum(first[-5:]) < sum(first[:5]) - 0.5


def test_accumulated_gradients_are_those_of_the_large_batch(cache, tmp_path):
    _, large = trained(cache, tmp_path, arguments={"optim": "sgd"})
    changes = {"optim": "sgd", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    _, small = trained(cache, tmp_path, arguments=changes)
    for name, weight in large.items():
        torch.testing.assert_close(small[name], weight, rtol=1e-4, atol=1e-5)


def label_counts(cache: Path) -> list[int]:
    dataset = CacheDataset(cache)
    return [int((dataset[i]["shift_labels"] != -100).sum()) for i in range(len(dataset))]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_accumulation_weighs_labels_not_micro_batches(answers, tmp_path, alpha):
    """Windows of 0 to 31 labels: a mean over micro-batches of their means would be another step.

    Without clipping, which would hide a factor.
    """
    counts = label_counts(answers[1.0])
    assert min(counts) == 0
    assert max(counts) == 31
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
    lines, found = [], []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        changes = plain | {"per_device_train_batch_size": batch}
        changes |= {"gradient_accumulation_steps": accumulate}
        run: list[dict[str, float]] = []
        keep = KeepLogs(run)
        found.append(
            trained(answers[1.0], tmp_path, alpha=alpha, arguments=changes, callbacks=[keep])
        )
        lines.append([line for line in run if "kd" in line])
    (losses, large), *others = found
    for (same, small), figures in zip(others, lines[1:], strict=True):
        assert same == pytest.approx(losses, rel=1e-4)
        for name, weight in large.items():
            torch.testing.assert_close(small[name], weight, rtol=1e-4, atol=1e-5, msg=name)
        for key in ("kd", "ce", "kl", "entries"):
            expected = [line[key] for line in lines[0]]
            assert [line[key] for line in figures] == pytest.approx(expected, rel=1e-4), key
    means = [line["kd"] * (1 - alpha) + line["ce"] * alpha for line in lines[0]]
    assert losses == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_label_changes_nothing(answers, tmp_path, accumulate):
    """Prompts longer than a window fill whole batches; their loss is 0, not 0 / 0."""
    dataset = CacheDataset(answers[1.0])
    blank = [i for i, count in enumerate(label_counts(answers[1.0])) if count == 0]

    class Prompts(CacheDataset):
        def __getitem__(self, request):
            return dataset[blank[request.index % len(blank)]]

    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulate}
    model = tiny_llama(seed=9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(
        Prompts(answers[1.0]), tmp_path, model, optim="sgd", max_steps=2, **changes, alpha=0.3
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses == [0.0, 0.0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def loss_by_formula(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    teacher: TransformersTeacher | None,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """Sparse cross-entropy, or KL(p || s) with the teacher; the label's part at temperature 1."""
    logits, labels = model(input_ids=batch["input_ids"]).logits, batch["shift_labels"]
    log_s = (logits / temperature).log_softmax(-1)
    if teacher is None:
        kd = -(log_s.gather(2, batch["target_ids"]) * batch["target_weights"]).sum(-1)
    else:
        slices = [part.logits.clone() for part in teacher.logits(batch["input_ids"])]
        p = (torch.cat(slices).view_as(logits) / temperature).softmax(-1)
        kd = (torch.special.xlogy(p, p) - p * log_s).sum(-1)
    ce = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return ((1 - alpha) * kd + alpha * ce)[labels != -100].mean()


@pytest.mark.parametrize("method", ["sparse", "full"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_is_taken_at_the_temperature_of_the_cache(
    answers, teacher_folder, tokenizer, tmp_path, method, alpha
):
    """Loss and gradient of one step of plain descent, against the formula."""
    cache, teacher = answers[HOT], None
    if method == "full":
        teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    dataset = CacheDataset(cache)
    order = WindowOrder(len(dataset), 3, dataset.identity.fingerprint)
    batch = collate([dataset[order[0, i]] for i in range(4)])
    plain = tiny_llama(seed=9)
    expected = loss_by_formula(plain, batch, teacher, alpha, HOT)
    expected.backward()
    rate = 0.5
    changes = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": rate, "max_steps": 1}
    losses, weights = trained(
        cache, tmp_path, method=method, alpha=alpha, teacher=teacher, arguments=changes
    )
    assert losses == pytest.approx([expected.item()], rel=1e-5)
    for name, p in plain.named_parameters():
        stepped = p.detach() - rate * p.grad
        torch.testing.assert_close(weights[name], stepped, rtol=1e-5, atol=1e-5, msg=name)


CURRICULUM = Schedule((Stage(3, until=0.3), Stage(5, until_step=5), Stage(12)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_resumes_bit_for_bit(cache, tmp_path, workers):
    """Across an epoch and two stages of a curriculum: 231 windows are 8 steps of 2 x 16 at most."""
    changes = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 14,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": workers,
    }
    options = {"rounds": CURRICULUM, "alpha": 0.1}
    expected, weights = trained(cache, tmp_path, arguments=changes, **options)
    for step in (4, 12):
        _, resumed = trained(
            cache, tmp_path, str(tmp_path / f"checkpoint-{step}"), arguments=changes, **options
        )
        for name, weight in weights.items():
            assert torch.equal(resumed[name], weight), name
    assert len(expected) == 14


def test_a_checkpoint_of_other_steps_is_refused(cache, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained(cache, tmp_path, arguments=changes)
    checkpoint = str(tmp_path / "checkpoint-2")
    changes |= {"per_device_train_batch_size": 3, "max_steps": 3}
    with pytest.raises(InvalidArgumentError, match="4 windows per step, this run takes 3"):
        trained(cache, tmp_path, checkpoint, arguments=changes)
    trained(cache, tmp_path, checkpoint, arguments=changes | {"ignore_data_skip": True})


def logged(cache: Path, out: Path, **options: object) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    trained(cache, out, callbacks=[KeepLogs(lines)], **options)
    return lines


def test_the_curriculum_is_what_the_student_sees(cache, tmp_path):
    """No position has more entries than the rounds of its step."""
    changes = {"max_steps": 10, "gradient_accumulation_steps": 2}
    lines = [x for x in logged(cache, tmp_path, rounds=CURRICULUM, arguments=changes) if "kd" in x]
    entries = [line["entries"] for line in lines]
    assert max(entries[:3]) <= 3 < min(entries[3:5])
    assert max(entries[3:5]) <= 5 < min(entries[5:])


def test_logs_split_the_loss(cache, tmp_path):
    first = logged(cache, tmp_path, alpha=0.25)[0]
    assert abs(0.75 * first["kd"] + 0.25 * first["ce"] - first["loss"]) < 1e-4
    assert 5 < first["entries"] <= 12
    entropy = CacheDataset(cache).cache.statistics().mean_teacher_entropy
    assert abs(first["kd"] - first["kl"] - entropy) < 0.3  # of four windows, against all of them
    assert first["tokens_per_second"] > 0
    assert first["data_seconds"] > 0


def test_evaluation_inside_training_reports_the_labels_loss(cache, tmp_path):
    dataset = CacheDataset(cache)
    changes = {"eval_strategy": "steps", "eval_steps": 3}
    trainer = trainer_of(
        dataset, tmp_path, tiny_llama(), **changes, eval_dataset=dataset, alpha=0.5
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in lines] == [3, 6]
    model = trainer.model.eval()
    losses, count = 0.0, 0
    with torch.no_grad():
        for window in map(dataset.__getitem__, range(len(dataset))):
            labels = window["shift_labels"]
            log_s = model(input_ids=window["input_ids"][None]).logits[0].log_softmax(-1)
            kept = labels != -100
            losses -= float(log_s[kept].gather(1, labels[kept][:, None]).sum())
            count += int(kept.sum())
    assert abs(lines[-1]["eval_loss"] - losses / count) < 1e-4
    assert 0 < lines[-1]["eval_kl"] < lines[-1]["eval_kd"]


def test_mixed_precision_trains_float32_weights(cache, tmp_path):
    exact, _ = trained(cache, tmp_path, arguments={"max_steps": 12})
    rounded, weights = trained(cache, tmp_path, arguments={"max_steps": 12, "bf16": True})
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 13}, "the cache has 12 rounds"),
        ({"missing_mass": "ghost"}, "would make unbiased targets biased"),
        ({"method": "full"}, "no teacher is given"),
    ],
)
def test_contradictions_are_refused(cache, tmp_path, options, said):
    with pytest.raises(InvalidArgumentError, match=said):
        trainer_of(cache, tmp_path, tiny_llama(), **options)


def test_a_student_with_too_few_ids_is_refused(cache, tmp_path):
    with pytest.raises(InvalidTargetsError, match="vocabulary has 100 ids"):
        trainer_of(cache, tmp_path, tiny_llama(vocab_size=100))


def test_a_student_with_more_ids_learns(cache, tmp_path):
    model = tiny_llama(vocab_size=640)
    trainer_of(cache, tmp_path, model).train()


def small_recipe(cache: Path, out: Path, **changes: object):
    values = {
        "cache": cache,
        "out": out,
        "student": {"hidden_size": 16, "layers": 1, "heads": 2},
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
    }
    return parse_recipe(values | changes, source="test")


def test_a_finished_run_is_not_repeated(cache, tmp_path):
    recipe = small_recipe(cache, tmp_path / "run")
    first = run(recipe, device="cpu")
    second = run(recipe, device="cpu")
    assert first.fresh
    assert not second.fresh
    assert first.curve == second.curve
    assert load_file(first.model_path / "model.safetensors")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == first.steps


@pytest.mark.parametrize(
    "thinning", [{"rounds": 7}, {"budget": 3.0}, {"schedule": [{"until": 0.5, "rounds": 2}] * 1}]
)
def test_a_recipe_thins(cache, tmp_path, thinning):
    result = run(small_recipe(cache, tmp_path / "run", thinning=thinning), device="cpu")
    assert result.steps > 1


def test_an_interrupted_recipe_goes_on_where_its_curriculum_stood(cache, tmp_path):
    changes = {
        "thinning": {"schedule": [{"until": 0.5, "rounds": 3}, {"until": 1.0, "rounds": 12}]},
        "num_train_epochs": 2.0,
        "save_steps": 3,
    }
    whole = run(small_recipe(cache, tmp_path / "whole", **changes), device="cpu")

    class StoppedError(Exception):
        pass

    def stop_late(done: int, total: int, line: dict[str, float]) -> None:
        if done > total * 2 // 3:
            raise StoppedError

    recipe = small_recipe(cache, tmp_path / "broken", **changes)
    with pytest.raises(StoppedError):
        run(recipe, device="cpu", progress=stop_late)
    resumed = run(recipe, device="cpu")
    assert resumed.steps == whole.steps
    first, second = (load_file(r.model_path / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ONLINE)
def test_a_recipe_with_the_teacher_online(cache, tmp_path, teacher_folder, method):
    changes = {"method": method, "teacher": str(teacher_folder), "num_train_epochs": 3.0}
    result = run(small_recipe(cache, tmp_path / "run", **changes), device="cpu")
    assert result.curve[-1][1] < result.curve[0][1]


class Broken(CacheDataset):
    """A cache one of whose windows trains to a loss that is not finite."""

    wrong = -1

    def __getitem__(self, request):
        found = super().__getitem__(request)
        if request.index == self.wrong:
            spoilt = copy.copy(found["targets"])  # past the checks of what is read
            object.__setattr__(spoilt, "weights", spoilt.weights * float("inf"))
            found["targets"] = spoilt
        return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("log_steps", "unchecked"), [(1, 512), (100, 512), (100, 1)])
def test_a_loss_that_is_not_finite_stops_the_run(
    cache, tmp_path, monkeypatch, log_steps, unchecked
):
    """With the window's number, before a checkpoint is saved over what is there.

    With one unchecked loss, the losses are checked between the two batches of a step as well.
    """
    monkeypatch.setattr("sparselogits.train.finite._MOST_UNCHECKED", unchecked)
    dataset = Broken(cache)
    order = WindowOrder(len(dataset), 3, dataset.identity.fingerprint)
    dataset.wrong = order[0, 2 * 4 + 2 + 1]  # third step, second batch of two
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    changes |= {"logging_steps": log_steps, "per_device_train_batch_size": 2}
    changes["gradient_accumulation_steps"] = 2
    trainer = trainer_of(dataset, tmp_path, **changes)
    with pytest.raises(
        TrainingError, match=r"step 3: the loss is .*not a finite number"
    ) as stopped:
        trainer.train()
    number = dataset.cache.window_index(dataset.wrong)
    beside = dataset.cache.window_index(order[0, 2 * 4 + 2])
    assert f"windows {beside}, {number} of the cache" in str(stopped.value)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_weights_that_are_not_finite_are_not_saved(cache, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            with torch.no_grad():
                model.get_output_embeddings().weight[0, 0] = float("nan")

    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = trainer_of(cache, tmp_path, **changes, callbacks=[Spoil()])
    with pytest.raises(TrainingError, match="weights, or the loss on another rank"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


class Grown(CacheDataset):
    """A cache as it was before its last windows were written."""

    def __init__(self, path: Path, ranges: list[tuple[int, int]]) -> None:
        super().__init__(path)
        self.cache._ranges = ranges
        self.cache._before = list(itertools.accumulate((b - a for a, b in ranges), initial=0))


@pytest.fixture(scope="module")
def several_shards(tmp_path_factory, cache, teacher_folder, tokenizer) -> Path:
    """The text of the small cache in shards of 64 windows."""
    corpus, root = PackedCorpus.open(cache / "corpus"), tmp_path_factory.mktemp("several") / "cache"
    options = {"windows_per_shard": 64}
    return build_cache(teacher_folder, corpus, root, Systematic(4), tokenizer, **options)


def test_a_cache_that_has_grown_goes_on_over_the_windows_it_had(several_shards, tmp_path):
    """Bit for bit; other windows in front, or none, are refused."""
    whole = CacheDataset(several_shards)
    ranges = whole.cache.ranges
    assert len(ranges) > 2
    changes = {"save_strategy": "steps", "save_steps": 4, "max_steps": 14}
    changes["per_device_train_batch_size"] = 16

    def weights(dataset: CacheDataset, resume: str | None = None) -> dict[str, torch.Tensor]:
        model = tiny_llama(seed=9)
        trainer = trainer_of(dataset, tmp_path, model, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    before = Grown(several_shards, ranges[:-1])
    expected = weights(before)
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.warns(SparseLogitsWarning, match=f"from {len(before)} to {len(whole)} windows"):
        found = weights(whole, checkpoint)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    with pytest.raises(InvalidArgumentError, match=r"now contains 0 to 63: the run cannot resume"):
        weights(Grown(several_shards, ranges[:1]), checkpoint)
    with pytest.raises(InvalidArgumentError, match="cannot resume in the same order"):
        weights(Grown(several_shards, ranges[1:]), checkpoint)
    elsewhere = json.loads((tmp_path / "checkpoint-4" / "sparselogits.json").read_text())
    elsewhere["cache"] = "0" * 64
    (tmp_path / "checkpoint-4" / "sparselogits.json").write_text(json.dumps(elsewhere))
    with pytest.raises(InvalidArgumentError, match="a cache of fingerprint 000000000000"):
        weights(whole, checkpoint)
