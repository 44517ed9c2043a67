"""Call lm-eval; this module is imported when tasks are run, because loading it takes a second.

lm-eval's progress bars, its output, and its log lines below errors are suppressed.
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

_NUMBERS = 1 << 25  # of a batch's logits, 128 MB
_MOST_SEQUENCES = 32


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
    """Score a model; see `run_tasks`, which validates what needs no lm-eval."""
    was_training = model.training
    with _quiet() as aloud, _randomness_kept(), _no_survey():

        def tell(done: int, total: int) -> None:
            if progress is not None:
                with aloud():
                    progress(done, total, ", ".join(names))

        loaded = [own for name in names for own in _task(name, data)]
        try:
            student = _Student(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
                backend="causal",
                batch_size=_batch(model),
                softmax_dtype="float32",
                prefix_token_id=prefix,
                # two requests of the same tokens, divided differently, would get one's answer
                logits_cache=False,
            )
            student.tell = tell
            found = evaluator.simple_evaluate(
                student,
                tasks=loaded,
                limit=limit,
                bootstrap_iters=0,
                task_manager=TaskManager(include_defaults=False),  # they are loaded
            )
        except Exception as error:
            raise TaskError(f"lm-eval failed on {', '.join(names)}: {_said(error)}") from error
        finally:
            model.train(was_training)
    assert found is not None  # it is of the first rank, and there are no others
    return _scores(found)


def fetch(name: str) -> None:
    """Fetch the data of a task; see `check_task`."""
    if name not in LOCAL_TASKS:
        with _quiet(), _randomness_kept():
            _task(name, None)


class _Student(HFLM):  # type: ignore[misc]
    """A model for lm-eval that reports progress to this package."""

    total, done = 0, 0
    tell: Callable[[int, int], None]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _model_call(self, inps: Tensor, *others: Any, **named: Any) -> Any:
        logits = super()._model_call(inps, *others, **named)
        self.done += len(inps)
        self.tell(self.done, max(self.total, self.done))
        return logits


def _task(name: str, data: Path | None) -> list[Any]:
    """Load a task with its data, a group of tasks, or the tasks of a tag."""
    if name in LOCAL_TASKS:
        if data is None:
            raise TaskError(
                f"the task {name!r} needs data; pass data=FOLDER that write_tasks filled"
            )
        own = TaskManager(
            include_path=Path(__file__).parent,
            include_defaults=False,
            metadata={"data": str(data)},
        )
        return list(own.load([name])["tasks"].values())
    manager = _all_tasks()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*LOCAL_TASKS, *manager.all_tasks], n=1)
        meant = f", did you mean {near[0]!r}?" if near else "."
        raise TaskError(
            f"unknown task {name!r}{meant} Available: {', '.join(LOCAL_TASKS)}, which need no "
            "network, and the tasks that `lm-eval ls tasks` lists"
        )
    try:
        loaded = manager.load([name])
    except Exception as error:
        raise TaskError(
            f"the task {name!r} could not be loaded: {_said(error)}. Its data are "
            "downloaded from the Hugging Face Hub, which needs the network once. Connect, or use a "
            f"task that needs no network: {', '.join(LOCAL_TASKS)}"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


@cache
def _all_tasks() -> TaskManager:
    """Return lm-eval's index of tasks; reading its thousands of files takes about ten seconds."""
    return TaskManager()


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            rows = [row for row in found["samples"].get(task, ()) if row["filter"] == chain]
            values = [row[metric] for row in rows if metric in row]
            if not all(isinstance(own, int | float) for own in values):
                values = []
            numbers = [float(own) for own in values]
            name = metric if chain == "none" else key
            count = len(numbers) or int(metrics["sample_len"])
            scores.append(TaskScore.of(task, name, float(value), numbers, count))
    return scores


def _batch(model: nn.Module) -> int:
    """Return the sequences per pass that keep the logits of a batch within `_NUMBERS`."""
    config: Any = model.config
    length = int(getattr(config, "max_position_embeddings", None) or 2048)
    rows = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    return max(1, min(_MOST_SEQUENCES, _NUMBERS // (min(length, 256) * rows)))


def _said(error: Exception) -> str:
    return reason_of(error).splitlines()[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[Any]:
    """Suppress lm-eval's output, except within the context that is yielded."""
    logger = logging.getLogger("lm_eval")
    level, screen = logger.level, sys.stderr
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield lambda: redirect_stderr(screen)
    finally:
        logger.setLevel(level)


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Restore the state of all random generators after the block, because lm-eval seeds them."""
    own, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)


@contextmanager
def _no_survey() -> Iterator[None]:
    """Prevent lm-eval from running pip, which takes seconds, and git.

    Outside a repository git prints an error to the terminal that cannot be redirected.
    """
    kept = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info = lambda storage: None
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = kept
