"""Gradients of a comparison's targets beside full distillation's, on one student of each size.

    OUT/gradients.json   measurements by fingerprint, and why others failed; whole or absent
    OUT/gradients.lock   held while a process measures; others wait and find what it found

A method's targets are those of its training: the sampler as it was fitted, the missing-mass rule,
the share of labels (alpha mixes their gradient in, and is measured so), thinned to its rounds. What
is compared with remains full distillation without labels. CE is the labels' own gradient. Methods
with equal targets (fresh and frozen noise of one thinning) share a measurement. Methods without
cached targets are not measured, nor is a schedule of thinning, which has no one target.

The student is that of CE with the first seed whose run did not fail; where all failed or there is
none, that of the first method with one. A run in another hand is waited for: whoever finishes it
measures. A measurement is known by a fingerprint of what determines it and is not repeated.

Cost: see `evaluate/gradients.py`; one pass of the teacher over the windows for each student.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselogits.data import CacheDataset, TextDataset, rounds_for_entries
from sparselogits.errors import reason_of
from sparselogits.evaluate import Estimate
from sparselogits.files import write_whole
from sparselogits.identity import canonical_json
from sparselogits.lab.compare.caches import Draw, OpenStage, Setting
from sparselogits.lab.compare.recipe import CompareRecipe, Gradients, MethodSpec
from sparselogits.lab.compare.results import Gradient, GradientSize, MethodRow, OfBatches
from sparselogits.lab.compare.summary import Run
from sparselogits.lab.gradients import GradientFidelity, Target, measure_gradients
from sparselogits.locks import lock_file
from sparselogits.samplers import Sampler, from_parameters
from sparselogits.store import Cache
from sparselogits.teacher.loading import load_causal_lm

MEASURED = 1
"""Raised when what is measured changes, so that older measurements are not taken for it."""


@dataclass(frozen=True)
class Asked:
    """A measurement that the recipe asks for.

    Args:
        method: one whose targets it is of.
        student: name of the student.
        on: the run whose student it is measured on.
        fingerprint: of everything that determines it.
    """

    method: MethodSpec
    student: str
    on: Run
    fingerprint: str


def measure_missing(
    recipe: CompareRecipe, setting: Setting, runs: Sequence[Run], *, device: str, stage: OpenStage
) -> None:
    """Measure what the recipe asks for and is not kept yet; keep it, or why it failed.

    Args:
        recipe: the comparison.
        setting: see `caches.prepare`.
        runs: all of the recipe, as they are now.
        device: of the students.
        stage: shows progress.
    """
    if recipe.gradients is None:
        return
    with lock_file(recipe.out / "gradients.lock", wait=True):
        for student in recipe.students:
            kept = _Kept.read(recipe.out)
            asked = _asked(recipe, setting, runs, student)
            missing = {own.fingerprint: own for own in asked if own.fingerprint not in kept.found}
            if not missing:
                continue
            try:
                _measure(missing.values(), recipe, recipe.gradients, setting, kept, device, stage)
            except Exception as error:  # whatever it is, nothing else is lost to it
                kept.failures |= dict.fromkeys(missing, reason_of(error))
            kept.write(recipe.out)


def with_gradients(
    rows: Sequence[MethodRow], recipe: CompareRecipe, setting: Setting, runs: Sequence[Run]
) -> list[MethodRow]:
    """The rows with what is kept of their gradients.

    Args:
        rows: of the methods.
        recipe: the comparison.
        setting: see `caches.prepare`.
        runs: all of the recipe, as they are now.
    """
    if recipe.gradients is None:
        return list(rows)
    kept = _Kept.read(recipe.out)
    asked = {
        (own.method.title, student): own
        for student in recipe.students
        for own in _asked(recipe, setting, runs, student)
    }
    found = []
    for row in rows:
        own = asked.get((row.method, row.student))
        more: dict[str, Any] = {}
        if own is not None and own.fingerprint in kept.found:
            more["gradient"] = _gradient(own, kept.found[own.fingerprint], recipe.out)
        elif own is not None:
            more["gradient_failure"] = kept.failures.get(own.fingerprint)
        found.append(row.model_copy(update=more))
    return found


@dataclass
class _Kept:
    """What `gradients.json` holds.

    Args:
        found: by fingerprint, `GradientFidelity.to_json` of every space and batch size.
        failures: by fingerprint, why the last attempt found nothing.
    """

    found: dict[str, list[dict[str, Any]]]
    failures: dict[str, str]

    @classmethod
    def read(cls, out: Path) -> _Kept:
        file = out / "gradients.json"
        return cls(**json.loads(file.read_text())) if file.exists() else cls({}, {})

    def write(self, out: Path) -> None:
        failures = {k: v for k, v in self.failures.items() if k not in self.found}
        kept = {"found": self.found, "failures": failures}
        write_whole(out / "gradients.json", json.dumps(kept) + "\n")


def _asked(
    recipe: CompareRecipe, setting: Setting, runs: Sequence[Run], student: str
) -> list[Asked]:
    """A measurement for every method of one student that has targets to measure."""
    on = _run_to_measure(recipe, [run for run in runs if run.planned.student == student])
    if recipe.gradients is None or on is None:
        return []
    found = []
    for method in recipe.methods:
        cache = setting.caches.get(Draw.of(method, recipe, recipe.seeds[0]).key)
        if cache is None or not _has_targets(method):
            continue
        determined = {
            "measured": MEASURED,
            "cache": Cache.open(cache).identity.fingerprint,
            "text": setting.corpus.source_fingerprint,
            "student": on.planned.fingerprint,
            **_of_targets(method),
            **recipe.gradients.model_dump(mode="json"),
            "seed": recipe.draw_seed,
        }
        fingerprint = hashlib.sha256(canonical_json(determined)).hexdigest()
        found.append(Asked(method, student, on, fingerprint))
    return found


def _run_to_measure(recipe: CompareRecipe, runs: Sequence[Run]) -> Run | None:
    """See the module's docstring; None as long as it is in another hand."""
    by_method = [[r for r in runs if r.planned.method.title == m.title] for m in recipe.methods]
    of_ce = [r for r in runs if r.planned.method.method == "ce" and not r.planned.method.alpha]
    for run in (*of_ce, *(run for own in by_method for run in own)):
        if run.outcome is not None:
            return run
        if run.failure is None:
            return None
    return None


def _has_targets(method: MethodSpec) -> bool:
    """Whether a method has one kind of target: cached ones, not on a schedule, or the labels."""
    if method.sampler is None:
        return method.method == "ce"
    return method.thinning is None or method.thinning.schedule is None


def _of_targets(method: MethodSpec) -> dict[str, Any]:
    """What tells apart the targets of methods that share a cache."""
    if method.sampler is None:
        return {"labels": True}
    thinning = method.thinning
    kept = None if thinning is None else thinning.model_dump(exclude={"fresh_noise", "schedule"})
    return {"missing_mass": method.missing_mass, "alpha": method.alpha, "thinning": kept}


def _measure(
    missing: Iterable[Asked],
    recipe: CompareRecipe,
    wanted: Gradients,
    setting: Setting,
    kept: _Kept,
    device: str,
    stage: OpenStage,
) -> None:
    """Put into `kept` the measurements of one student."""
    samplers: dict[str, Sampler] = {}  # one object for equal draws, so that they are drawn once
    targets, on = [], None
    for own in missing:
        on = own.on.planned
        try:
            targets.append(_target(own, recipe, setting, samplers))
        except Exception as error:  # a sampler that cannot be had again does not stop the others
            kept.failures[own.fingerprint] = reason_of(error)
    if not targets:
        return
    assert on is not None
    assert on.folder is not None  # it is done
    model = load_causal_lm(str(on.folder / "model"), dtype="float32").to(device)
    windows = TextDataset(setting.corpus, limit=wanted.windows)
    with stage(f"comparing gradients, {on.student}", "tokens", per_unit=recipe.window) as update:
        rows = measure_gradients(
            {on.student: model},
            windows,
            setting.teacher,
            targets,
            batch_tokens=[size * recipe.window for size in wanted.batch_windows],
            draws=wanted.draws,
            seed=recipe.draw_seed,
            progress=update,
        )
    for row in rows:
        kept.found.setdefault(row.target, []).append(row.to_json())


def _target(
    asked: Asked, recipe: CompareRecipe, setting: Setting, samplers: dict[str, Sampler]
) -> Target:
    """A method's targets, named by the measurement's fingerprint."""
    method = asked.method
    if method.sampler is None:
        return Target(asked.fingerprint, None)
    key = Draw.of(method, recipe, recipe.seeds[0]).key
    if key not in samplers:
        recorded = Cache.open(setting.caches[key]).identity.sampler
        samplers[key] = from_parameters(recorded).ready()
    rounds = None
    if (thinning := method.thinning) is not None:
        rounds = thinning.rounds
        if thinning.budget is not None:  # as training resolves it
            dataset = CacheDataset(setting.caches[key], seed=asked.on.planned.seed)
            rounds = rounds_for_entries(dataset, thinning.budget)
    return Target(asked.fingerprint, samplers[key], method.missing_mass, method.alpha, rounds)


def _gradient(asked: Asked, kept: Sequence[dict[str, Any]], out: Path) -> Gradient:
    """What is kept, as it stands in the results."""
    found = [GradientFidelity.from_json(own) for own in kept]
    rows = sorted(
        (row for row in found if row.space == "parameters"), key=lambda row: row.batch_tokens
    )
    on = asked.on.planned
    assert on.folder is not None  # it is done
    return Gradient(
        student_method=on.method.title,
        student_seed=on.seed,
        student_folder=on.folder.relative_to(out).as_posix(),
        entries=rows[0].entries if asked.method.sampler is not None else None,
        draws=rows[0].draws,
        sizes=[
            GradientSize(
                batch_tokens=row.batch_tokens,
                batches=row.angle.units,
                angle=_of_batches(row.angle),
                norm_ratio=_of_batches(row.norm_ratio),
                bias=row.bias,
                bias_below=row.bias_below,
                noise=row.noise,
            )
            for row in rows
        ],
    )


def _of_batches(estimate: Estimate) -> OfBatches:
    return OfBatches(mean=estimate.mean, low=estimate.low, high=estimate.high)
