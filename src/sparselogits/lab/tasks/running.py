"""lm-eval's own `simple_evaluate` on a model in memory, and what is kept of what it finds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from sparselogits.errors import InvalidArgumentError, MissingDependencyError
from sparselogits.lab.tasks.local import LIMIT

TaskProgress = Callable[[int, int, str], None]
"""progress(sequences scored, all of them, names of the tasks)"""


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Args:
        task: its name.
        metric: as lm-eval names it (acc, acc_norm, perplexity, ...).
        value: the figure, over all samples.
        stderr: standard error over the samples: of a mean sd / sqrt(n), of a perplexity by the
            delta method; None where the figure is neither.
        samples: how many the figure is over.
        values: what each sample adds, in the task's order: 0 or 1 of an accuracy, the word's
            log-likelihood in nats of a perplexity; empty where a sample has no single number.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    values: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Task and metric."""
        return f"{self.task}/{self.metric}"

    @classmethod
    def of(cls, task: str, metric: str, value: float, values: Sequence[float], n: int) -> TaskScore:
        """A score, its standard error formed of the samples."""
        spread = None
        if len(values) > 1:
            mean = statistics.fmean(values)
            spread = statistics.stdev(values) / math.sqrt(len(values))
            if is_perplexity(metric):
                spread, mean = spread * value, math.exp(min(-mean, 700.0))
            if not math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
                spread = None
        return cls(task, metric, value, spread, n, tuple(values))


def is_perplexity(metric: str) -> bool:
    """Whether the figure is exp of minus the samples' mean rather than the mean."""
    return metric.split(",")[0] == "perplexity"


def require_lm_eval() -> None:
    """Insist that the harness is installed.

    Raises:
        MissingDependencyError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "zero-shot tasks are run by lm-eval: pip install 'sparselogits[tasks]'"
        )


def check_task(name: str) -> None:
    """Insist that a task's data can be had, without running it; local ones are made here.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TaskError: nobody knows it, or its data cannot be fetched.
    """
    require_lm_eval()
    from sparselogits.lab.tasks.harness import fetch

    fetch(name)


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = LIMIT,
    data: Path | None = None,
    prefix_token_id: int | None = None,
    progress: TaskProgress | None = None,
) -> list[TaskScore]:
    """Score a model on zero-shot tasks.

    Local tasks touch no network. Other names are lm-eval's own; their data come from a hub, and no
    code that comes with data is run. The generators of random numbers are as before afterwards.

    Args:
        model: a transformers causal language model, in memory; left in the mode it was in.
        tokenizer: the model's, a transformers tokenizer; it is not changed.
        tasks: names, of `LOCAL_TASKS` or any that lm-eval knows (a group gives a score for each
            of its tasks, and its own where it has one).
        limit: at most so many samples a task, its first ones; None for all.
        data: folder that `write_tasks` filled, for local tasks.
        prefix_token_id: what stands before a text without context, such as the separator a student
            has seen before each document; the tokenizer's own bos or eos when None.
        progress: told after every batch.

    Returns:
        The scores, in the order of the tasks, a score for each metric.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TaskError: for a task nobody knows, or whose data cannot be had.
        InvalidArgumentError: for no tasks, one named twice, a limit below one, or a tokenizer with
            more tokens than the model.
    """
    require_lm_eval()
    if not tasks or len(set(tasks)) < len(tasks):
        raise InvalidArgumentError(f"give tasks, each once; found {', '.join(tasks) or 'none'}")
    if limit is not None and limit < 1:
        raise InvalidArgumentError(f"a limit is at least one sample a task, found {limit}")
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InvalidArgumentError(
            f"the tokenizer has ids up to {largest}, the model {rows} of them; give the tokenizer "
            "that the model was trained with"
        )
    from sparselogits.lab.tasks.harness import score

    return score(
        model, tokenizer, tasks, limit=limit, data=data, prefix=prefix_token_id, progress=progress
    )
