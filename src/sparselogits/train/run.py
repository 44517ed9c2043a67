"""A recipe -> a trained student, its curve and its figures, in one directory.

    OUT/
      recipe.json     the recipe, as validated, and which cache it was carried out on
      model/          the student, as transformers and others load it
      adapter/        where an adapter was trained: the adapter alone, in PEFT's format
      logs/           what report_to asked for
      run.json        losses by step, seconds; written last, so a run without it is unfinished
      checkpoints/    the Trainer's, while the run is unfinished

A run that is finished is not repeated; one that was interrupted goes on from its last checkpoint. A
cache that was moved is recognised by what it was made from.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from sparselogits.allowances import allowing, refuse
from sparselogits.corpus import PackedCorpus
from sparselogits.data import CacheDataset, Schedule, TextDataset, rounds_for_entries
from sparselogits.errors import (
    CacheError,
    IdentityMismatchError,
    MissingDependencyError,
    RecipeError,
    SparseLogitsWarning,
    TeacherError,
    TrainingError,
    reason_of,
)
from sparselogits.files import disk_errors, write_whole
from sparselogits.identity import Identity
from sparselogits.locks import Held, lock_file
from sparselogits.methods import METHODS
from sparselogits.store.storage.location import is_url
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.checkpoint import files_fingerprint, find_checkpoint
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.loading import load_tokenizer
from sparselogits.train.arguments import require_known
from sparselogits.train.recipe import Recipe, with_new_names
from sparselogits.train.saving import model_card, save_student
from sparselogits.train.student import (
    find_tokenizer,
    give_tokens,
    make_student,
    parameters_of,
    saved_dtype,
)
from sparselogits.train.trainer import SparseKDTrainer
from sparselogits.untrusted import printable

TrainingProgress = Callable[[int, int, dict[str, float]], None]
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


@dataclass(frozen=True)
class PlannedRun:
    """What a run is about to do.

    Args:
        student: class of the student and where its weights come from.
        parameters: of the student.
        trained: those of them that are trained.
        dtype: number format of the weights and of the computation.
        saved: number format, or format of quantisation, of the saved student.
        device: where it is trained.
        windows: windows of the cache.
        steps: optimiser steps.
        tokens: tokens that the student reads, over all steps and ranks.
        learning_rate: peak learning rate.
        loss: what is minimised.
        goes_on_from: checkpoint of a run that was interrupted.
    """

    student: str
    parameters: int
    trained: int
    dtype: str
    saved: str
    device: str
    windows: int
    steps: int
    tokens: int
    learning_rate: float
    loss: str
    goes_on_from: str | None


def run(
    recipe: Recipe,
    *,
    teacher: TransformersTeacher | None = None,
    device: str | None = None,
    progress: TrainingProgress | None = None,
    announce: Callable[[PlannedRun], None] | None = None,
) -> RunResult:
    """Carry out a recipe, or find that it has been.

    Args:
        recipe: what to do.
        teacher: for methods with one online, if it is loaded already; else the recipe's is.
        device: where to train; the Trainer's choice when None, "cpu" to stay off accelerators.
        progress: called at every log line.
        announce: called before the first step with what will be done.

    Raises:
        RecipeError: when `out` holds a run of another recipe, or a setting that cannot be.
        TrainingError: when another process trains in `out`, or the loss is not finite.
        IdentityMismatchError: when the teacher is not the one the cache was made by.
        StorageError: when the folder cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        with allowing(*recipe.allow):
            return _run(recipe, teacher, device, progress, announce)
    if recipe.out.exists() and not recipe.out.is_dir():
        raise RecipeError(
            f"out: {recipe.out} is no folder, and a run makes one: a file is in the way. Choose "
            "another out, or move the file"
        )
    with lock_file(recipe.out / ".training") as lock:
        if lock.held is Held.TAKEN:
            raise TrainingError(
                f"another process is training in {recipe.out}: wait for it, or choose another "
                "folder with --out (out: in the recipe)"
            )
        with _full_disk_said(recipe.out), allowing(*recipe.allow):
            return _run(recipe, teacher, device, progress, announce)


@contextmanager
def _full_disk_said(out: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises, deep in a library, into a `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        with disk_errors(out):
            raise
    except Exception:
        with disk_errors(out):
            raise


def _run(
    recipe: Recipe,
    teacher: TransformersTeacher | None,
    device: str | None,
    progress: TrainingProgress | None,
    announce: Callable[[PlannedRun], None] | None,
) -> RunResult:
    out = recipe.out
    described = _described(recipe)
    finished = _read_finished(out, described, recipe)
    if finished is not None:
        return finished
    arguments = _training_arguments(recipe, device)
    _require_reporters(recipe.report_to)
    dataset = CacheDataset(recipe.cache, seed=recipe.seed)
    if len(dataset) < recipe.per_device_train_batch_size:
        raise RecipeError(
            f"per_device_train_batch_size={recipe.per_device_train_batch_size}, but "
            f"{recipe.cache} holds {len(dataset)} windows, less than one batch. Use a smaller "
            "batch, or build more of the cache"
        )
    evaluated = _heldout(recipe) if arguments.eval_strategy != "no" else None
    tokenizer = find_tokenizer(recipe, dataset)
    if tokenizer is None and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"no tokenizer will be saved with the student: the cache at {recipe.cache} keeps none; "
            "name the teacher's with --tokenizer (tokenizer: in the recipe)",
            SparseLogitsWarning,
            stacklevel=2,
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "recipe.json", _json(described | {"made_from": _made_from(dataset, recipe)}))
    online = METHODS[recipe.method].online
    if online and teacher is None:
        assert recipe.teacher is not None
        teacher = load_teacher(
            recipe.teacher, tokenizer=load_tokenizer(recipe.teacher), dtype=recipe.teacher_dtype
        )
    if online:
        assert teacher is not None
        require_same_teacher(teacher, dataset.identity)
    torch.manual_seed(recipe.seed)
    model = make_student(recipe.student, vocab_size=dataset.identity.vocab_size, dataset=dataset)
    if recipe.student.is_new and tokenizer is not None:
        give_tokens(model, tokenizer)
    trainer = SparseKDTrainer(
        model,
        arguments,
        train_dataset=dataset,
        eval_dataset=evaluated,
        method=recipe.method,
        alpha=recipe.alpha,
        beta=recipe.beta,
        missing_mass=recipe.missing_mass,
        rounds=_thinning(recipe, dataset),
        teacher=teacher if online else None,
        callbacks=[_LogLastStep(), *([] if progress is None else [_Report(progress)])],
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(out / "logs")
    checkpoint = _last_checkpoint(out)
    if announce is not None:
        announce(_planned(recipe, trainer, checkpoint))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    return _finish(trainer, recipe, tokenizer, seconds)


def save_untrained(recipe: Recipe) -> RunResult:
    """Save a recipe's student as it is before the first step, in the form a run saves it.

    A quantised student is rounded as after training, so this is post-training quantisation.

    Args:
        recipe: its student, cache, seed and dtype are used; the rest says nothing here.

    Returns:
        A result of no steps; the model lies where `run` would have put the trained one.
    """
    dataset = CacheDataset(recipe.cache, seed=recipe.seed)
    tokenizer = find_tokenizer(recipe, dataset)
    torch.manual_seed(recipe.seed)
    model = make_student(recipe.student, vocab_size=dataset.identity.vocab_size, dataset=dataset)
    if recipe.student.is_new and tokenizer is not None:
        give_tokens(model, tokenizer)
    quantize = recipe.student.quantize
    save_student(
        model,
        recipe.out,
        tokenizer=tokenizer,
        dtype=saved_dtype(recipe),
        card=model_card(recipe, dataset.identity, {"steps": 0}),
        quantization=None if quantize is None else quantize.settings(),
    )
    return RunResult(recipe.out, 0.0, 0, [], [], None, fresh=True)


def _planned(recipe: Recipe, trainer: SparseKDTrainer, checkpoint: str | None) -> PlannedRun:
    dataset = trainer.train_dataset
    pace = trainer.pace()
    student = type(trainer.model).__name__
    if recipe.student.path is not None:
        student = f"{recipe.student.path} ({student})"
    else:
        student += ", new with random weights"
    method = METHODS[recipe.method]
    loss = method.loss + (", teacher online" if method.online else "")
    if recipe.alpha and method != METHODS["ce"]:
        loss = f"{1 - recipe.alpha:g} x {loss} + {recipe.alpha:g} x {METHODS['ce'].loss}"
    computed = "float16" if trainer.args.fp16 else "bfloat16" if trainer.args.bf16 else "float32"
    return PlannedRun(
        student=student,
        **parameters_of(trainer.model),
        dtype=f"float32 weights, computed in {computed}",
        saved=str(saved_dtype(recipe)).removeprefix("torch.")
        if recipe.student.quantize is None
        else recipe.student.quantize.settings().described,
        device=str(trainer.args.device),
        windows=len(dataset),
        steps=pace.steps,
        tokens=pace.steps * pace.windows_per_step * dataset.identity.window_length,
        learning_rate=recipe.peak_learning_rate,
        loss=loss,
        goes_on_from=checkpoint,
    )


def _heldout(recipe: Recipe) -> TextDataset:
    """The windows that were held out when the cache was built."""
    folder = Path(str(recipe.cache)) / "corpus"
    heldout = None
    if not is_url(recipe.cache) and folder.is_dir():
        heldout = TextDataset(PackedCorpus.open(folder))
    if not heldout:
        raise RecipeError(
            f"eval_strategy needs held-out text, and {recipe.cache} has none here: build "
            "the cache with --holdout 0.05 in a folder, or leave eval_strategy out and use "
            "`sparselogits eval` afterwards"
        )
    return heldout


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


class _LogLastStep(TrainerCallback):  # type: ignore[misc]
    """Logs the last step, whatever the interval: a short run has a loss to show."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class _Report(TrainerCallback):  # type: ignore[misc]
    """Hands the Trainer's log lines to a progress bar."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.progress(state.global_step, state.max_steps, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.progress(state.global_step, state.max_steps, {})

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        line = {k: v for k, v in (others.get("logs") or {}).items() if isinstance(v, float)}
        self.progress(state.global_step, state.max_steps, line)


def _training_arguments(recipe: Recipe, device: str | None) -> TrainingArguments:
    """Return the Trainer's arguments.

    Raises:
        RecipeError: a value that TrainingArguments or `SparseKDTrainer` refuses.
    """
    settings: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "logging_nan_inf_filter": False,
        "save_strategy": "no" if recipe.save_steps is None else "steps",
        "save_total_limit": 2,
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        **recipe.training_arguments,
        "output_dir": str(recipe.out / "checkpoints"),
        "learning_rate": recipe.peak_learning_rate,
        "save_steps": recipe.save_steps or 500,
        "seed": recipe.seed,
        "report_to": recipe.report_to or "none",
    }
    if device is not None:
        settings["use_cpu"] = device == "cpu"
    try:
        arguments = TrainingArguments(**settings)
        require_known(arguments, {})
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        if not recipe.model_extra:
            raise
        given = ", ".join(recipe.model_extra)
        raise RecipeError(
            f"TrainingArguments refuses these settings ({printable(given, 200)}): "
            f"{printable(reason_of(error), 400)}"
        ) from error
    return arguments


def _finish(
    trainer: SparseKDTrainer, recipe: Recipe, tokenizer: Any | None, seconds: float
) -> RunResult:
    out, identity = recipe.out, trainer.train_dataset.identity
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
        figures = {"steps": facts["steps"]} | {
            f"last training {name}": f"{value:.4f} nats per token"
            for name in ("loss", "kd", "ce", "kl")
            if (value := _last(history, name)) is not None
        }
        evaluated = _last(history, "eval_loss")
        if evaluated is not None:
            figures["held-out loss"] = f"{evaluated:.4f} nats per token"
        card = model_card(recipe, identity, figures)
        quantize = recipe.student.quantize
        save_student(
            model,
            out,
            tokenizer=tokenizer,
            dtype=saved_dtype(recipe),
            card=card,
            quantization=None if quantize is None else quantize.settings(),
        )
        _keep_logs(out)
        write_whole(out / "run.json", _json(facts))
    return RunResult(out, **facts, fresh=True)


def _keep_logs(out: Path) -> None:
    """Remove the checkpoints of a finished run, and move what loggers wrote beside them."""
    for left in (out / "checkpoints").glob("*"):
        if left.name.startswith("checkpoint-"):
            shutil.rmtree(left, ignore_errors=True)
        else:
            (out / "logs").mkdir(exist_ok=True)
            shutil.move(left, out / "logs" / left.name)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _last(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((float(line[name]) for line in reversed(history) if name in line), None)


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[name])) for line in history if name in line]


def _described(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values as recipe.json keeps them, with the learning rate that is used."""
    # what was allowed changes nothing about a run that went on
    values = recipe.model_dump(mode="json", exclude={"allow"})
    return values | {"learning_rate": recipe.peak_learning_rate}


def _made_from(dataset: CacheDataset, recipe: Recipe) -> dict[str, Any]:
    """Say which cache and student these are, wherever they lie.

    The cache by its identity and the text of its first shard, an existing student by its files.
    """
    first = dataset.cache.window_index(0)
    made = {
        "cache": dataset.identity.fingerprint,
        "text": dataset.cache.provenance(first).get("corpus"),
    }
    if recipe.student.path is not None:
        made["student"] = files_fingerprint(find_checkpoint(model_named(recipe.student.path)))
    return made


def _read_finished(out: Path, described: dict[str, Any], recipe: Recipe) -> RunResult | None:
    """Return the result that is there already, None where there is none yet.

    Raises:
        RecipeError: the folder holds a run of another recipe, or from another cache.
    """
    if not (out / "recipe.json").exists():
        return None
    before = with_new_names(json.loads((out / "recipe.json").read_text()))
    made_from = before.pop("made_from", None)
    # folders may be moved, and keys that are newer than the run have their defaults
    defaults: dict[str, Any] = {"save_dtype": "auto", "tokenizer": None}
    keys = (described.keys() | before.keys() - Recipe.model_fields.keys()) - {"cache", "out"}
    changed = sorted(k for k in keys if before.get(k, defaults.get(k)) != described.get(k))
    done = (out / "run.json").exists()
    try:
        now = _made_from(CacheDataset(recipe.cache, seed=recipe.seed), recipe)
    except (CacheError, TeacherError):
        if not done or before.get("cache") != described["cache"]:
            raise
        now = made_from  # a finished run outlives its cache
    if made_from is None:
        changed += ["cache"] if before.get("cache") != described["cache"] else []
    else:  # keys that were not recorded then say nothing
        other = [key for key in made_from if now.get(key) != made_from[key]]
        changed += ["cache"] if {"cache", "text"} & set(other) else []
        changed += ["the weights of the student"] if "student" in other else []
    if changed:
        raise RecipeError(
            f"{out} holds a run of another recipe (they differ in {', '.join(changed)}); "
            "choose another out, or move that folder away"
        )
    if not done:
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
    mine, theirs = teacher.identity["weights"], identity.teacher.get("weights")
    if mine != theirs:
        error = IdentityMismatchError(
            f"the cache was made by {identity.teacher.get('name')} ({theirs}); the teacher given "
            f"is {teacher.identity['name']} ({mine}); give the cache's own teacher"
        )
        refuse(error, "other-teacher")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
