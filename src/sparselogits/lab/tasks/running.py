"""Score a model in memory by lm-eval's `simple_evaluate`, and collect the scores."""

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
    """A metric of a task.

    Args:
        task: name of the task.
        metric: lm-eval's name of the metric (acc, acc_norm, perplexity, ...).
        value: value over all samples.
        stderr: standard error over the samples: sd / sqrt(n) for a mean, by the delta method for a
            perplexity; None for other metrics.
        samples: number of samples.
        values: value per sample, in the task's order: 0 or 1 for an accuracy, the word's
            log-likelihood in nats for a perplexity; empty if a sample has no single number.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    values: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the score, as `task/metric`."""
        return f"{self.task}/{self.metric}"

    @classmethod
    def of(cls, task: str, metric: str, value: float, values: Sequence[float], n: int) -> TaskScore:
        """Make a score, with its standard error computed from the samples."""
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
    """Return whether the value is exp(-mean) of the samples instead of their mean."""
    return metric.split(",")[0] == "perplexity"


def require_lm_eval() -> None:
    """Validate that lm-eval is installed.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "zero-shot tasks need lm-eval, which is missing: pip install 'sparselogits[tasks]'"
        )


def check_task(name: str) -> None:
    """Validate that a task's data can be fetched, without running it; local data are made later.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TaskError: the task is unknown, or its data cannot be fetched.
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

    Local tasks need no network. Other names are lm-eval's; their data come from a hub, and code
    that comes with data is not run. The states of random generators are restored afterwards.

    Args:
        model: a transformers causal language model in memory; its mode is restored.
        tokenizer: transformers tokenizer of the model; it is not changed.
        tasks: names from `LOCAL_TASKS` or of lm-eval (a group gives a score per task, and one for
            the group if it defines one).
        limit: largest number of samples per task, from the first on; None for all.
        data: folder that `write_tasks` filled, for local tasks.
        prefix_token_id: token before a text without context, such as the separator that a student
            has seen before each document; None for the tokenizer's bos or eos.
        progress: called after every batch.

    Returns:
        The scores, in the order of the tasks, one per metric.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TaskError: a task is unknown, or its data cannot be fetched.
        InvalidArgumentError: there are no tasks, one is named twice, the limit is below one, or the
            tokenizer has more tokens than the model.
    """
    require_lm_eval()
    if not tasks or len(set(tasks)) < len(tasks):
        raise InvalidArgumentError(
            f"tasks are {', '.join(tasks) or 'missing'}; name at least one task, and each only once"
        )
    if limit is not None and limit < 1:
        raise InvalidArgumentError(f"limit={limit}: give at least one sample per task")
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InvalidArgumentError(
            f"the tokenizer has ids up to {largest}, the model only {rows} ids; give the tokenizer "
            "that the model was trained with"
        )
    from sparselogits.lab.tasks.harness import score

    return score(
        model, tokenizer, tasks, limit=limit, data=data, prefix=prefix_token_id, progress=progress
    )
