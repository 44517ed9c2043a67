"""Score a model in memory on zero-shot tasks with lm-eval."""

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
"""Function called with the number of sequences scored, the total number as far as it is known, and
the task names in one string."""


@dataclass(frozen=True)
class TaskScore:
    """Score of a model in one metric of a task.

    Args:
        task: name of the task or group.
        metric: lm-eval's name of the metric (acc, acc_norm, perplexity, ...), followed by a comma
            and the name of the answer filter if there is one.
        value: value over all samples.
        stderr: standard error over the samples: standard deviation / sqrt(n) for a mean, by the
            delta method for a perplexity; None for other metrics, or for fewer than two values.
        samples: number of samples.
        values: value per sample, in the task's order: 0 or 1 for an accuracy, the log-likelihood of
            the answer in nats for a perplexity; empty for a group, or if samples have no single
            number.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    values: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Name of the score, as `task/metric`."""
        return f"{self.task}/{self.metric}"

    @classmethod
    def of(cls, task: str, metric: str, value: float, values: Sequence[float], n: int) -> TaskScore:
        """Create a score of n samples, and compute the standard error from the values if given."""
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
    """Return whether a metric is lm-eval's perplexity, which is exp(-mean of the values)."""
    return metric.split(",")[0] == "perplexity"


def require_lm_eval() -> None:
    """Raise `MissingDependencyError` if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "zero-shot tasks need lm-eval, which is not installed: pip install "
            "'sparselogits[tasks]'"
        )


def check_task(name: str) -> None:
    """Check that a task exists, and download its missing data if it is a task of lm-eval.

    Raises:
        MissingDependencyError: If lm-eval is not installed.
        TaskError: If the task is unknown or cannot be loaded.
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

    Local tasks need no network. The data of lm-eval's tasks are downloaded from the Hugging Face
    Hub; code in a dataset is not run. The random states of Python, NumPy and torch are restored
    afterwards.

    Args:
        model: transformers causal language model, set to eval mode during the call.
        tokenizer: transformers tokenizer of the model; a copy is used.
        tasks: names of local tasks (`LOCAL_TASKS`), or of tasks, groups and tags of lm-eval. A
            group is scored per task, and as a whole if lm-eval defines a score of the group.
        limit: largest number of samples per task, counted from the first; None for all.
        data: folder that `write_tasks` filled; needed for local tasks.
        prefix_token_id: token that is placed before a text without context, such as the document
            separator of the training text; None for the tokenizer's bos or eos.
        progress: function that is called after each batch of log-likelihoods.

    Returns:
        One score per task, metric and answer filter.

    Raises:
        MissingDependencyError: If lm-eval is not installed.
        TaskError: If a task is unknown or fails, or its data are missing.
        InvalidArgumentError: If there are no tasks, a name is repeated, the limit is less than 1,
            or the tokenizer has ids that the model lacks.
    """
    require_lm_eval()
    if not tasks or len(set(tasks)) < len(tasks):
        raise InvalidArgumentError(
            f"found the tasks {', '.join(tasks) or '(none)'}; give at least one task, and each "
            "task only once"
        )
    if limit is not None and limit < 1:
        raise InvalidArgumentError(f"limit={limit}: give at least 1, or None for all samples")
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InvalidArgumentError(
            f"the tokenizer has ids up to {largest}, but the model has only {rows} ids; give the "
            "tokenizer that the model was trained with"
        )
    from sparselogits.lab.tasks.harness import score

    return score(
        model, tokenizer, tasks, limit=limit, data=data, prefix=prefix_token_id, progress=progress
    )
