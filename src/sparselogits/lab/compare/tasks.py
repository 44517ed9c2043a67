"""Score the finished students of a comparison and the teacher on zero-shot tasks.

    OUT/tasks/NAME.jsonl            data of a local task, see lab/tasks/local.py
    OUT/finished/tasks/KEY.json     scores of one model on one task, with the values per sample

Scores are stored separately from the outcomes of runs and do not affect the fingerprints of runs,
so that tasks can be added to a finished comparison without training again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.errors import reason_of
from sparselogits.evaluate import over_seeds, t_interval
from sparselogits.evaluate.intervals import ratio
from sparselogits.lab.compare.caches import OpenStage, Setting
from sparselogits.lab.compare.finished import FinishedWork, fingerprint
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.results import Ends, MetricEstimate, Results
from sparselogits.lab.compare.runs import Planned, outcome_of
from sparselogits.lab.compare.summary import metric_estimate
from sparselogits.lab.tasks import (
    LOCAL_TASKS,
    TaskScore,
    check_task,
    is_perplexity,
    require_lm_eval,
    run_tasks,
    write_tasks,
)
from sparselogits.lab.tasks.running import TaskProgress
from sparselogits.teacher.loading import load_language_model

MEASURED = 1
"""Version of the scores; a new version makes stored scores invalid."""


@dataclass(frozen=True)
class TaskSetting:
    """Tasks of a comparison, with methods that load the stored scores.

    Args:
        names: names of all tasks.
        digests: fingerprints of the tasks and their settings, by name of the task; tasks in
            `failed` are left out.
        failed: reasons why tasks have no data, by name of the task.
        folder: folder of the local tasks' data.
        limit: largest number of samples per task.
        tokenizer: tokenizer of the teacher.
        first_id: id of the token that precedes a text without context.
        work: finished work of the comparison.
        teacher: identifier of the teacher, for `key`.
    """

    names: Sequence[str]
    digests: Mapping[str, str]
    failed: Mapping[str, str]
    folder: Path
    limit: int
    tokenizer: Any
    first_id: int
    work: FinishedWork
    teacher: str

    def key(self, name: str, model: str) -> str:
        """Return the fingerprint under which a model's scores on a task are stored.

        Args:
            name: name of the task.
            model: fingerprint of the student's run, or the attribute `teacher`.
        """
        return fingerprint([self.digests[name], model])

    def missing(self, model: str) -> list[str]:
        """Return the names of the tasks that have data but no scores of a model (see `key`)."""
        value = self.work.value
        return [name for name in self.digests if value("tasks", self.key(name, model)) is None]

    def scores(self, model: str) -> dict[str, TaskScore]:
        """Load the scores of a model (see `key`), by TASK/METRIC."""
        stored = [self.work.value("tasks", self.key(name, model)) or [] for name in self.digests]
        flat = [score for scores in stored for score in scores]
        found = [TaskScore(**(score | {"values": tuple(score["values"])})) for score in flat]
        return {score.name: score for score in found}

    def summary(self, model: str) -> dict[str, Any]:
        """Return the fields `tasks` and `tasks_failed` of a model's row in the results."""
        reasons = {
            name: self.failed.get(name) or self.work.failure("tasks", self.key(name, model))
            for name in self.names
        }
        return {
            "tasks": {name: score.value for name, score in self.scores(model).items()},
            "tasks_failed": {name: why for name, why in reasons.items() if why is not None},
        }


def prepare_tasks(
    recipe: CompareRecipe, setting: Setting, *, stage: OpenStage
) -> TaskSetting | None:
    """Write or download the data of the tasks, and score the teacher where scores are missing.

    A task whose data cannot be written or downloaded is recorded as failed; the next call retries.

    Returns:
        The tasks; None if the recipe has none.

    Raises:
        MissingDependencyError: If lm-eval is not installed.
    """
    if recipe.tasks is None:
        return None
    require_lm_eval()
    tokenizer, folder = setting.tokenizer, recipe.out / "tasks"
    digests, failed = {}, {}
    for name in recipe.tasks.names:
        file, data = folder / f"{name}.jsonl", None
        try:
            if name in LOCAL_TASKS:
                how = {"corpus": setting.corpus, "tokenizer": tokenizer}
                data = write_tasks(folder, [name], count=recipe.tasks.limit, **how)[name]
            else:
                check_task(name)
        except Exception as error:  # a failed task must not stop the others
            failed[name] = reason_of(error)
            file.unlink(missing_ok=True)
            continue
        digests[name] = fingerprint(
            {
                "measured": MEASURED,
                "task": name,
                "data": data,
                "limit": recipe.tasks.limit,
                "lm_eval": version("lm_eval"),
            }
        )
    identity = setting.teacher.identity
    tasks = TaskSetting(
        *(recipe.tasks.names, digests, failed, folder, recipe.tasks.limit, tokenizer),
        *(setting.corpus.packing.first_id, setting.work),
        teacher=f"{identity['weights']} {identity['dtype']}",
    )
    if tasks.missing(tasks.teacher):
        with stage("tasks, teacher", "sequences") as update:
            _score(setting.teacher.model, tasks.teacher, tasks, lambda done, n, _: update(done, n))
    return tasks


def measure_tasks(run: Planned, tasks: TaskSetting | None, *, device: str = "cpu") -> None:
    """Score the student of a finished run on the tasks without stored scores.

    Failures are recorded instead of raised.

    Args:
        run: run that this process has claimed; an unfinished run is skipped.
        tasks: the tasks; None if the recipe has none.
        device: device of the student.
    """
    if tasks is None or run.folder is None or outcome_of(run, tasks.work) is None:
        return
    missing = tasks.missing(run.fingerprint)
    if not missing:
        return
    try:
        model = load_language_model(str(run.folder / "model"), dtype="float32").to(device)
    except Exception as error:
        _fail(missing, run.fingerprint, tasks, error)
        return
    _score(model, run.fingerprint, tasks)


def measure_missing_tasks(
    planned: Sequence[Planned],
    tasks: TaskSetting | None,
    *,
    device: str = "cpu",
    stage: OpenStage,
) -> None:
    """Score the students of finished runs that lack scores and that no other process is scoring."""
    if tasks is None:
        return
    work = tasks.work
    unscored = [
        run
        for run in planned
        if outcome_of(run, work) is not None and tasks.missing(run.fingerprint)
    ]
    if not unscored:
        return
    with stage("tasks", "runs") as update:
        for done, run in enumerate(unscored):
            update(done, len(unscored), run.title)
            with work.claimed("runs", run.fingerprint) as mine:
                if mine:
                    measure_tasks(run, tasks, device=device)
        update(len(unscored), len(unscored))


def with_tasks(
    results: Results, planned: Sequence[Planned], tasks: TaskSetting | None, resamples: int
) -> Results:
    """Return results with the scores of tasks; `tasks` is None if the recipe has no tasks."""
    if tasks is None:
        return results
    keys = {(run.method.title, run.student, run.seed): run.fingerprint for run in planned}
    scores: dict[tuple[str, str], list[dict[str, TaskScore]]] = {}
    runs = []
    for run in results.runs:
        if run.folder is not None:
            model = keys[run.method, run.student, run.seed]
            scores.setdefault((run.method, run.student), []).append(tasks.scores(model))
            run = run.model_copy(update=tasks.summary(model))
        runs.append(run)
    methods = [
        row.model_copy(
            update={"tasks": task_estimates(scores.get((row.method, row.student), []), resamples)}
        )
        for row in results.methods
    ]
    teacher = results.teacher
    if teacher is not None:
        teacher = teacher.model_copy(update=tasks.summary(tasks.teacher))
    return results.model_copy(update={"runs": runs, "methods": methods, "teacher": teacher})


def column_of(name: str) -> tuple[str, float, int]:
    """Return the heading, scale factor and number of digits of the score named TASK/METRIC."""
    task, _, metric = name.partition("/")
    if is_perplexity(metric):
        return f"{task} {metric}", 1, 1
    return f"{task} {metric} %", 100, 1


def task_estimates(
    seeds: Sequence[Mapping[str, TaskScore]], resamples: int
) -> dict[str, MetricEstimate]:
    """Compute the mean of each score over seeds, with intervals over samples, seeds and both.

    A score without a standard error has only the interval over seeds.

    Args:
        seeds: scores of each seed, by TASK/METRIC; a score that any seed lacks is omitted.
        resamples: number of resamples per bootstrap.
    """
    names = [name for name in (seeds[0] if seeds else {}) if all(name in each for each in seeds)]
    return {name: _task_estimate(tuple(each[name] for each in seeds), resamples) for name in names}


def _score(
    model: nn.Module, of: str, tasks: TaskSetting, progress: TaskProgress | None = None
) -> None:
    """Score a model where scores are missing, and store them; see `TaskSetting.key` for `of`."""
    names = tasks.missing(of)
    local = [name for name in names if name in LOCAL_TASKS]
    # tasks of lm-eval are run one by one, because a name may be a group, and one may fail
    for together in [*([local] if local else []), *([n] for n in names if n not in local)]:
        try:
            found = run_tasks(
                model,
                tasks.tokenizer,
                together,
                limit=tasks.limit,
                data=tasks.folder,
                prefix_token_id=tasks.first_id,
                progress=progress,
            )
        except Exception as error:  # a failed task must not stop the others
            _fail(together, of, tasks, error)
            continue
        scores: dict[str, list[Any]] = {name: [] for name in together}
        for score in found:
            scores[score.task if together is local else together[0]].append(asdict(score))
        for name in together:
            tasks.work.store("tasks", tasks.key(name, of), scores[name])


def _fail(names: Sequence[str], of: str, tasks: TaskSetting, error: Exception) -> None:
    for name in names:
        tasks.work.fail("tasks", tasks.key(name, of), reason_of(error))


@lru_cache(maxsize=4096)  # results are computed after every run, and most scores do not change
def _task_estimate(scores: tuple[TaskScore, ...], resamples: int) -> MetricEstimate:
    """Compute the mean of a score over seeds, with intervals over samples, seeds and both."""
    if not all(score.stderr is not None for score in scores):
        found = t_interval([score.value for score in scores])
        none = Ends(low=None, high=None)
        return MetricEstimate(
            mean=found.mean, windows=none, seeds=Ends(low=found.low, high=found.high), both=none
        )
    values = torch.tensor([score.values for score in scores], dtype=torch.float64)
    units = torch.stack([values, torch.ones_like(values)], 2)
    statistic = _perplexity if is_perplexity(scores[0].metric) else ratio
    return metric_estimate(over_seeds(units, statistic, resamples=resamples))


def _perplexity(sums: Tensor) -> Tensor:
    return torch.exp(-ratio(sums))
