"""A recipe -> a trained student, its curve and its figures, in one directory.

    OUT/
      recipe.json     the recipe, as validated
      model/          the student (safetensors, configuration)
      run.json        losses by step, seconds; written last, so a run without it is unfinished
      checkpoints/    the Trainer's, while the run is unfinished

A run that is finished is not repeated; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from sparselogits.data import CacheDataset, Schedule, rounds_for_entries
from sparselogits.errors import (
    IdentityMismatchError,
    MissingDependencyError,
    RecipeError,
    TeacherError,
)
from sparselogits.files import write_whole
from sparselogits.identity import Identity
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.loading import load_causal_lm, load_tokenizer
from sparselogits.train.objective import DIVERGENCES
from sparselogits.train.recipe import Recipe, Student
from sparselogits.train.trainer import SparseKDTrainer

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with steps done, steps in all, and the latest log line."""


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        out: its directory.
        seconds: wall time of training; of this process alone where the run was resumed.
        steps: optimiser steps.
        curve: (step, training loss in nats) at every log line.
        label_curve: likewise the labels' cross-entropy, which is comparable between methods.
        entries: stored entries a position at the last log line, after thinning; None where the
            method uses none.
        fresh: False where the run had been finished before.
    """

    out: Path
    seconds: float
    steps: int
    curve: list[tuple[int, float]]
    label_curve: list[tuple[int, float]]
    entries: float | None
    fresh: bool

    @property
    def model_path(self) -> Path:
        """Folder of the trained student."""
        return self.out / "model"


def run(
    recipe: Recipe,
    *,
    teacher: TransformersTeacher | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Carry out a recipe, or find that it has been.

    Args:
        recipe: what to do.
        teacher: for methods with one online, if it is loaded already; else the recipe's is.
        device: where to train; the Trainer's choice when None, "cpu" to stay off accelerators.
        progress: called at every log line.

    Raises:
        RecipeError: when `out` holds a run of another recipe.
        IdentityMismatchError: when the teacher is not the one the cache was made by.
    """
    out = recipe.out
    described = recipe.model_dump(mode="json")
    finished = _read_finished(out, described)
    if finished is not None:
        return finished
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "recipe.json", _json(described))
    dataset = CacheDataset(recipe.cache, seed=recipe.seed)
    if len(dataset) < recipe.batch_windows:
        raise RecipeError(
            f"batch_windows={recipe.batch_windows}, but {recipe.cache} holds {len(dataset)} "
            "windows: not one whole batch. Take fewer a batch, or build more of the cache"
        )
    _require_reporters(recipe.report_to)
    online = recipe.method in DIVERGENCES
    if online and teacher is None:
        assert recipe.teacher is not None
        tokenizer = load_tokenizer(recipe.teacher)
        teacher = load_teacher(recipe.teacher, tokenizer=tokenizer, dtype=recipe.teacher_dtype)
    if online:
        assert teacher is not None
        require_same_teacher(teacher, dataset.identity)
    torch.manual_seed(recipe.seed)
    model = make_student(recipe.student, vocab_size=dataset.identity.vocab_size, dataset=dataset)
    trainer = SparseKDTrainer(
        model,
        _training_arguments(recipe, device),
        train_dataset=dataset,
        method=recipe.method,
        alpha=recipe.alpha,
        missing_mass=recipe.missing_mass,
        rounds=_thinning(recipe, dataset),
        teacher=teacher if online else None,
        callbacks=[] if progress is None else [_Report(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=_last_checkpoint(out))
    seconds = time.perf_counter() - started
    return _finish(trainer, out, seconds)


def make_student(student: Student, *, vocab_size: int, dataset: CacheDataset) -> nn.Module:
    """The student a recipe describes; a new one takes its weights from torch's current seed.

    Raises:
        TeacherError: when a student to go on from cannot be loaded.
    """
    if student.path is not None:
        model = load_causal_lm(student.path, dtype="float32")
        _require_same_tokenizer(student.path, dataset)
        return model
    width = student.hidden_size
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=student.intermediate_size or max(1, round(width * 8 / 3 / 8)) * 8,
        num_hidden_layers=student.layers,
        num_attention_heads=student.heads,
        num_key_value_heads=student.kv_heads or student.heads,
        max_position_embeddings=dataset.identity.window_length,
        tie_word_embeddings=student.tied,
        bos_token_id=None,
        eos_token_id=dataset.identity.packing["separator_id"],
        pad_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def _require_reporters(names: list[str]) -> None:
    """Insist that the Trainer can log to where the recipe says, before it does any work."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            for kind in get_reporting_integration_callbacks([name]):
                kind()
        except ValueError as error:
            raise RecipeError(f"report_to: {error}") from error
        except (RuntimeError, ImportError) as error:
            raise MissingDependencyError(
                f"report_to: {name} is not installed: pip install {name}, or leave it out"
            ) from error


def _thinning(recipe: Recipe, dataset: CacheDataset) -> Schedule | None:
    wanted = recipe.thinning
    if wanted is None:
        return None
    rounds = wanted.rounds or 1
    if wanted.budget is not None:
        rounds = rounds_for_entries(dataset, wanted.budget)
    return wanted.resolved(rounds)


class _Report(TrainerCallback):  # type: ignore[misc]
    """Hands the Trainer's log lines to a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.progress(state.global_step, state.max_steps, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.progress(state.global_step, state.max_steps, {})

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        line = {k: v for k, v in (others.get("logs") or {}).items() if isinstance(v, float)}
        self.progress(state.global_step, state.max_steps, line)


def _training_arguments(recipe: Recipe, device: str | None) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(recipe.out / "checkpoints"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_windows,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        lr_scheduler_type="cosine",
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bfloat16",
        use_cpu=device == "cpu",
        seed=recipe.seed,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="no" if recipe.save_steps is None else "steps",
        save_steps=recipe.save_steps or 500,
        save_total_limit=2,
        report_to=recipe.report_to or "none",
        disable_tqdm=True,
        dataloader_drop_last=True,
    )


def _finish(trainer: SparseKDTrainer, out: Path, seconds: float) -> RunResult:
    model = trainer.accelerator.unwrap_model(trainer.model)
    history = trainer.state.log_history
    facts: dict[str, Any] = {
        "seconds": seconds,
        "steps": int(trainer.state.global_step),
        "curve": _curve(history, "loss"),
        "label_curve": _curve(history, "ce"),
        "entries": next((line["entries"] for line in reversed(history) if "entries" in line), None),
    }
    if trainer.is_world_process_zero():
        model.save_pretrained(out / "model")
        write_whole(out / "run.json", _json(facts))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return RunResult(out, **facts, fresh=True)


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[name])) for line in history if name in line]


def _read_finished(out: Path, described: dict[str, Any]) -> RunResult | None:
    if not (out / "recipe.json").exists():
        return None
    before = json.loads((out / "recipe.json").read_text())
    if before != described:
        changed = sorted(k for k in {*before, *described} if before.get(k) != described.get(k))
        raise RecipeError(
            f"{out} holds a run of another recipe (they differ in {', '.join(changed)}); "
            "choose another out, or move that folder away"
        )
    if not (out / "run.json").exists():
        return None
    facts = json.loads((out / "run.json").read_text())
    for name in ("curve", "label_curve"):
        facts[name] = [(int(step), float(value)) for step, value in facts.get(name, [])]
    return RunResult(out, **{"entries": None} | facts, fresh=False)


def _last_checkpoint(out: Path) -> str | None:
    """The last one that is whole: the Trainer writes its state last, and a kill may come before."""
    found = [f for f in (out / "checkpoints").glob("checkpoint-*") if _is_whole(f)]
    last = max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    return None if last is None else str(last)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def require_same_teacher(teacher: TransformersTeacher, identity: Identity) -> None:
    """Insist that a cache was made by this teacher.

    Raises:
        IdentityMismatchError: naming both.
    """
    mine, theirs = teacher.identity["weights"], identity.teacher["weights"]
    if mine != theirs:
        raise IdentityMismatchError(
            f"the cache was made by {identity.teacher['name']} ({theirs}), the teacher given is "
            f"{teacher.identity['name']} ({mine}); give the cache's own teacher"
        )


def _require_same_tokenizer(path: str, dataset: CacheDataset) -> None:
    from sparselogits.corpus import require_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except TeacherError:
        return  # a student without a tokenizer takes the cache's
    expected, recorded = dataset.identity.tokenizer, dataset.cache.recorded_tokenizer()
    require_tokenizer(
        tokenizer, expected, recorded, whose=f"the tokenizer of the student at {path}"
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
