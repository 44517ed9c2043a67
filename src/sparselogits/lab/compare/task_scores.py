"""The scores a comparison keeps of zero-shot tasks, and what of them its results hold.

    OUT/tasks/NAME.jsonl    the data of a local task, from the held-out windows
    OUT/tasks/teacher.json  the teacher's scores
    OUT/tasks/failures.json tasks whose data cannot be had, and why
    OUT/runs/ID/tasks.json  a student's scores, sample by sample

Each task's scores carry a fingerprint of what determines them besides the model; a student's is the
folder's they lie in, the teacher's is named in the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselogits.evaluate import over_seeds, t_interval
from sparselogits.evaluate.intervals import ratio
from sparselogits.identity import canonical_json
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.results import Ends, Figure, Results
from sparselogits.lab.compare.summary import as_figure
from sparselogits.lab.tasks import LOCAL_TASKS, TaskScore, is_perplexity

MEASURED = 1
"""Raised when what a task measures changes, so that older scores are not taken for it."""


def with_tasks(results: Results, recipe: CompareRecipe) -> Results:
    """The results with what is known of the recipe's tasks; as they are where it has none."""
    if recipe.tasks is None:
        return results
    wanted, failed = fingerprints(recipe), read(recipe.out / "tasks" / "failures.json")
    scores: dict[tuple[str, str], list[dict[str, TaskScore]]] = {}
    runs = []
    for run in results.runs:
        if run.folder is not None:
            kept = read(recipe.out / run.folder / "tasks.json")
            own = {score.name: score for score in _current(kept, wanted)}
            scores.setdefault((run.method, run.student), []).append(own)
            run = run.model_copy(update=_summary(own, failed, kept, recipe))
        runs.append(run)
    methods = [
        row.model_copy(
            update={"tasks": _figures(scores.get((row.method, row.student), []), recipe.resamples)}
        )
        for row in results.methods
    ]
    teacher = results.teacher
    if teacher is not None:
        kept = read(recipe.out / "tasks" / "teacher.json")
        of = teacher_of(results.settings["teacher"])
        own = {score.name: score for score in _current(kept, fingerprints(recipe, of))}
        teacher = teacher.model_copy(update=_summary(own, failed, kept, recipe))
    return results.model_copy(update={"runs": runs, "methods": methods, "teacher": teacher})


def column_of(name: str) -> tuple[str, float, int]:
    """A column's head, the factor on its figures and their digits, for a figure of a task."""
    task, _, metric = name.partition("/")
    if is_perplexity(metric):
        return f"{task} {metric}", 1, 1
    return f"{task} {metric} %", 100, 1


def fingerprints(recipe: CompareRecipe, of: str = "") -> dict[str, str]:
    """By task, what determines its scores; without those that have no data.

    Args:
        recipe: the comparison.
        of: what stands for the model where scores do not lie in its own folder.
    """
    assert recipe.tasks is not None
    failed = read(recipe.out / "tasks" / "failures.json")
    found = {}
    for name in recipe.tasks.names:
        if name in failed:
            continue
        data = None
        if name in LOCAL_TASKS:
            file = recipe.out / "tasks" / f"{name}.jsonl"
            data = hashlib.sha256(file.read_bytes()).hexdigest()
        determined = {
            "measured": MEASURED,
            "task": name,
            "data": data,
            "limit": recipe.tasks.limit,
            "lm_eval": version("lm_eval"),
        }
        digest = hashlib.sha256(canonical_json(determined)).hexdigest()
        found[name] = f"{digest} {of}".strip()
    return found


def teacher_of(identity: Mapping[str, Any]) -> str:
    """What stands for the teacher in the fingerprint of its scores."""
    return f"{identity['weights']} {identity['dtype']}"


def read(file: Path) -> dict[str, Any]:
    """What a file of scores or failures holds; nothing where there is none."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _current(kept: Mapping[str, Any], wanted: Mapping[str, str]) -> Iterator[TaskScore]:
    """The scores that are kept of the tasks as they are wanted now."""
    for name, fingerprint in wanted.items():
        own = kept.get("scores", {}).get(name)
        if own is not None and own["fingerprint"] == fingerprint:
            for score in own["scores"]:
                yield TaskScore(**{**score, "values": tuple(score["values"])})


def _summary(
    own: Mapping[str, TaskScore],
    failed: Mapping[str, str],
    kept: Mapping[str, Any],
    recipe: CompareRecipe,
) -> dict[str, Any]:
    assert recipe.tasks is not None
    why = {**kept.get("failures", {}), **failed}
    return {
        "tasks": {name: score.value for name, score in own.items()},
        "tasks_failed": {name: why[name] for name in recipe.tasks.names if name in why},
    }


def _figures(seeds: Sequence[Mapping[str, TaskScore]], resamples: int) -> dict[str, Figure]:
    """Means over seeds of what all of them have, with intervals over samples, seeds and both."""
    names = [name for name in (seeds[0] if seeds else {}) if all(name in own for own in seeds)]
    return {name: _figure(tuple(own[name] for own in seeds), resamples) for name in names}


@lru_cache(maxsize=4096)  # results are put together after every run, and most scores are as before
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
