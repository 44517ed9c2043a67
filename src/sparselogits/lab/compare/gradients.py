"""Compare the gradients of a comparison's targets with those of full distillation.

The targets of a method are those of its training: the fitted sampler, the missing-mass rule, the
share of labels (alpha adds their gradient), thinned to its rounds. They are compared with full
distillation without labels. CE is the gradient of the labels. Methods with equal targets (fresh and
frozen noise of one thinning) share a measurement. Methods without cached targets and with a
thinning schedule, which has no single target, are not measured.

The student is that of CE with the first seed whose run did not fail; if there is none, that of the
first method with one. A run that another process is training is waited for: the
process that finishes it measures. One process measures at a time (finished.py), others wait.

Cost: see `lab/gradients/measure.py`; one pass of the teacher over the windows for each student.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselogits.data import CacheDataset, TextDataset, rounds_for_entries
from sparselogits.errors import reason_of
from sparselogits.evaluate import Estimate
from sparselogits.lab.compare.caches import Draw, OpenStage, Setting
from sparselogits.lab.compare.finished import fingerprint
from sparselogits.lab.compare.recipe import CompareRecipe, Gradients, MethodSpec
from sparselogits.lab.compare.results import Gradient, GradientSize, MethodRow, OfBatches
from sparselogits.lab.compare.summary import Run
from sparselogits.lab.gradients import GradientFidelity, Target, measure_gradients
from sparselogits.samplers import Sampler, from_parameters
from sparselogits.store import Cache
from sparselogits.teacher.loading import load_language_model

MEASURED = 1
"""Raised when the measurement changes, so that older ones are not used."""


@dataclass(frozen=True)
class Asked:
    """A measurement that the recipe asks for.

    Args:
        method: method whose targets are measured.
        student: name of the student.
        on: run whose student is measured.
        fingerprint: fingerprint of everything that determines the measurement.
    """

    method: MethodSpec
    student: str
    on: Run
    fingerprint: str


def measure_missing(
    recipe: CompareRecipe, setting: Setting, runs: Sequence[Run], *, device: str, stage: OpenStage
) -> None:
    """Measure the gradients that the recipe asks for and that are not kept yet.

    Args:
        recipe: the comparison.
        setting: see `caches.prepare`.
        runs: all runs of the recipe.
        device: device of the students.
        stage: shows the progress.
    """
    if recipe.gradients is None:
        return
    work = setting.work
    with work.claimed("gradients", wait=True):
        for student in recipe.students:
            asked = _asked(recipe, setting, runs, student)
            missing = {
                own.fingerprint: own
                for own in asked
                if work.value("gradients", own.fingerprint) is None
            }
            if not missing:
                continue
            try:
                _measure(missing.values(), recipe, recipe.gradients, setting, device, stage)
            except Exception as error:  # whatever it is, nothing else is lost to it
                for key in missing:
                    work.fail("gradients", key, reason_of(error))


def with_gradients(
    rows: Sequence[MethodRow], recipe: CompareRecipe, setting: Setting, runs: Sequence[Run]
) -> list[MethodRow]:
    """Return the rows with the measurements of their gradients.

    Args:
        rows: rows of the methods.
        recipe: the comparison.
        setting: see `caches.prepare`.
        runs: all runs of the recipe.
    """
    if recipe.gradients is None:
        return list(rows)
    asked = {
        (own.method.title, student): own
        for student in recipe.students
        for own in _asked(recipe, setting, runs, student)
    }
    found = []
    for row in rows:
        own = asked.get((row.method, row.student))
        more: dict[str, Any] = {}
        if own is not None:
            measured = setting.work.value("gradients", own.fingerprint)
            more["gradient_failure"] = setting.work.failure("gradients", own.fingerprint)
            if measured is not None:
                more["gradient"] = _gradient(own, measured, recipe.out)
        found.append(row.model_copy(update=more))
    return found


def _asked(
    recipe: CompareRecipe, setting: Setting, runs: Sequence[Run], student: str
) -> list[Asked]:
    """Return the measurements of one student: one for each method with a single target."""
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
        found.append(Asked(method, student, on, fingerprint(determined)))
    return found


def _run_to_measure(recipe: CompareRecipe, runs: Sequence[Run]) -> Run | None:
    """Return the run whose student is measured; None while another process trains it."""
    by_method = [[r for r in runs if r.planned.method.title == m.title] for m in recipe.methods]
    of_ce = [r for r in runs if r.planned.method.method == "ce" and not r.planned.method.alpha]
    for run in (*of_ce, *(run for own in by_method for run in own)):
        if run.outcome is not None:
            return run
        if run.failure is None:
            return None
    return None


def _has_targets(method: MethodSpec) -> bool:
    """Return whether a method has a single target: cached ones without a schedule, or labels."""
    if method.sampler is None:
        return method.method == "ce"
    return method.thinning is None or method.thinning.schedule is None


def _of_targets(method: MethodSpec) -> dict[str, Any]:
    """Return what distinguishes the targets of methods that share a cache."""
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
    device: str,
    stage: OpenStage,
) -> None:
    """Measure the targets of one student, and keep the measurements."""
    samplers: dict[
        str, Sampler
    ] = {}  # one object for equal samplers, so that targets are drawn once
    targets, on = [], None
    for own in missing:
        on = own.on.planned
        try:
            targets.append(_target(own, recipe, setting, samplers))
        except Exception as error:  # the others are measured
            setting.work.fail("gradients", own.fingerprint, reason_of(error))
    if not targets:
        return
    assert on is not None
    assert on.folder is not None  # it is done
    model = load_language_model(str(on.folder / "model"), dtype="float32").to(device)
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
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.target, []).append(row.to_json())
    for key, measured in found.items():
        setting.work.keep("gradients", key, measured)


def _target(
    asked: Asked, recipe: CompareRecipe, setting: Setting, samplers: dict[str, Sampler]
) -> Target:
    """Build the target of a method; its name is the fingerprint of the measurement."""
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
    """Return a measurement as the results store it."""
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
