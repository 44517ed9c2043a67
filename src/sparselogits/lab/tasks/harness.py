"""Call lm-eval, and suppress its progress bars, its output, and its log lines below errors.

The module is imported only when tasks are checked or run, because importing lm-eval is slow.
"""

from __future__ import annotations

import copy
import difflib
import io
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn

from sparselogits.errors import TaskError, reason_of
from sparselogits.lab.tasks.local import LOCAL_TASKS
from sparselogits.lab.tasks.running import TaskProgress, TaskScore
from sparselogits.language_model import in_eval_mode

_BATCH_LOGITS = 1 << 25
"""Number of float32 logits for which the batch size is chosen; these logits take 128 MiB."""
_MOST_SEQUENCES = 32
"""Largest number of sequences per batch."""


def score(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    limit: int | None,
    data: Path | None,
    prefix: int | None,
    progress: TaskProgress | None,
) -> list[TaskScore]:
    """Score a model on tasks; see `run_tasks`, whose `prefix_token_id` is `prefix` here."""
    with _quiet() as with_stderr, _restored_randomness(), _no_environment_report():

        def report(done: int, total: int) -> None:
            if progress is not None:
                with with_stderr():
                    progress(done, total, ", ".join(names))

        loaded = [task for name in names for task in _load(name, data)]
        try:
            with in_eval_mode(model):
                student = _Student(
                    pretrained=model,
                    tokenizer=copy.deepcopy(tokenizer),  # lm-eval adds a padding token
                    backend="causal",
                    batch_size=_batch_size(model),
                    softmax_dtype="float32",
                    prefix_token_id=prefix,
                    # cache keys omit the position at which a request divides its tokens
                    logits_cache=False,
                )
                student.report = report
                found = evaluator.simple_evaluate(
                    student,
                    tasks=loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    task_manager=TaskManager(include_defaults=False),  # the tasks are loaded
                )
        except Exception as error:
            raise TaskError(
                f"lm-eval failed on {', '.join(names)}: {_first_line(error)}. Leave out the task "
                "that failed, or use a version of lm-eval that supports the task"
            ) from error
    assert found is not None  # None only on ranks other than the first; there is one rank
    return _scores(found)


def fetch(name: str) -> None:
    """Load an lm-eval task, which downloads missing data; do nothing for a local task."""
    if name not in LOCAL_TASKS:
        with _quiet(), _restored_randomness():
            _load(name, None)


class _Student(HFLM):  # type: ignore[misc]
    """Model in memory with the interface of lm-eval.

    Progress is reported after each batch of log-likelihoods, but not while text is generated.
    """

    total, done = 0, 0
    report: Callable[[int, int], None]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _model_call(self, inps: Tensor, *others: Any, **named: Any) -> Any:
        logits = super()._model_call(inps, *others, **named)
        self.done += len(inps)
        self.report(self.done, max(self.total, self.done))
        return logits


def _load(name: str, data: Path | None) -> list[Any]:
    """Load a task, group or tag of lm-eval, or a local task from the folder `data`."""
    if name in LOCAL_TASKS:
        if data is None:
            raise TaskError(
                f"the task {name!r} needs data: call write_tasks(FOLDER, ...), and pass data=FOLDER"
            )
        where, metadata = Path(__file__).parent, {"data": str(data)}
        manager = TaskManager(include_path=where, include_defaults=False, metadata=metadata)
        return list(manager.load([name])["tasks"].values())
    manager = _all_tasks()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*LOCAL_TASKS, *manager.all_tasks], n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise TaskError(
            f"unknown task {name!r}{hint} Available: {', '.join(LOCAL_TASKS)}, which need no "
            "network, and the tasks that `lm-eval ls tasks` lists"
        )
    try:
        loaded = manager.load([name])
    except Exception as error:
        raise TaskError(
            f"the task {name!r} could not be loaded: {_first_line(error)}. The data of this task "
            "are downloaded from the Hugging Face Hub, which needs the network once. Connect, or "
            f"use a task that needs no network: {', '.join(LOCAL_TASKS)}"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


@cache
def _all_tasks() -> TaskManager:
    """Return lm-eval's index of tasks, cached because reading its files takes about 10 seconds."""
    return TaskManager()


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            # keys are METRIC,FILTER; the filter "none" passes all answers on
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr"):
                continue
            if not isinstance(value, int | float):
                continue
            samples = found["samples"].get(task, ())
            rows = [row for row in samples if row["filter"] == answer_filter and metric in row]
            values = [row[metric] for row in rows]
            if not all(isinstance(each, int | float) for each in values):
                values = []
            name = metric if answer_filter == "none" else key
            count = len(values) or int(metrics["sample_len"])
            scores.append(TaskScore.of(task, name, float(value), list(map(float, values)), count))
    return scores


def _batch_size(model: nn.Module) -> int:
    """Return the number of sequences per batch, from 1 to `_MOST_SEQUENCES`.

    The number is `_BATCH_LOGITS` divided by the number of logits of a sequence of 256 tokens, or of
    the model's longest sequence if that is shorter.
    """
    config: Any = model.config
    length = int(getattr(config, "max_position_embeddings", None) or 2048)
    rows = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    return max(1, min(_MOST_SEQUENCES, _BATCH_LOGITS // (min(length, 256) * rows)))


def _first_line(error: Exception) -> str:
    return reason_of(error).splitlines()[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[Any]:
    """Suppress lm-eval's output; yield a function that returns a context which restores stderr."""
    logger = logging.getLogger("lm_eval")
    level, stderr = logger.level, sys.stderr
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield lambda: redirect_stderr(stderr)
    finally:
        logger.setLevel(level)


@contextmanager
def _restored_randomness() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, which lm-eval seeds, after a block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _no_environment_report() -> Iterator[None]:
    """Prevent lm-eval from running pip, which takes seconds, and git, which may print an error."""
    originals = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info = lambda storage: None
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = originals
