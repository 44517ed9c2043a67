"""Zero-shot tasks of a comparison: finished students and their teacher are scored on them.

    OUT/tasks/NAME.jsonl            the data of a local task, from the held-out windows
    OUT/finished/tasks/KEY.json     scores of one model on one task, sample by sample

Scores are not part of the outcome of a run and do not enter its fingerprint, so tasks can be added
to a finished comparison, and only they are measured.
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
from sparselogits.lab.compare.results import Ends, Figure, Results
from sparselogits.lab.compare.runs import Planned, outcome_of
from sparselogits.lab.compare.summary import as_figure
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
"""Raised when what a task measures changes, so that older scores are not used."""


@dataclass(frozen=True)
class TaskSetting:
    """The tasks of a comparison.

    Args:
        names: names of all tasks.
        digests: what determines the scores besides the model, by name of each task with data.
        failed: why other tasks have no data, by name.
        folder: folder of the data.
        limit: largest number of samples per task.
        tokenizer: tokenizer of the teacher.
        first_id: token that precedes a text without context.
        work: finished work of the comparison.
        teacher: what identifies the teacher.
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
        """Return the fingerprint of what determines the scores of a model on a task."""
        return fingerprint([self.digests[name], model])

    def missing(self, model: str) -> list[str]:
        """Return the tasks that a model has no scores on."""
        return [
            name for name in self.digests if self.work.value("tasks", self.key(name, model)) is None
        ]

    def scores(self, model: str) -> dict[str, TaskScore]:
        """Return the scores of a model by TASK/METRIC."""
        kept = [self.work.value("tasks", self.key(name, model)) or [] for name in self.digests]
        found = [
            TaskScore(**{**own, "values": tuple(own["values"])}) for all_ in kept for own in all_
        ]
        return {score.name: score for score in found}

    def summary(self, model: str) -> dict[str, Any]:
        """Return `tasks` and `tasks_failed` of a model's row in the results."""
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
    """Write the data of the tasks, and score the teacher unless that is done.

    A task whose data cannot be made or fetched is reported, and tried again the next time.

    Returns:
        None if the recipe has no tasks.

    Raises:
        MissingDependencyError: lm-eval is not installed.
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
        except Exception as error:  # whatever it is, the other tasks are not lost to it
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
        recipe.tasks.names,
        digests,
        failed,
        folder,
        recipe.tasks.limit,
        tokenizer,
        setting.corpus.packing.first_id,
        setting.work,
        f"{identity['weights']} {identity['dtype']}",
    )
    if tasks.missing(tasks.teacher):
        with stage("tasks, teacher", "sequences") as update:
            _score(setting.teacher.model, tasks.teacher, tasks, lambda done, n, _: update(done, n))
    return tasks


def measure_tasks(run: Planned, tasks: TaskSetting | None, *, device: str = "cpu") -> None:
    """Score the student of a run that this process has claimed, if it is finished and lacks any.

    Failures are kept beside the scores.
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
    """Score the students that were finished before the recipe had tasks.

    Students that another process is scoring are skipped.
    """
    if tasks is None:
        return
    work = tasks.work
    left = [
        run
        for run in planned
        if outcome_of(run, work) is not None and tasks.missing(run.fingerprint)
    ]
    if not left:
        return
    with stage("tasks", "runs") as update:
        for done, run in enumerate(left):
            update(done, len(left), run.title)
            with work.claimed("runs", run.fingerprint) as mine:
                if mine:
                    measure_tasks(run, tasks, device=device)
        update(len(left), len(left))


def with_tasks(
    results: Results, planned: Sequence[Planned], tasks: TaskSetting | None, resamples: int
) -> Results:
    """Return the results with the scores of the tasks.

    Args:
        results: results without scores.
        planned: all runs.
        tasks: the tasks; None for none.
        resamples: number of resamples of every bootstrap.
    """
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
            update={"tasks": figures_of_tasks(scores.get((row.method, row.student), []), resamples)}
        )
        for row in results.methods
    ]
    teacher = results.teacher
    if teacher is not None:
        teacher = teacher.model_copy(update=tasks.summary(tasks.teacher))
    return results.model_copy(update={"runs": runs, "methods": methods, "teacher": teacher})


def column_of(name: str) -> tuple[str, float, int]:
    """Return the heading, the factor and the digits of the column of a metric of a task."""
    task, _, metric = name.partition("/")
    if is_perplexity(metric):
        return f"{task} {metric}", 1, 1
    return f"{task} {metric} %", 100, 1


def figures_of_tasks(seeds: Sequence[Mapping[str, TaskScore]], resamples: int) -> dict[str, Figure]:
    """Return the metrics that all seeds have, with intervals over samples, seeds and both."""
    names = [name for name in (seeds[0] if seeds else {}) if all(name in own for own in seeds)]
    return {name: _figure(tuple(own[name] for own in seeds), resamples) for name in names}


def _score(
    model: nn.Module, of: str, tasks: TaskSetting, progress: TaskProgress | None = None
) -> None:
    """Score a model on the tasks that it lacks scores on, and keep them."""
    names = tasks.missing(of)
    local = [name for name in names if name in LOCAL_TASKS]
    # lm-eval's own one by one: a name may stand for many, and one may fail
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
        except Exception as error:  # whatever it is, nothing else is lost to it
            _fail(together, of, tasks, error)
            continue
        scores: dict[str, list[Any]] = {name: [] for name in together}
        for score in found:
            scores[score.task if together is local else together[0]].append(asdict(score))
        for name in together:
            tasks.work.keep("tasks", tasks.key(name, of), scores[name])


def _fail(names: Sequence[str], of: str, tasks: TaskSetting, error: Exception) -> None:
    for name in names:
        tasks.work.fail("tasks", tasks.key(name, of), reason_of(error))


@lru_cache(maxsize=4096)  # results are computed after every run, and most scores are as before
def _figure(scores: tuple[TaskScore, ...], resamples: int) -> Figure:
    if not all(score.stderr is not None for score in scores):
        over = t_interval([score.value for score in scores])
        none = Ends(low=None, high=None)
        return Figure(
            mean=over.mean, windows=none, seeds=Ends(low=over.low, high=over.high), both=none
        )
    values = torch.tensor([score.values for score in scores], dtype=torch.float64)
    units = torch.stack([values, torch.ones_like(values)], 2)
    statistic = _perplexity if is_perplexity(scores[0].metric) else ratio
    return as_figure(over_seeds(units, statistic, resamples=resamples))


def _perplexity(sums: Tensor) -> Tensor:
    return torch.exp(-ratio(sums))
