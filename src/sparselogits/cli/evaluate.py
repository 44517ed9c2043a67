"""`sparselogits eval`: a student on held-out text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparselogits.cli.models import load_own_teacher, load_student
from sparselogits.cli.options import (
    DATA,
    MEASUREMENTS,
    MODEL,
    MODEL_NAMES,
    Device,
    Dtype,
    Json,
    device_named,
    say_json,
    stdout,
)
from sparselogits.console import stage
from sparselogits.errors import InvalidArgumentError, TeacherError

if TYPE_CHECKING:
    from torch import nn

    from sparselogits.corpus import PackedCorpus
    from sparselogits.evaluate import Estimate, HeldOut
    from sparselogits.evaluate.tasks import TaskScore
    from sparselogits.store import Cache


def evaluate_command(
    student: Annotated[
        str,
        typer.Argument(help="Student to measure: a run's folder, a model folder, or a hub name."),
    ],
    *,
    teacher: Annotated[
        str | None,
        typer.Option(
            help=f"Teacher of the cache, for KL, agreement and acceptance: {MODEL_NAMES}.",
            show_default="no teacher: loss and calibration only",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cache: Annotated[
        str,
        typer.Option(
            help="Folder or URL of the cache whose held-out text is read.", rich_help_panel=DATA
        ),
    ],
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Folder of another packed corpus to read the held-out text from.",
            show_default="the cache's own",
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of windows to read.",
            show_default="all held-out windows",
            rich_help_panel=DATA,
        ),
    ] = None,
    draft: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also measure speculative decoding: the student drafts this many tokens at a time "
            "and the teacher verifies them. 0 leaves it out.",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = 0,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Also score a zero-shot task: continuation, last_word, agreement, or any task of "
            "lm-eval. May be repeated.",
            show_default="no tasks",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of samples per task.",
            show_default="200",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer for --tasks: a model folder, GGUF file or hub name.",
            show_default="the teacher's, else the student's",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    resamples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Bootstrap resamples of the windows, for the intervals.",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = 1000,
    seed: Annotated[
        int,
        typer.Option(help="Random seed for resampling and drafting.", rich_help_panel=MEASUREMENTS),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Measure a student on held-out text: loss, calibration, and distance to its teacher."""
    from sparselogits.build import fetch_texts
    from sparselogits.corpus import PackedCorpus
    from sparselogits.data import TextDataset
    from sparselogits.evaluate import draft_from_prefixes, evaluate
    from sparselogits.store import Cache

    if draft and teacher is None:
        raise InvalidArgumentError("--draft needs --teacher, which verifies what is drafted")
    opened = Cache.open(cache)
    words = None
    if tasks:
        words = _tokenizer(tokenizer or teacher or student, opened)
    windows = TextDataset(PackedCorpus.open(corpus or fetch_texts(cache) / "corpus"), limit=limit)
    where = device_named(device)
    model = load_student(student, where)
    engine = None
    if teacher is not None:
        engine = load_own_teacher(teacher, opened.identity, where, dtype=dtype)
    with stage("evaluating", "windows") as update:
        found = evaluate(
            {"student": model}, windows, engine, resamples=resamples, seed=seed, progress=update
        )
    drafting = None
    if draft and engine is not None:
        with stage("drafting", "windows") as update:
            drafting = draft_from_prefixes(
                model, windows, engine, draft=draft, seed=seed, progress=update
            )
    scores: dict[str, list[TaskScore]] = {}
    if tasks:
        models = {"student": model} | ({} if engine is None else {"teacher": engine.model})
        scores = _scores(models, words, windows.corpus, tasks, task_limit)
    if as_json:
        rows = {name: row.to_json() for name, row in found.items()}
        for name, own in scores.items():
            rows[name]["tasks"] = [asdict(score) for score in own]
        if drafting is not None:
            rows["student"]["drafting"] = drafting.to_json()
        say_json(rows)
        return
    stdout().print(_table(found))
    if drafting is not None:
        stdout().print(
            f"drafting {draft} at a time: {drafting.acceptance:.1%} of {drafting.verified:,} "
            f"verified tokens accepted (expected there {drafting.expected:.1%}, standard error "
            f"{drafting.error:.1%}), {drafting.tokens_per_pass:.2f} tokens a pass of the teacher"
        )
    if scores:
        stdout().print(_task_table(scores))
    facts = opened.statistics()
    measured = found["student"]
    stdout().print(
        f"cache: {facts.entries_per_position:.2f} entries and {facts.bytes_per_token:.2f} bytes a "
        f"token; held-out: {measured.positions:,} positions in "
        f"{len(measured.positions_by_window):,} windows; from, to: 95 % bootstrap over windows"
    )


_Shown = Callable[[float], str]
_COLUMNS: tuple[tuple[str, str, _Shown], ...] = (
    ("loss", "loss", lambda x: f"{x:.4f}"),
    ("perplexity", "loss", lambda x: f"{math.exp(min(x, 700.0)):.2f}"),
    ("KL", "kl", lambda x: f"{x:.4f}"),
    ("ECE %", "ece", lambda x: f"{100 * x:.2f}"),
    ("acceptance %", "acceptance", lambda x: f"{100 * x:.1f}"),
    ("agreement %", "agreement", lambda x: f"{100 * x:.1f}"),
)


def _table(found: dict[str, HeldOut]) -> Table:
    """A line for every model, and below it the ends of its intervals."""
    table = Table("", *(title for title, _, _ in _COLUMNS))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in found.items():
        estimates = [(row.intervals.get(figure), shown) for _, figure, shown in _COLUMNS]
        for label, end in ((name, "mean"), ("  from", "low"), ("  to", "high")):
            cells = [_cell(estimate, end, shown) for estimate, shown in estimates]
            table.add_row(label, *cells, style="" if label == name else "dim")
    return table


def _cell(estimate: Estimate | None, end: str, shown: _Shown) -> str:
    value = None if estimate is None else getattr(estimate, end)
    return "-" if value is None else shown(value)


def _tokenizer(name: str, cache: Cache) -> Any:
    """The tokenizer for the tasks' text, which has to be the one the cache was made with."""
    from sparselogits.corpus import require_tokenizer
    from sparselogits.evaluate.tasks import require_lm_eval
    from sparselogits.teacher.loading import load_tokenizer

    require_lm_eval()
    trained = Path(name) / "model"
    try:
        found = load_tokenizer(str(trained) if trained.is_dir() else name)
    except TeacherError as error:
        raise TeacherError(
            f"--tasks needs the tokenizer, and {name} has none that can be read; name the "
            "teacher's folder with --teacher or --tokenizer"
        ) from error
    require_tokenizer(found, cache.identity.tokenizer, cache.recorded_tokenizer())
    return found


def _scores(
    models: dict[str, nn.Module],
    tokenizer: Any,
    corpus: PackedCorpus,
    tasks: Sequence[str],
    limit: int | None,
) -> dict[str, list[TaskScore]]:
    from sparselogits.evaluate.tasks import LIMIT, LOCAL_TASKS, run_tasks, write_tasks

    limit = limit or LIMIT
    local = [name for name in tasks if name in LOCAL_TASKS]
    with tempfile.TemporaryDirectory(prefix="sparselogits-tasks-") as data:
        write_tasks(Path(data), local, corpus=corpus, tokenizer=tokenizer, count=limit)
        found = {}
        for name, model in models.items():
            with stage(f"tasks, {name}", "sequences") as update:
                found[name] = run_tasks(
                    model,
                    tokenizer,
                    tasks,
                    limit=limit,
                    data=Path(data),
                    prefix_token_id=corpus.packing.first_id,
                    progress=lambda done, total, _: update(done, total),
                )
    return found


def _task_table(scores: dict[str, list[TaskScore]]) -> Table:
    """A line for every figure of every task; ± is its standard error over the samples."""
    table = Table("task", "figure", "samples", *scores)
    for column in table.columns[2:]:
        column.justify = "right"
    for same in zip(*scores.values(), strict=True):
        cells = [
            f"{own.value:.4g}" + ("" if own.stderr is None else f" ± {own.stderr:.2g}")
            for own in same
        ]
        table.add_row(same[0].task, same[0].metric, f"{same[0].samples:,}", *cells)
    return table
