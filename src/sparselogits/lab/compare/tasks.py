"""Zero-shot tasks of a comparison: finished students and their teacher are scored on them.

Scores stand apart from a run's outcome (`task_scores.py` says where) and do not enter its
fingerprint: tasks can be added to a comparison that is finished, and only they are measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparselogits.errors import reason_of
from sparselogits.files import write_whole
from sparselogits.lab.compare.caches import OpenStage, Setting
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.runs import Planned, claimed, outcome_of
from sparselogits.lab.compare.task_scores import fingerprints, read, teacher_of
from sparselogits.lab.tasks import (
    LOCAL_TASKS,
    check_task,
    require_lm_eval,
    run_tasks,
    write_tasks,
)
from sparselogits.lab.tasks.running import TaskProgress
from sparselogits.teacher.loading import load_causal_lm


@dataclass(frozen=True)
class TaskSetting:
    """What the tasks of a comparison need, whoever is scored.

    Args:
        folder: of the data.
        limit: samples a task.
        wanted: by name of each task that can be run, the fingerprint of what determines its scores.
        tokenizer: the teacher's.
        first_id: what stands before a text without context.
    """

    folder: Path
    limit: int
    wanted: dict[str, str]
    tokenizer: Any
    first_id: int


def prepare_tasks(
    recipe: CompareRecipe, setting: Setting, *, stage: OpenStage
) -> TaskSetting | None:
    """Make the tasks' data, and score the teacher where it is not yet.

    A task whose data cannot be made or fetched is recorded, and tried again the next time.

    Returns:
        None where the recipe asks for no tasks.

    Raises:
        MissingDependencyError: they are asked for, and lm-eval is not installed.
    """
    if recipe.tasks is None:
        return None
    require_lm_eval()
    tokenizer, folder = setting.tokenizer, recipe.out / "tasks"
    failures = {}
    for name in recipe.tasks.names:
        try:
            if name in LOCAL_TASKS:
                how = {"corpus": setting.corpus, "tokenizer": tokenizer}
                write_tasks(folder, [name], count=recipe.tasks.limit, **how)
            else:
                check_task(name)
        except Exception as error:  # whatever it is, the other tasks are not lost to it
            failures[name] = reason_of(error)
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
    write_whole(folder / "failures.json", json.dumps(failures) + "\n")
    first = setting.corpus.packing.first_id
    own = TaskSetting(folder, recipe.tasks.limit, fingerprints(recipe), tokenizer, first)
    of_teacher = fingerprints(recipe, teacher_of(setting.teacher.identity))
    file, teachers = folder / "teacher.json", replace(own, wanted=of_teacher)
    if _missing(file, teachers):
        with stage("tasks, teacher", "sequences") as update:
            _score(setting.teacher.model, file, teachers, lambda done, all_, _: update(done, all_))
    return own


def measure_tasks(run: Planned, tasks: TaskSetting | None, *, device: str = "cpu") -> None:
    """Score the student of a run that this process has claimed, if it is finished and lacks any.

    What fails is recorded beside what does not.
    """
    if tasks is None or run.folder is None or outcome_of(run) is None:
        return
    file = run.folder / "tasks.json"
    if not _missing(file, tasks):
        return
    try:
        model = load_causal_lm(str(run.folder / "model"), dtype="float32").to(device)
    except Exception as error:
        _keep(file, {}, dict.fromkeys(_missing(file, tasks), reason_of(error)))
        return
    _score(model, file, tasks)


def measure_missing_tasks(
    planned: Sequence[Planned],
    tasks: TaskSetting | None,
    *,
    device: str = "cpu",
    stage: OpenStage,
) -> None:
    """Score the students that were finished before tasks were asked for.

    Those that another process has in hand are left to it.
    """
    if tasks is None:
        return
    left = [
        run
        for run in planned
        if run.folder is not None
        and outcome_of(run) is not None
        and _missing(run.folder / "tasks.json", tasks)
    ]
    if not left:
        return
    with stage("tasks", "runs") as update:
        for done, run in enumerate(left):
            update(done, len(left), run.title)
            with claimed(run) as mine:
                if mine:
                    measure_tasks(run, tasks, device=device)
        update(len(left), len(left))


def _score(
    model: nn.Module,
    file: Path,
    tasks: TaskSetting,
    progress: TaskProgress | None = None,
) -> None:
    """Score a model on what its file lacks, and keep it there."""
    names = _missing(file, tasks)
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
            _keep(file, {}, dict.fromkeys(together, reason_of(error)))
            continue
        scores: dict[str, list[Any]] = {name: [] for name in together}
        for score in found:
            scores[score.task if together is local else together[0]].append(asdict(score))
        own = {
            name: {"fingerprint": tasks.wanted[name], "scores": scores[name]} for name in together
        }
        _keep(file, own, {})


def _keep(file: Path, scores: Mapping[str, Any], failures: Mapping[str, str]) -> None:
    kept = read(file) or {"scores": {}, "failures": {}}
    kept["scores"] |= scores
    kept["failures"] = {n: m for n, m in kept["failures"].items() if n not in scores}
    kept["failures"] |= failures
    write_whole(file, json.dumps(kept) + "\n")


def _missing(file: Path, tasks: TaskSetting) -> list[str]:
    kept = read(file).get("scores", {})
    return [
        name
        for name, fingerprint in tasks.wanted.items()
        if kept.get(name, {}).get("fingerprint") != fingerprint
    ]
