"""Define `sparselogits train`, which trains a student from a cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    TRAINING,
    Allow,
    DraftIds,
    Json,
    MixtureWeights,
    TrainingDevice,
    parsed_weights,
    print_json,
    print_next,
)
from sparselogits.console import messages, results, stage
from sparselogits.errors import RecipeError, SparseLogitsError
from sparselogits.methods import BATCH_WINDOWS, METHODS, METHODS_IN_WORDS, ONLINE, listed
from sparselogits.untrusted import printable
from sparselogits.wording import abbreviated, counted, parameters, rate

if TYPE_CHECKING:
    from sparselogits.train import PlannedRun, Recipe, RunResult


def train(
    recipe: Path | None = typer.Argument(
        None,
        help="YAML recipe of the run. Options take precedence over the recipe.",
        show_default="options only",
    ),
    student: str | None = MODEL(
        "Existing model to train: a folder (for example from `sparselogits shrink`), a name on the "
        "Hugging Face hub, or `demo`.",
        shown="the recipe's",
    ),
    student_config: str | None = MODEL(
        "New student with random weights: a size (tiny, 3m, 10m, 30m, 100m, 300m, 1b), dimensions "
        "(layers=12,width=768,heads=12), or a config.json.",
        shown="the recipe's",
    ),
    lora: int | None = MODEL(
        "Rank of a LoRA adapter that is trained for --student and merged at the end.",
        shown="no adapter; all weights are trained",
        min=1,
    ),
    method: str | None = MODEL(f"Loss to train with. {METHODS_IN_WORDS}.", shown="sparse"),
    teacher: str | None = MODEL(
        f"Teacher of the cache, for {listed(ONLINE)}: {MODEL_NAMES}.", shown="no teacher"
    ),
    tokenizer: str | None = MODEL(
        "Tokenizer to save with the student: a model folder, GGUF file or hub name.",
        shown="the student's, the cache's or the teacher's",
    ),
    draft_vocabulary: DraftIds = None,
    device: TrainingDevice = "auto",
    cache: list[str] | None = DATA(
        "Folder or URL of the cache to train from. May be repeated, to mix caches of several "
        "teachers over the same text.",
        shown="the recipe's",
    ),
    weights: MixtureWeights = None,
    num_train_epochs: float | None = TRAINING("Passes over the cache.", shown="1"),
    per_device_train_batch_size: int | None = TRAINING(
        "Windows per batch and device.", shown=f"{BATCH_WINDOWS}", min=1
    ),
    gradient_accumulation_steps: int | None = TRAINING(
        "Batches per optimiser step.", shown="1", min=1
    ),
    learning_rate: float | None = TRAINING(
        "Peak learning rate of AdamW.",
        shown="0.001 for a new student, 5e-05 for --student, 0.0002 with --lora",
    ),
    alpha: float | None = TRAINING(
        "Weight of the cross-entropy on labels in the loss, from 0 to 1.", shown="0"
    ),
    beta: float | None = TRAINING(
        "Weight of the teacher in the mixture of jensen_shannon, between 0 and 1.",
        shown=f"{METHODS['jensen_shannon'].beta}",
    ),
    cosine: float | None = TRAINING(
        "Weight of the cosine loss between the last hidden states of student and teacher, with the "
        "teacher online (DistilBERT).",
        shown="0",
    ),
    bf16: bool | None = TRAINING(
        "Compute in bfloat16; the weights stay in float32.",
        None,
        "--bf16/--no-bf16",
        shown="float32",
    ),
    save_steps: int | None = TRAINING(
        "Steps between checkpoints. An interrupted run resumes from the last checkpoint.",
        shown="no checkpoints",
        min=1,
    ),
    seed: int | None = TRAINING("Random seed for initial weights and data order.", shown="0"),
    out: Path | None = OUTPUT("Folder of the run.", shown="the recipe's"),
    save_dtype: str | None = OUTPUT(
        "Data type of the saved student: float32, bfloat16, float16, or auto for that of --student "
        "(float32 for a new student).",
        shown="auto",
    ),
    print_recipe: bool = OUTPUT(
        "Print a commented recipe with all settings and the given options, and exit.",
        False,
        "--print-recipe",
    ),
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Train a student from a cache, as described by a recipe or options; torchrun is supported."""
    from sparselogits.train import leave_process_group, run
    from sparselogits.train.recipe import parse_recipe, read_yaml

    options: dict[str, Any] = {
        "cache": None if cache is None else cache[0] if len(cache) == 1 else cache,
        "weights": parsed_weights(weights),
        "out": None if out is None else str(out),
        "student": _student(student, student_config, lora),
        "method": method,
        "teacher": teacher,
        "tokenizer": tokenizer,
        "draft_vocabulary": None if draft_vocabulary is None else str(draft_vocabulary),
        "num_train_epochs": num_train_epochs,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "alpha": alpha,
        "beta": beta,
        "cosine": cosine,
        "learning_rate": learning_rate,
        "bf16": bf16,
        "save_steps": save_steps,
        "seed": seed,
        "save_dtype": save_dtype,
    }
    given = {k: v for k, v in options.items() if v is not None}
    if print_recipe:
        from sparselogits.train.recipe_text import recipe_text

        typer.echo(recipe_text(given if recipe is None else read_yaml(recipe, given)), nl=False)
        return
    if recipe is not None:
        loaded = parse_recipe(read_yaml(recipe, given), source=str(recipe))
    else:
        loaded = parse_recipe(given, source="the command line")
    if os.environ.get("RANK", "0") != "0":  # under torchrun only the first rank prints
        run(loaded, device=device)
        leave_process_group()
        return
    planned: list[PlannedRun] = []

    def announce(plan: PlannedRun) -> None:
        planned.append(plan)
        messages.print(_plan_table(plan))

    with stage("training", "steps") as update:
        result = run(
            loaded,
            device=device,
            progress=lambda done, total, line: update(
                done, total, f"loss {line['loss']:.3f}" if "loss" in line else ""
            ),
            announce=announce,
        )
    leave_process_group()
    if not result.fresh:
        messages.print("this run is already finished; nothing was changed")
    if as_json:
        facts = {"out": str(result.out), "seconds": result.seconds, "steps": result.steps}
        print_json(facts | {"curve": result.curve})
    else:
        tokens = planned[0].tokens if planned else None
        results().print(_summary(loaded, result, tokens))
        named = [] if loaded.teacher is None else ["--teacher", loaded.teacher]
        shares = [own for own in loaded.weights or () if isinstance(own, float | int)]
        caches = _with_shares(loaded.caches, shares)
        if loaded.draft_vocabulary is not None:
            named += ["--draft-vocabulary", str(loaded.draft_vocabulary)]
        allowed = dict.fromkeys((*loaded.allow, *(allow or ())))
        named += [word for name in allowed for word in ("--allow", name)]
        print_next("eval", result.out, *caches, *_heldout(loaded), *named)


def _with_shares(caches: Sequence[Path | str], shares: Sequence[float]) -> list[Path | str]:
    """Return the options of `eval` for caches, without those whose teacher has the weight 0."""
    used = list(zip(caches, shares, strict=True)) if shares else [(own, 1.0) for own in caches]
    used = [(cache, share) for cache, share in used if share > 0]
    words: list[Path | str] = [word for cache, _ in used for word in ("--cache", cache)]
    if shares and len(used) > 1:
        words += ["--weights", ",".join(f"{share:.12g}" for _, share in used)]
    return words


def _heldout(recipe: Recipe) -> list[str]:
    """Return the option of `eval` that names a text; [] if the cache is gone or has a hold-out."""
    from sparselogits.store import Cache

    try:
        identity = Cache.open(recipe.caches[0]).identity
    except SparseLogitsError:  # a finished run whose cache is gone
        return []
    return [] if identity.packing.get("holdout") else ["--data", "TEXT"]


def _student(path: str | None, config: str | None, lora: int | None) -> dict[str, Any] | None:
    """Return the value of `student` for a recipe; None if no option names a student."""
    from sparselogits.train.recipe import student_of

    if path is not None and config is not None:
        raise RecipeError(
            "--student trains an existing model, --student-config a new one; give one of them"
        )
    if lora is not None and path is None:
        raise RecipeError(
            "--lora trains an adapter for an existing model; name the model with --student"
        )
    if config is not None:
        return student_of(config)
    if path is None:
        return None
    chosen: dict[str, Any] = {"path": path}
    return chosen if lora is None else chosen | {"lora": {"rank": lora}}


def _table(rows: dict[str, str]) -> Table:
    """Return a table of names and values."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    return table


def _plan_table(plan: PlannedRun) -> Table:
    """Return a table of a planned run's properties."""
    size = parameters(plan.parameters)
    if plan.trained != plan.parameters:
        size += f", {abbreviated(plan.trained)} of them trained"
    rows = {
        "student": f"{plan.student}, {size}",
        "data type": f"{plan.dtype} on {plan.device}; saved in {plan.saved}",
        "data": f"{counted(plan.windows, 'window')}, {counted(plan.steps, 'step')}, "
        f"{counted(plan.tokens, 'token')}",
        "loss": plan.loss,
        "learning rate": f"{plan.learning_rate:g} (peak)",
    }
    if plan.goes_on_from is not None:
        rows["resumes from"] = plan.goes_on_from
    return _table(rows)


def _summary(recipe: Recipe, result: RunResult, tokens: int | None) -> Table:
    """Return a table of a run's results; `tokens` is the number trained on, None if unknown."""
    from sparselogits.train.saving import DRAFTER_HEAD

    rows = {"student": str(result.model_path), "steps": counted(result.steps, "step")}
    rows["steps"] += f" in {result.seconds:,.0f} s"
    if tokens is not None and result.seconds > 0 and result.fresh:
        rows["steps"] += f", {rate(tokens / result.seconds, 'tokens')}"
    for name, curve in (("loss", result.curve), ("loss on labels", result.label_curve)):
        if curve:
            first, last = curve[0], curve[-1]
            begin = f"{first[1]:.3f} at step {first[0]}"
            rows[name] = f"{last[1]:.3f} nats per token at step {last[0]} ({begin})"
    if recipe.student.lora is not None:
        rows["adapter"] = str(result.out / "adapter")
    if recipe.draft_vocabulary is not None:
        rows["head"] = str(result.out / DRAFTER_HEAD)
    return _table(rows)
