"""Run a recipe: train a student, and write the model and the metrics of training to one folder.

    OUT/
      recipe.json     the validated recipe, and fingerprints of cache, text and existing student
      model/          the student, in transformers' format
      adapter/        the adapter alone in PEFT's format, if one was trained
      drafter-head.safetensors   the head for a draft vocabulary alone, as in EAGLE-3 checkpoints
      logs/           logs of the trackers in report_to
      run.json        losses by step, wall time; written last, so its presence marks a finished run
      checkpoints/    checkpoints of the Trainer, while the run is unfinished

A finished run is not repeated; an interrupted run resumes from its last checkpoint. The cache is
recognised by fingerprint, so it may be moved.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from sparselogits.allowances import allowing, refuse
from sparselogits.corpus import PackedCorpus
from sparselogits.corruption import Corruption
from sparselogits.data import (
    CacheDataset,
    DraftVocabulary,
    Schedule,
    TextDataset,
    rounds_for_entries,
)
from sparselogits.devices import resolve_training_device
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
    saved_dtype,
)
from sparselogits.train.trainer import SparseKDTrainer
from sparselogits.untrusted import printable
from sparselogits.wording import counted

TrainingProgress = Callable[[int, int, dict[str, float]], None]
"""Function that is called with the steps done, the total steps and the metrics of a log line.

The metrics are empty in a call without a log line.
"""


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run.

    Args:
        out: folder of the run.
        seconds: wall time of training in seconds; if the run was resumed, without the time of
            earlier processes.
        steps: number of optimiser steps.
        curve: (step, training loss in nats) of every log line with a loss.
        label_curve: (step, cross-entropy to the labels in nats) of every log line with this value;
            comparable between methods.
        entries: entries per position with a label at the last log line, after thinning; None for a
            method without cached targets.
        fresh: whether this call trained; False if the run was already finished.
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
    """Properties of a run that are known before its first step.

    Args:
        student: class of the student and origin of its weights.
        parameters: number of parameters in the student.
        trained: number of parameters that are trained.
        dtype: number format of the weights and of the computation.
        saved: number format or quantisation format of the saved student.
        device: device of the student.
        windows: number of windows in the cache.
        steps: number of optimiser steps.
        tokens: number of tokens, including padding, in all steps and ranks if each step is full.
        learning_rate: peak learning rate.
        loss: description of the loss.
        goes_on_from: path of the checkpoint from which the run resumes; None for a new run.
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
    """Train the student of a recipe, or return the result of a finished run.

    Args:
        recipe: the recipe.
        teacher: loaded teacher for a method with the teacher online; None to load the teacher that
            the recipe names.
        device: "cpu" to train without an accelerator, "cuda" for all visible GPUs or, under
            torchrun, one per rank, or "auto" for CUDA if it is available. With None, transformers'
            Trainer chooses the devices.
        progress: function that is called before training, after every step and at every log line.
        announce: function that is called with a description of the run before the first step, but
            not for a finished run.

    Raises:
        RecipeError: If `out` contains a run of another recipe, or a setting is invalid.
        InvalidArgumentError: If settings do not fit the student or the cache, or the device is not
            available or is one of several GPUs.
        TrainingError: If another process trains in `out`, or the loss or a weight is not finite.
        IdentityMismatchError: If the teacher, or the tokenizer, is not that of the cache.
        CacheError: If a cache is missing or damaged.
        TeacherError: If the student or the teacher cannot be loaded.
        MissingDependencyError: If a package that a setting needs is missing.
        StorageError: If the folder cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> result = run(load_recipe(Path("recipe.yaml")))
        >>> result.model_path
        PosixPath('my-run/model')
    """
    device = None if device is None else resolve_training_device(device)
    if os.environ.get("RANK", "0") != "0":
        with allowing(*recipe.allow):
            return _run(recipe, teacher, device, progress, announce)
    if recipe.out.exists() and not recipe.out.is_dir():
        raise RecipeError(
            f"out: {recipe.out} is a file, expected a folder or an unused path. Choose another "
            "out, or move the file"
        )
    with _removed_if_new_and_empty(recipe.out), lock_file(recipe.out / ".training") as lock:
        if lock.held is Held.TAKEN:
            raise TrainingError(
                f"another process is training in {recipe.out}: wait for it, or choose another "
                "folder with --out (out: in the recipe)"
            )
        with _full_disk_reported(recipe.out), allowing(*recipe.allow):
            return _run(recipe, teacher, device, progress, announce)


@contextmanager
def _removed_if_new_and_empty(folder: Path) -> Iterator[None]:
    """Remove a folder that was created in a block if it is empty at the end of the block."""
    new = not folder.exists()
    try:
        yield
    finally:
        if new:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _full_disk_reported(out: Path) -> Iterator[None]:
    """Convert the errors that libraries raise for a full or read-only disk to `StorageError`."""
    try:
        yield
    except Exception as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if isinstance(error, OSError) and error.errno not in full:
            raise
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
    dataset = recipe.dataset()
    if len(dataset) < recipe.per_device_train_batch_size:
        raise RecipeError(
            f"per_device_train_batch_size={recipe.per_device_train_batch_size}, but "
            f"{_caches_in_words(recipe)} contains {counted(len(dataset), 'window')}, fewer than "
            f"one batch. Use a smaller batch (--per-device-train-batch-size {len(dataset)}), or "
            "build more of the cache"
        )
    tokenizer = find_tokenizer(recipe, dataset)
    evaluated = None
    if arguments.eval_strategy != "no":
        corruption = Corruption.of_identity(dataset.identity, tokenizer)
        evaluated = _heldout(recipe, corruption, dataset.draft)
    if tokenizer is None and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"no tokenizer will be saved with the student: {_caches_in_words(recipe)} has none; "
            "name the teacher's with --tokenizer (tokenizer: in the recipe)",
            SparseLogitsWarning,
            stacklevel=2,
        )
    online = METHODS[recipe.method].online
    if online and teacher is None:
        assert recipe.teacher is not None
        teacher = load_teacher(
            recipe.teacher, tokenizer=load_tokenizer(recipe.teacher), dtype=recipe.teacher_dtype
        )
    if online:
        assert teacher is not None
        require_same_teacher(teacher, dataset.identity)
    trainer = SparseKDTrainer(
        _new_student(recipe, dataset, tokenizer),
        arguments,
        train_dataset=dataset,
        eval_dataset=evaluated,
        method=recipe.method,
        alpha=recipe.alpha,
        beta=recipe.beta,
        cosine=recipe.cosine,
        missing_mass=recipe.missing_mass,
        rounds=_thinning(recipe, dataset),
        teacher=teacher if online else None,
        callbacks=[_LogLastStep(), *([] if progress is None else [_Report(progress)])],
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "recipe.json", _json(described | {"made_from": _made_from(dataset, recipe)}))
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
    """Save the untrained student of a recipe as `run` saves a trained student.

    If the recipe quantises the student, the weights are rounded (post-training quantisation).

    Args:
        recipe: the recipe; settings of training appear in the model card only.

    Returns:
        A result with 0 steps.
    """
    dataset = recipe.dataset()
    tokenizer = find_tokenizer(recipe, dataset)
    model = _new_student(recipe, dataset, tokenizer)
    _save(model, recipe, dataset, tokenizer, {"steps": 0})
    return RunResult(recipe.out, 0.0, 0, [], [], None, fresh=True)


def _new_student(recipe: Recipe, dataset: CacheDataset, tokenizer: Any | None) -> nn.Module:
    """Create the untrained student of a recipe, after seeding torch with the recipe's seed."""
    torch.manual_seed(recipe.seed)
    vocab_size = max(cache.identity.vocab_size for cache in dataset.caches)
    model = make_student(recipe.student, vocab_size=vocab_size, dataset=dataset)
    if recipe.student.is_new and tokenizer is not None:
        give_tokens(model, tokenizer)
    if dataset.draft is not None:
        dataset.draft.give_head(model)
    return model


def _save(
    model: nn.Module,
    recipe: Recipe,
    dataset: CacheDataset,
    tokenizer: Any | None,
    metrics: Mapping[str, Any],
) -> None:
    """Save the student of a recipe, with a model card that contains the metrics of the run."""
    quantize = recipe.student.quantize
    save_student(
        model,
        recipe.out,
        tokenizer=tokenizer,
        dtype=saved_dtype(recipe),
        card=model_card(recipe, dataset.identity, metrics),
        draft=dataset.draft,
        quantization=None if quantize is None else quantize.settings(),
    )


def _planned(recipe: Recipe, trainer: SparseKDTrainer, checkpoint: str | None) -> PlannedRun:
    dataset = trainer.train_dataset
    pace = trainer.pace()
    student, parameters = type(trainer.model).__name__, list(trainer.model.parameters())
    if recipe.student.path is not None:
        student = f"{recipe.student.path} ({student})"
    else:
        student += ", a new model with random weights"
    if dataset.draft is not None:
        student += f", with a head for {len(dataset.draft):,} draft ids and the rest"
    method = METHODS[recipe.method]
    loss = method.loss + (", teacher online" if method.online else "")
    if recipe.alpha and method != METHODS["ce"]:
        loss = f"{1 - recipe.alpha:g} x {loss} + {recipe.alpha:g} x {METHODS['ce'].loss}"
    if recipe.cosine:
        loss += f" + {recipe.cosine:g} x (1 - cosine of the last hidden states)"
    computed = "float16" if trainer.args.fp16 else "bfloat16" if trainer.args.bf16 else "float32"
    return PlannedRun(
        student=student,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
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


def _heldout(
    recipe: Recipe, corruption: Corruption | None, draft: DraftVocabulary | None
) -> TextDataset:
    """Return the held-out windows of the first local cache that contains a packed text.

    Raises RecipeError if there are none.
    """
    folders = [Path(cache) / "corpus" for cache in recipe.caches if not is_url(cache)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    heldout = None
    if folder is not None:
        heldout = TextDataset(PackedCorpus.open(folder), corruption=corruption, draft=draft)
    if not heldout:
        raise RecipeError(
            f"eval_strategy needs held-out text, and {_caches_in_words(recipe)} has none: build "
            "the cache with --holdout 0.05 in a folder, or leave eval_strategy out and use "
            "`sparselogits eval` after training"
        )
    return heldout


def _caches_in_words(recipe: Recipe) -> str:
    """Return a noun phrase in the singular that names a recipe's caches, for error messages."""
    first, *others = map(str, recipe.caches)
    return f"the cache at {first}" + (f" (mixed with {', '.join(others)})" if others else "")


def _require_reporters(names: list[str]) -> None:
    """Validate that the trackers of a recipe are known and installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            for kind in get_reporting_integration_callbacks([name]):
                kind()
        except ValueError as error:
            raise RecipeError(
                f"report_to: {error} Name one of these, or leave report_to out"
            ) from error
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
    """Callback that logs the last step whatever `logging_steps` is, so that a run has a loss."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class _Report(TrainerCallback):  # type: ignore[misc]
    """Callback that passes the Trainer's steps and log lines to a progress function."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.progress(state.global_step, state.max_steps, {})

    on_train_begin = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        line = {k: v for k, v in (others.get("logs") or {}).items() if isinstance(v, float)}
        self.progress(state.global_step, state.max_steps, line)


def _training_arguments(recipe: Recipe, device: str | None) -> TrainingArguments:
    """Return the TrainingArguments of a recipe, after validating that they are supported."""
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
        settings["use_cpu"] = torch.device(device).type == "cpu"
    try:
        arguments = TrainingArguments(**settings)
        require_known(arguments, {})
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        if not recipe.model_extra:
            raise
        given = ", ".join(recipe.model_extra)
        raise RecipeError(
            f"TrainingArguments rejects these settings ({printable(given, 200)}): "
            f"{printable(reason_of(error), 400)}. Correct them, or leave them out"
        ) from error
    return arguments


def _finish(
    trainer: SparseKDTrainer, recipe: Recipe, tokenizer: Any | None, seconds: float
) -> RunResult:
    model = trainer.accelerator.unwrap_model(trainer.model)
    history = trainer.state.log_history
    facts: dict[str, Any] = {
        "seconds": seconds,
        "steps": int(trainer.state.global_step),
        "curve": _curve(history, "loss"),
        "label_curve": _curve(history, "ce"),
        "entries": _last(history, "entries"),
    }
    if trainer.is_world_process_zero():
        metrics = {"steps": facts["steps"]} | {
            f"last training {name}": f"{value:.4f} nats per token"
            for name in ("loss", "kd", "ce", "kl")
            if (value := _last(history, name)) is not None
        }
        evaluated = _last(history, "eval_loss")
        if evaluated is not None:
            metrics["held-out loss"] = f"{evaluated:.4f} nats per token"
        _save(model, recipe, trainer.train_dataset, tokenizer, metrics)
        _remove_checkpoints(recipe.out)
        write_whole(recipe.out / "run.json", _json(facts))
    return RunResult(recipe.out, **facts, fresh=True)


def _remove_checkpoints(out: Path) -> None:
    """Move all but the checkpoints from OUT/checkpoints to OUT/logs; remove OUT/checkpoints."""
    for path in (out / "checkpoints").glob("*"):
        if not path.name.startswith("checkpoint-"):
            (out / "logs").mkdir(exist_ok=True)
            shutil.move(path, out / "logs" / path.name)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _last(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((float(line[name]) for line in reversed(history) if name in line), None)


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[name])) for line in history if name in line]


def _described(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as stored in recipe.json, without `allow`, which affects no result."""
    values = recipe.model_dump(mode="json", exclude={"allow"})
    return values | {"learning_rate": recipe.peak_learning_rate}


def _made_from(dataset: CacheDataset, recipe: Recipe) -> dict[str, Any]:
    """Return fingerprints of the cache, the text of its first shard and an existing student."""
    first = dataset.cache.window_index(0)
    made = {
        "cache": dataset.identity.fingerprint,
        "text": dataset.cache.provenance(first).get("corpus"),
    }
    if recipe.student.path is not None:
        made["student"] = files_fingerprint(find_checkpoint(model_named(recipe.student.path)))
    return made


def _read_finished(out: Path, described: dict[str, Any], recipe: Recipe) -> RunResult | None:
    """Return the result of a finished run of this recipe; None if there is no finished run.

    Raises RecipeError if the folder contains a run of another recipe, cache or student, and
    CacheError or TeacherError if the cache or student of an unfinished run cannot be read.
    """
    if not (out / "recipe.json").exists():
        return None
    before = with_new_names(json.loads((out / "recipe.json").read_text()))
    made_from = before.pop("made_from", None)
    # folders may be moved, and keys that are newer than the run have their defaults
    defaults: dict[str, Any] = {"save_dtype": "auto", "tokenizer": None, "cosine": 0.0}
    keys = (described.keys() | before.keys() - Recipe.model_fields.keys()) - {"cache", "out"}
    changed = sorted(k for k in keys if before.get(k, defaults.get(k)) != described.get(k))
    done = (out / "run.json").exists()
    try:
        now = _made_from(recipe.dataset(), recipe)
    except (CacheError, TeacherError):
        if not done or before.get("cache") != described["cache"]:
            raise
        now = made_from  # the cache of a finished run may have been deleted
    if made_from is None:
        changed += ["cache"] if before.get("cache") != described["cache"] else []
    else:  # an older version may have recorded fewer keys
        other = [key for key in made_from if now.get(key) != made_from[key]]
        changed += ["cache"] if {"cache", "text"} & set(other) else []
        changed += ["the weights of the student"] if "student" in other else []
    if changed:
        raise RecipeError(
            f"{out} contains a run of another recipe (different: {', '.join(changed)}); "
            "choose another out, or move the folder"
        )
    if not done:
        return None
    facts = json.loads((out / "run.json").read_text())
    for name in ("curve", "label_curve"):
        facts[name] = [(int(step), float(value)) for step, value in facts.get(name, [])]
    return RunResult(out, **{"entries": None} | facts, fresh=False)


def _last_checkpoint(out: Path) -> str | None:
    """Return the path of the last complete checkpoint, or None."""
    complete = {}
    for folder in (out / "checkpoints").glob("checkpoint-*"):
        with suppress(OSError, ValueError):  # the Trainer writes this file last
            json.loads((folder / "trainer_state.json").read_text())
            complete[int(folder.name.rpartition("-")[2])] = str(folder)
    return complete[max(complete)] if complete else None


def require_same_teacher(teacher: TransformersTeacher, identity: Identity) -> None:
    """Validate that a teacher is the one of a cache and reads the tokens of the cache.

    Raises:
        IdentityMismatchError: the teacher has other weights (a warning if "other-teacher" is
            allowed), or the cache was retokenized.
    """
    if identity.retokenized:
        raise IdentityMismatchError(
            "the cache was retokenized: its tokens are those of a student, and the teacher reads "
            "other tokens. Leave the teacher out, or use the cache from which this one was made"
        )
    mine, theirs = teacher.identity["weights"], identity.teacher.get("weights")
    if mine != theirs:
        error = IdentityMismatchError(
            f"the cache was built with {identity.teacher.get('name')} ({theirs}), and the given "
            f"teacher is {teacher.identity['name']} ({mine}); give the cache's teacher"
        )
        refuse(error, "other-teacher")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
