"""Test that every argument of the Trainer and TrainingArguments works, or is an error.

All fields of the installed transformers are enumerated; a field without a decision fails.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.data import Schedule, WindowOrder, collate
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.train.arguments import REJECTED, REJECTED_BY_TRAINER
from tests.conftest import tiny_llama
from tests.train.test_trainer import KeepLogs, arguments, trainer_of

WORKS: dict[str, Any] = {
    **{"per_device_train_batch_size": 3, "num_train_epochs": 1.0, "max_steps": 3},
    **{"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1},
    "lr_scheduler_kwargs": {"num_cycles": 1},
    **{"optim": "adafactor", "optim_args": "weight_decay=0.01", "weight_decay": 0.1},
    **{"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.5},
    "optim_target_modules": ["q_proj"],
    **{"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    "label_smoothing_factor": 0.1,
    **{"bf16": True, "bf16_full_eval": True, "fp16_full_eval": True, "use_cpu": True},
    **{"activation_checkpointing": True, "use_cache": True, "neftune_noise_alpha": 5.0},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    **{"torch_compile": True, "torch_compile_backend": "eager", "torch_empty_cache_steps": 1},
    **{"auto_find_batch_size": True, "include_num_input_tokens_seen": "all"},
    **{"logging_strategy": "epoch", "logging_steps": 2, "logging_first_step": True},
    **{"logging_nan_inf_filter": False, "log_on_each_node": False, "log_level": "error"},
    **{"log_level_replica": "error", "disable_tqdm": False, "report_to": "none"},
    **{"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1, "eval_on_start": True},
    **{"per_device_eval_batch_size": 2, "prediction_loss_only": True},
    **{"eval_do_concat_batches": False, "eval_use_gather_object": True},
    **{"eval_accumulation_steps": 1, "include_for_metrics": ["inputs", "loss"]},
    **{"save_only_model": True, "save_strategy": "epoch", "save_steps": 1, "save_total_limit": 1},
    **{"save_on_each_node": True, "load_best_model_at_end": True, "greater_is_better": False},
    **{"metric_for_best_model": "eval_loss", "ignore_data_skip": True},
    **{"restore_callback_states_from_checkpoint": True, "seed": 5, "data_seed": 6},
    **{"dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_pin_memory": False},
    **{"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
    **{"dataloader_in_order": False, "remove_unused_columns": False, "run_name": "name"},
    **{"skip_memory_metrics": False, "debug": "underflow_overflow"},
    **{"ddp_timeout": 60, "dataloader_multiprocessing_context": "fork"},
}
"""Value per field that differs from the default, for a run of two steps."""

TOGETHER: dict[str, dict[str, Any]] = {
    "bf16_full_eval": {"eval_strategy": "steps", "eval_steps": 1},
    "eval_steps": {"eval_strategy": "steps"},
    "eval_delay": {"eval_strategy": "epoch"},
    "torch_compile_backend": {"torch_compile": True},
    "torch_compile": {"torch_compile_backend": "eager"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
    "optim_target_modules": {"optim": "adamw_torch"},
    "optim_args": {"optim": "adamw_torch"},
    "load_best_model_at_end": {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1},
    "dataloader_drop_last": {"per_device_eval_batch_size": 2},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "dataloader_in_order": {"dataloader_num_workers": 2},
}
"""Other fields that must be set for a field to have an effect."""

ELSEWHERE = {
    "output_dir": "every test",
    "full_determinism": "sets switches of torch for the whole process",
    **dict.fromkeys(
        ["ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"],
        "passed to DDP, whose steps test_ddp.py compares",
    ),
    **dict.fromkeys(["ddp_static_graph", "ddp_backend", "local_rank"], "likewise"),
    "resume_from_checkpoint": "read by scripts, not by the Trainer; train() takes one",
    **dict.fromkeys(["do_train", "do_eval", "do_predict"], "read by scripts, not by the Trainer"),
    **dict.fromkeys(
        ["gradient_checkpointing", "gradient_checkpointing_kwargs"],
        "older names of activation_checkpointing; test_objective.py",
    ),
    "torch_compile_mode": "inductor's, which needs a C++ compiler here",
}
"""Fields that other tests set or that the Trainer never reads, with the reason."""

NEED_MORE = {
    **dict.fromkeys(["fp16", "tf32"], "an accelerator; refused on the CPU by transformers"),
    "parallelism_config": "several accelerators",
    **dict.fromkeys(["fsdp", "fsdp_config"], "several ranks; docs/training.md says what is tested"),
    "liger_kernel_config": "read with use_liger_kernel alone, which is refused",
    "length_column_name": "read with train_sampling_strategy alone, which is refused",
    "enable_jit_checkpoint": "a scheduler that sends SIGTERM",
    **dict.fromkeys(["push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"], "a hub"),
    **dict.fromkeys(["hub_strategy", "hub_always_push", "hub_revision", "project"], "a hub"),
    **dict.fromkeys(["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"], "a hub"),
    "batch_eval_metrics": "a compute_metrics that takes batches; tested below",
}
"""Fields that are passed on and cannot be tested on one CPU, with the reason."""


def student() -> torch.nn.Module:
    return tiny_llama(seed=9)


def few(cache: Path, windows: int = 8) -> CacheDataset:
    class Few(CacheDataset):
        def __len__(self) -> int:
            return windows

    return Few(cache)


def test_every_field_is_decided_about():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    decided = [set(WORKS), set(REJECTED), set(ELSEWHERE), set(NEED_MORE)]
    assert set().union(*decided) == fields
    assert sum(map(len, decided)) == len(fields)


def test_every_argument_of_the_trainer_is_decided_about():
    works = {"model", "args", "data_collator", "train_dataset", "eval_dataset", "model_init"}
    works |= {"processing_class", "compute_metrics", "preprocess_logits_for_metrics"}
    works |= {"callbacks", "optimizers", "optimizer_cls_and_kwargs"}
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert works | set(REJECTED_BY_TRAINER) == known


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.filterwarnings("ignore::sparselogits.errors.SparseLogitsWarning")
def test_a_field_works(cache, tmp_path, name):
    changes = {"max_steps": 2} | TOGETHER.get(name, {}) | {name: WORKS[name]}
    lines: list[dict[str, float]] = []
    trainer = trainer_of(
        few(cache), tmp_path, **changes, eval_dataset=few(cache, 4), callbacks=[KeepLogs(lines)]
    )
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps > 0
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_sampling_strategy", "group_by_length"),
        ("train_sampling_strategy", "sequential"),
        ("label_names", ["labels"]),
        ("accelerator_config", {"split_batches": True}),
        ("accelerator_config", {"dispatch_batches": True}),
    ],
)
def test_a_field_is_refused(cache, tmp_path, name, value):
    args = arguments(tmp_path, **{name: value})
    with pytest.raises(InvalidArgumentError, match=name):
        SparseKDTrainer(student(), args, train_dataset=CacheDataset(cache))


@pytest.mark.parametrize("name", ["use_liger_kernel", "deepspeed"])
def test_a_field_of_a_missing_library_is_refused(cache, tmp_path, name):
    args = arguments(tmp_path)
    setattr(args, name, True)
    with pytest.raises(InvalidArgumentError, match=name):
        SparseKDTrainer(student(), args, train_dataset=CacheDataset(cache))


def test_a_loss_of_ones_own_is_refused(cache, tmp_path):
    with pytest.raises(InvalidArgumentError, match="compute_loss_func"):
        trainer_of(cache, tmp_path, compute_loss_func=lambda *_, **__: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "kl"}, "unknown method 'kl'; available: sparse, ce, full, reverse_kl"),
        ({"method": None}, "unknown method None"),
        ({"method": ["ce"]}, "unknown method"),
        ({"method": "jensen_shannon"}, "runs the teacher online, but no teacher is given"),
        ({"beta": 0.5}, "'sparse' has no beta"),
        ({"beta": "half"}, "beta must be a number"),
        ({"alpha": 1.5}, r"alpha is 1.5; give .* a number in \[0, 1\]"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": "0.5"}, "alpha"),
        ({"alpha": True}, "alpha"),
        ({"missing_mass": "keep"}, "missing_mass must be one of 'drop'"),
        ({"missing_mass": "keep", "method": "ce"}, "missing_mass must be one of 'drop'"),
        ({"rounds": 0}, "at least one round"),
        ({"rounds": 2.5}, "rounds must be an integer"),
        ({"rounds": True}, "rounds must be an integer"),
        ({"fresh_noise": "no"}, "fresh_noise must be True or False"),
        ({"model_init": None, "model": None}, "give a model, or model_init"),
    ],
)
def test_arguments_are_validated_at_construction(cache, tmp_path, options, said):
    model = options.pop("model", student())
    with pytest.raises(InvalidArgumentError, match=said):
        SparseKDTrainer(model, arguments(tmp_path), train_dataset=CacheDataset(cache), **options)


def test_the_arguments_are_left_as_they_were(cache, tmp_path):
    """The same object may go to another Trainer."""
    args = arguments(tmp_path)
    before = args.to_dict()
    SparseKDTrainer(student(), args, train_dataset=few(cache)).train()
    assert args.to_dict() == before


@pytest.mark.parametrize(("method", "alpha"), [("ce", 0.0), ("sparse", 0.4)])
@pytest.mark.parametrize(
    "changes", [{}, {"final_logit_softcapping": 4.0}], ids=["plain", "softcap"]
)
def test_label_smoothing_is_that_of_torch(cache, tmp_path, method, alpha, changes):
    """A step of plain descent on the labels' part smoothed as F.cross_entropy does."""
    if changes:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        small = tiny_llama().config.to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        config = Gemma2Config(**{n: small[n] for n in names}, num_attention_heads=4, head_dim=8)
        config.num_key_value_heads, config.final_logit_softcapping = 2, 4.0

        def make() -> torch.nn.Module:
            torch.manual_seed(0)
            return Gemma2ForCausalLM(config)
    else:
        make = student
    dataset = CacheDataset(cache)
    order = WindowOrder(len(dataset), 3, dataset.identity.fingerprint)
    batch = collate([dataset[order[0, i]] for i in range(4)])
    plain = make()
    logits, labels = plain(input_ids=batch["input_ids"]).logits, batch["shift_labels"]
    counted = labels != -100
    ce = F.cross_entropy(logits[counted], labels[counted], label_smoothing=0.2)
    kd = -(logits.log_softmax(-1).gather(2, batch["target_ids"]) * batch["target_weights"]).sum(-1)
    share = 1.0 if method == "ce" else alpha
    expected = (1 - share) * kd[counted].mean() + share * ce
    expected.backward()
    rate, model = 0.5, make()
    args = arguments(
        tmp_path,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=rate,
        label_smoothing_factor=0.2,
    )
    trainer = SparseKDTrainer(model, args, train_dataset=dataset, method=method, alpha=alpha)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    stepped = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        moved = parameter.detach() - rate * parameter.grad
        torch.testing.assert_close(stepped[name], moved, rtol=1e-4, atol=1e-5, msg=name)


def test_label_smoothing_without_a_labels_part_says_so(cache, tmp_path):
    with pytest.warns(SparseLogitsWarning, match="label_smoothing_factor"):
        trainer_of(few(cache), tmp_path, label_smoothing_factor=0.1)


def test_model_init_makes_the_student_of_each_training(cache, tmp_path):
    """The same as a student that is given, and again from the beginning at the second call."""
    made = []

    def init() -> torch.nn.Module:
        made.append(student())
        return made[-1]

    options = {"train_dataset": few(cache), "eval_dataset": few(cache, 4)}
    given = SparseKDTrainer(student(), arguments(tmp_path), **options)
    given.train()
    trainer = SparseKDTrainer(None, arguments(tmp_path), model_init=init, **options)
    for _ in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        for name, value in given.model.state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], value), name
    assert len(made) == 3
    assert len({type(model) for model in made}) == 1
    with pytest.raises(ValueError, match="not both"):
        SparseKDTrainer(student(), arguments(tmp_path), model_init=init, **options)


def test_compute_metrics_sees_logits_and_labels_of_transformers(cache, tmp_path):
    """In transformers' convention: labels at their own positions, so predictions are shifted."""
    model, data, seen = student(), few(cache, 5), []

    def accuracy(found: Any) -> dict[str, float]:
        seen.append(found)
        predicted, labels = found.predictions[:, :-1], found.label_ids[:, 1:]
        return {"accuracy": float((predicted == labels)[labels != -100].mean())}

    trainer = trainer_of(
        few(cache),
        tmp_path,
        model,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset={"a": data, "b": data},
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    before = trainer.evaluate()
    windows = collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        logits = model.eval()(input_ids=windows["input_ids"]).logits
    right = (logits.argmax(-1) == windows["shift_labels"])[windows["shift_labels"] != -100]
    assert before["eval_a_accuracy"] == pytest.approx(float(right.float().mean()))
    assert {"eval_a_loss", "eval_a_kd", "eval_b_accuracy"} <= set(before)
    trainer.train()
    assert "eval_b_accuracy" in trainer.state.log_history[-2]
    predicted = trainer_of(data, tmp_path, model).predict(data)
    assert predicted.predictions.shape == logits.shape
    assert np.array_equal(predicted.label_ids, windows["labels"].numpy())


def test_metrics_by_batch(cache, tmp_path):
    counts: list[int] = []

    def count(found: Any, compute_result: bool) -> dict[str, float]:
        counts.append(len(found.label_ids))
        return {"windows": sum(counts)} if compute_result else {}

    args = arguments(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=2)
    trainer = SparseKDTrainer(
        student(), args, train_dataset=few(cache), eval_dataset=few(cache, 5), compute_metrics=count
    )
    assert trainer.evaluate()["eval_windows"] == 5


def test_optimizers_and_a_collator_of_ones_own(cache, tmp_path):
    model, batches = student(), []

    def own(windows: Any) -> dict[str, torch.Tensor]:
        batches.append(len(windows))
        return collate(windows)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = trainer_of(
        few(cache),
        tmp_path,
        model,
        max_steps=2,
        optimizers=(optimizer, schedule),
        data_collator=own,
    )
    trainer.train()
    assert batches == [4, 4]
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(0.3)
    by_class = trainer_of(
        few(cache), tmp_path, max_steps=2, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.3})
    )
    by_class.train()
    for name, value in model.state_dict().items():
        assert torch.equal(by_class.model.state_dict()[name], value), name
    broken = trainer_of(
        few(cache),
        tmp_path,
        data_collator=lambda windows: {"input_ids": torch.zeros(1, 4, dtype=torch.int64)},
    )
    with pytest.raises(InvalidArgumentError, match="no shift_labels"):
        broken.train()


def test_noise_in_embeddings_reaches_the_loss(cache, tmp_path):
    losses = []
    for alpha in (None, 50.0):
        trainer = trainer_of(few(cache), tmp_path, max_steps=1, neftune_noise_alpha=alpha)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] != losses[1]


def test_a_smaller_batch_is_found(cache, tmp_path):
    """After an out-of-memory error the run begins again with half the batch, and its schedule."""
    sizes: list[int] = []

    class Small(SparseKDTrainer):
        def training_step(self, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(model, inputs, *others, **options)

    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1, auto_find_batch_size=True)
    trainer = Small(student(), args, train_dataset=few(cache), rounds=Schedule.constant(3))
    trainer.train()
    assert max(sizes) == 4
    assert sizes[-1] <= 2
    assert trainer._order is not None
    assert trainer._order.pace.steps == trainer.state.max_steps == trainer.state.global_step


def test_the_best_model_is_loaded_at_the_end(cache, tmp_path):
    class Worse(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    model.get_output_embeddings().weight.mul_(30)

    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    trainer = trainer_of(
        few(cache),
        tmp_path,
        max_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        **changes,
        eval_dataset=few(cache, 4),
        callbacks=[Worse()],
    )
    trainer.train()
    assert trainer.state.best_global_step in (1, 2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)
