"""Define `sparselogits eval`, which measures a student on held-out text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import MARKDOWN
from rich.table import Table

from sparselogits.cli.evaluated_text import OtherText, text_to_evaluate, tokenizer_of
from sparselogits.cli.models import load_cache_teachers, load_student, shares_of_teachers
from sparselogits.cli.options import (
    DATA,
    MEASUREMENTS,
    MODEL,
    MODEL_NAMES,
    NUMBERS_OF_MIXTURE,
    Allow,
    Device,
    DraftIds,
    Dtype,
    JoinRows,
    Json,
    SeparatorId,
    TokenizedBy,
    given_words,
    parsed_weights,
    print_json,
    print_next,
)
from sparselogits.console import results, stage
from sparselogits.devices import resolve_device
from sparselogits.errors import InvalidArgumentError
from sparselogits.wording import counted

if TYPE_CHECKING:
    from torch import nn

    from sparselogits.corpus import PackedCorpus
    from sparselogits.evaluate import Estimate, HeldOut
    from sparselogits.lab.tasks import TaskScore


def evaluate_command(
    context: typer.Context,
    student: str = typer.Argument(
        help="Student to evaluate: the folder of a run, a model folder or a hub name."
    ),
    teacher: list[str] | None = MODEL(
        f"Teacher of the cache, for KL, agreement and acceptance: {MODEL_NAMES}. May be repeated, "
        "once per --cache.",
        shown="none; loss and calibration only",
    ),
    draft_vocabulary: DraftIds = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cache: list[str] | None = DATA(
        "Folder or URL of the cache whose held-out text is evaluated. With --data, only the "
        "cache's packing settings are used. May be repeated, to compare with a mixture of the "
        "caches' teachers.",
        shown="none; give this or --data",
    ),
    weights: str | None = DATA(f"{NUMBERS_OF_MIXTURE}.", shown="equal weights"),
    data: str | None = DATA(
        "Text to evaluate on instead of the held-out text: a text, JSON lines or Parquet file, a "
        "folder of such files, or the name of a dataset.",
        shown="the cache's held-out text",
    ),
    window: int | None = DATA("Tokens per window, for --data.", shown="the cache's, else 1024"),
    text_field: str = DATA("Field or column that contains the text, for --data.", "text"),
    split: str = DATA("Split of a dataset, for --data.", "train"),
    completion_only: bool = DATA(
        "Evaluate completions and assistant messages only, for --data.", False, "--completion-only"
    ),
    reset_attention: bool | None = DATA(
        "Prevent documents that share a window from attending to each other, for --data.",
        None,
        "--reset-attention/--no-reset-attention",
        shown="as in the cache, else no",
    ),
    tokenized_by: TokenizedBy = None,
    join_rows: JoinRows = False,
    separator_id: SeparatorId = None,
    corpus: Path | None = DATA(
        "Folder of another packed corpus whose held-out text is evaluated.",
        shown="the cache's corpus",
    ),
    limit: int | None = DATA(
        "Maximum number of windows to evaluate.", shown="all held-out windows", min=1
    ),
    draft: int = MEASUREMENTS(
        "Also measure speculative decoding: number of tokens that the student drafts per forward "
        "pass of the teacher, which verifies them. 0 disables it.",
        0,
        min=0,
    ),
    tasks: list[str] | None = MEASUREMENTS(
        "Also score a zero-shot task: continuation, last_word, agreement, or any task of lm-eval. "
        "May be repeated.",
        shown="no tasks",
    ),
    task_limit: int | None = MEASUREMENTS(
        "Maximum number of samples per task.", shown="200", min=1
    ),
    tokenizer: str | None = MEASUREMENTS(
        "Tokenizer for --data and --tasks: a model folder, GGUF file or hub name.",
        shown="the teacher's, else the student's",
    ),
    resamples: int = MEASUREMENTS(
        "Number of bootstrap resamples of the windows, for the intervals.", 1000, min=1
    ),
    seed: int = MEASUREMENTS("Random seed for resampling and drafting.", 0),
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Evaluate a student on text: loss, calibration, and divergence from its teacher."""
    from sparselogits.caching import fetch_texts
    from sparselogits.corpus import require_tokenizer
    from sparselogits.data import CacheDataset, DraftVocabulary
    from sparselogits.evaluate import draft_from_prefixes, evaluate
    from sparselogits.lab.tasks import require_lm_eval
    from sparselogits.store import Cache
    from sparselogits.teacher import TransformersTeacher
    from sparselogits.teacher.loading import locate_model

    teachers, caches = teacher or [], cache or []
    given = parsed_weights(weights)
    shares = shares_of_teachers(teachers, caches, given)
    if draft and not teachers:
        raise InvalidArgumentError(
            "--draft needs --teacher, which verifies the drafted tokens; name the teacher"
        )
    if draft_vocabulary is not None and tasks:
        raise InvalidArgumentError(
            "--tasks score the tokens of whole answers, and a student with a draft vocabulary "
            "predicts some of them only; leave --tasks or --draft-vocabulary out"
        )
    if not caches and data is None:
        raise InvalidArgumentError(
            "no text to evaluate on: give --cache CACHE for the held-out text of a cache, or "
            "--data FILE for another text"
        )
    if data is not None and corpus is not None:
        raise InvalidArgumentError(
            "--data and --corpus both name the text to evaluate on; give only one of them"
        )
    text = OtherText(
        *(data or "", window, text_field, split, completion_only),
        *(reset_attention, separator_id, tokenized_by, join_rows),
    )
    unused = [f.name for f in fields(text)[1:] if getattr(text, f.name) != f.default]
    if data is None and unused:
        raise InvalidArgumentError(
            f"--{', --'.join(unused).replace('_', '-')} can only be used with --data: the held-out "
            "text of a cache is already packed. Name a text with --data, or leave the option out"
        )
    other = None if data is None else text
    vocabulary = None if draft_vocabulary is None else DraftVocabulary.load(draft_vocabulary)
    for name in (student, *teachers, tokenizer):
        if name is not None:
            locate_model(name)  # reports a missing path before any file is read
    opened = [Cache.open(path) for path in caches]
    if len(caches) > 1:
        CacheDataset(caches, weights=given)  # rejects caches that cannot be mixed
    loaded_tokenizer = None
    masked = bool(opened) and opened[0].identity.objective is not None
    if tasks or other is not None or masked:
        if tasks:
            require_lm_eval()
        named = [tokenizer] if tokenizer else [*teachers, student]
        purpose = "--tasks" if tasks else "--data" if other is not None else "a masked model"
        loaded_tokenizer = tokenizer_of(named, student, purpose=purpose)
        if opened:
            require_tokenizer(
                loaded_tokenizer, opened[0].identity.tokenizer, opened[0].recorded_tokenizer()
            )
    with ExitStack() as stack:
        packed = corpus
        if packed is None and caches:
            packed = fetch_texts(caches[0]) / "corpus"
        windows = stack.enter_context(
            text_to_evaluate(
                student,
                opened[0] if opened else None,
                packed,
                other,
                tokenizer=loaded_tokenizer,
                limit=limit,
                draft=vocabulary,
            )
        )
        device = resolve_device(device)
        model = load_student(student, device, draft=vocabulary)
        engine = None
        if teachers:
            identities = [cache.identity for cache in opened]
            engine = load_cache_teachers(teachers, identities, shares, device, dtype=dtype)
        length = windows.corpus.packing.window_length
        with stage("evaluating", "tokens", per_unit=length) as update:
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
            models = {"student": model}
            if isinstance(engine, TransformersTeacher):
                models["teacher"] = engine.model
            scores = _scores(models, loaded_tokenizer, windows.corpus, tasks, task_limit)
    if as_json:
        rows = {name: row.to_json() for name, row in found.items()}
        for name, of_model in scores.items():
            rows[name]["tasks"] = [asdict(score) for score in of_model]
        if drafting is not None:
            rows["student"]["drafting"] = drafting.to_json()
        print_json(rows)
        return
    results().print(_table(found, masked=masked))
    measured = found["student"]
    results().print(
        f"{counted(measured.positions, 'masked position' if masked else 'position')} in "
        f"{counted(len(measured.positions_by_window), 'window')} of "
        f"{'held-out text' if other is None else data}; "
        "±: half of the 95 % bootstrap interval over windows",
        soft_wrap=True,
    )
    if vocabulary is not None:
        bound = "; no drafter with these ids has a higher acceptance than the teacher's column"
        results().print(
            f"metrics of {counted(len(vocabulary), 'draft id')} and the rest as one class"
            + ("" if engine is None else bound),
            soft_wrap=True,
        )
    if drafting is not None:
        results().print(
            f"drafting {draft} at a time: {drafting.acceptance:.1%} of "
            f"{counted(drafting.verified, 'verified token')} accepted (expected "
            f"{drafting.expected:.1%}, standard error {drafting.error:.1%}), "
            f"{drafting.tokens_per_pass:.2f} tokens per pass of the teacher",
            soft_wrap=True,
        )
    if scores:
        results().print(_task_table(scores))
    for_models = given_words(context, "tokenizer", "dtype", "allow")
    retokenized = any(own.identity.retokenized for own in opened)
    if engine is None and retokenized:
        print_next("view", caches[0], "--student", student, *for_models)
    elif engine is not None and caches and vocabulary is None:
        print_next("view", caches[0], "--teacher", teachers[0], "--student", student, *for_models)
    else:
        words: list[object] = [] if data is None else ["--data", data]
        texts: list[tuple[object, ...]] = [("--cache", path) for path in caches]
        texts = texts or [()]
        pairs = zip(texts, teachers or ["MODEL"] * len(texts), strict=False)
        words += [w for named, own in pairs for w in (*named, "--teacher", own)]
        words += ["--weights", weights] if isinstance(given, list) and len(caches) > 1 else []
        words += [] if vocabulary is None else ["--draft-vocabulary", draft_vocabulary]
        words += [] if engine is None else ["--draft", 4]
        of_text = [f.name for f in fields(text)[1:]]
        of_text += ["corpus", "tokenizer"] if tasks is None else ["corpus"]
        words += given_words(context, *of_text, "dtype", "allow")
        print_next("eval", student, *words)


_Shown = Callable[[float], str]
_METRICS: tuple[tuple[str, str, str, _Shown], ...] = (
    ("loss", "↓", "loss", lambda x: f"{x:.4f}"),
    ("perplexity", "↓", "loss", lambda x: f"{math.exp(min(x, 700.0)):.2f}"),
    ("KL to the teacher", "↓", "kl", lambda x: f"{max(x, 0.0):.4f}"),
    ("calibration error (ECE) %", "↓", "ece", lambda x: f"{100 * x:.2f}"),
    ("speculative acceptance %", "↑", "acceptance", lambda x: f"{100 * x:.1f}"),
    ("agreement with the teacher %", "↑", "agreement", lambda x: f"{100 * x:.1f}"),
)
"""Title, direction of improvement, name and format function of each metric in the table."""


def _table(found: dict[str, HeldOut], *, masked: bool) -> Table:
    """Return a table with a row per metric, and a value and a ± column per model.

    Args:
        found: metrics by name of the model.
        masked: whether the models are masked language models, which draft no tokens.
    """
    table = Table("metric", "", box=MARKDOWN)
    rows = dict(sorted(found.items(), key=lambda item: item[0] == "teacher"))
    for name in rows:
        table.add_column(name, justify="right")
        table.add_column("±", justify="right")
    for title, direction, metric, shown in _METRICS:
        if masked and metric == "acceptance":
            continue
        estimates = [row.intervals.get(metric) for row in rows.values()]
        if any(estimate is not None for estimate in estimates):
            cells = [cell for estimate in estimates for cell in _cells(estimate, shown)]
            table.add_row(title, direction, *cells)
    return table


def _cells(estimate: Estimate | None, shown: _Shown) -> tuple[str, str]:
    """Return a value and half the width of its interval, both in the metric's format."""
    if estimate is None:
        return "-", "-"
    if estimate.low is None or estimate.high is None:
        return shown(estimate.mean), "-"
    low, high = shown(estimate.low), shown(estimate.high)
    decimals = len(high.partition(".")[2])
    return shown(estimate.mean), f"{(float(high) - float(low)) / 2:.{decimals}f}"


def _scores(
    models: dict[str, nn.Module],
    tokenizer: Any,
    corpus: PackedCorpus,
    tasks: Sequence[str],
    limit: int | None,
) -> dict[str, list[TaskScore]]:
    """Return the zero-shot scores of each model, one per task and metric."""
    from sparselogits.lab.tasks import LIMIT, LOCAL_TASKS, run_tasks, write_tasks

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
    """Return a table with a row per metric of each task; ± is the standard error over samples."""
    table = Table("task", "metric", "samples", *scores, box=MARKDOWN)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in zip(*scores.values(), strict=True):
        cells = [
            f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}")
            for score in row
        ]
        table.add_row(row[0].task, row[0].metric, f"{row[0].samples:,}", *cells)
    return table
