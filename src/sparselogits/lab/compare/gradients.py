"""Compare the gradients of all methods' targets with those of full distillation.

The measured targets are those of training, including thinning, the missing-mass rule and the share
alpha of the labels; CE has the labels as targets. Methods with equal targets share a measurement.
Methods without cached targets, except CE, and methods with a thinning schedule are not measured.

For each student of the recipe, the gradients of all methods are measured on the model of one run.
While another process is training that model, nothing is measured for the student, because the other
process measures when its runs are done. One process measures at a time; others wait.
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
"""Version of the measurement; a new version makes stored measurements invalid."""


@dataclass(frozen=True)
class PlannedMeasurement:
    """Measurement of a method's gradients on one student, which the recipe requires.

    Args:
        method: method whose targets are measured.
        on: run on whose trained model the gradients are computed.
        fingerprint: fingerprint of all inputs that determine the measurement.
    """

    method: MethodSpec
    on: Run
    fingerprint: str


def measure_missing(
    recipe: CompareRecipe, setting: Setting, runs: Sequence[Run], *, device: str, stage: OpenStage
) -> None:
    """Measure the required gradients that are not stored, and store the results or the failures."""
    if recipe.gradients is None:
        return
    work = setting.work
    with work.claimed("gradients", wait=True):
        for student in recipe.students:
            measurements = _planned_measurements(recipe, setting, runs, student)
            missing = {
                each.fingerprint: each
                for each in measurements
                if work.value("gradients", each.fingerprint) is None
            }
            if not missing:
                continue
            try:
                _measure(missing.values(), recipe, recipe.gradients, setting, device, stage)
            except Exception as error:  # a failed measurement must not stop the comparison
                for key in missing:
                    work.fail("gradients", key, reason_of(error))


def with_gradients(
    rows: Sequence[MethodRow], recipe: CompareRecipe, setting: Setting, runs: Sequence[Run]
) -> list[MethodRow]:
    """Return the rows of methods with the stored gradient measurements and failures."""
    if recipe.gradients is None:
        return list(rows)
    measurements = {
        (each.method.title, student): each
        for student in recipe.students
        for each in _planned_measurements(recipe, setting, runs, student)
    }
    found = []
    for row in rows:
        measurement = measurements.get((row.method, row.student))
        fields: dict[str, Any] = {}
        if measurement is not None:
            key = measurement.fingerprint
            fields["gradient_failure"] = setting.work.failure("gradients", key)
            if (measured := setting.work.value("gradients", key)) is not None:
                fields["gradient"] = _gradient(measurement, measured, recipe.out)
        found.append(row.model_copy(update=fields))
    return found


def _planned_measurements(
    recipe: CompareRecipe, setting: Setting, runs: Sequence[Run], student: str
) -> list[PlannedMeasurement]:
    """Return the measurements on a student, one per method with a cache and a constant target.

    See `_has_constant_target`. The result is empty if gradients are not required or no run of the
    student can be measured yet.
    """
    on = _run_to_measure(recipe, [run for run in runs if run.planned.student == student])
    if recipe.gradients is None or on is None:
        return []
    found = []
    for method in recipe.methods:
        cache = setting.caches.get(Draw.of(method, recipe, recipe.seeds[0]).key)
        if cache is None or not _has_constant_target(method):
            continue
        inputs = {
            "measured": MEASURED,
            "cache": Cache.open(cache).identity.fingerprint,
            "text": setting.corpus.source_fingerprint,
            "student": on.planned.fingerprint,
            **_target_settings(method),
            **recipe.gradients.model_dump(mode="json"),
            "seed": recipe.draw_seed,
        }
        found.append(PlannedMeasurement(method, on, fingerprint(inputs)))
    return found


def _run_to_measure(recipe: CompareRecipe, runs: Sequence[Run]) -> Run | None:
    """Return the first run that has not failed, runs of CE before others.

    The result is None if that run is not finished, or if all runs have failed.
    """
    of_ce = [r for r in runs if r.planned.method.method == "ce" and not r.planned.method.alpha]
    of_all = [r for m in recipe.methods for r in runs if r.planned.method.title == m.title]
    for run in (*of_ce, *of_all):
        if run.outcome is not None:
            return run
        if run.failure is None:
            return None
    return None


def _has_constant_target(method: MethodSpec) -> bool:
    """Return whether a method trains on labels alone, or on cached targets without a schedule."""
    if method.sampler is None:
        return method.method == "ce"
    return method.thinning is None or method.thinning.schedule is None


def _target_settings(method: MethodSpec) -> dict[str, Any]:
    """Return the settings of a method that change its target but not its cache."""
    if method.sampler is None:
        return {"labels": True}
    thinned = method.thinning and method.thinning.model_dump(exclude={"fresh_noise", "schedule"})
    return {"missing_mass": method.missing_mass, "alpha": method.alpha, "thinning": thinned}


def _measure(
    missing: Iterable[PlannedMeasurement],
    recipe: CompareRecipe,
    wanted: Gradients,
    setting: Setting,
    device: str,
    stage: OpenStage,
) -> None:
    """Measure the gradients of targets for one student, and store them."""
    samplers: dict[str, Sampler] = {}  # targets of the same sampler object share their draws
    targets, on = [], None
    for each in missing:
        on = each.on.planned
        try:
            targets.append(_target(each, recipe, setting, samplers))
        except Exception as error:  # the other targets are measured
            setting.work.fail("gradients", each.fingerprint, reason_of(error))
    if not targets:
        return
    assert on is not None
    assert on.folder is not None  # a finished run has a folder
    model = load_language_model(str(on.folder / "model"), dtype="float32").to(device)
    windows = TextDataset(setting.corpus, limit=wanted.windows, corruption=setting.corruption)
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
        setting.work.store("gradients", key, measured)


def _target(
    measurement: PlannedMeasurement,
    recipe: CompareRecipe,
    setting: Setting,
    samplers: dict[str, Sampler],
) -> Target:
    """Return the target to measure; add its sampler to `samplers`, by key of the cache."""
    method = measurement.method
    if method.sampler is None:
        return Target(measurement.fingerprint, None)
    key = Draw.of(method, recipe, recipe.seeds[0]).key
    if key not in samplers:
        recorded = Cache.open(setting.caches[key]).identity.sampler
        samplers[key] = from_parameters(recorded).ready()
    rounds = None
    if (thinning := method.thinning) is not None:
        rounds = thinning.rounds
        if thinning.budget is not None:  # converted to rounds as in training
            dataset = CacheDataset(setting.caches[key], seed=measurement.on.planned.seed)
            rounds = rounds_for_entries(dataset, thinning.budget)
    return Target(measurement.fingerprint, samplers[key], method.missing_mass, method.alpha, rounds)


def _gradient(
    measurement: PlannedMeasurement, measured: Sequence[dict[str, Any]], out: Path
) -> Gradient:
    """Convert stored `GradientFidelity` values of the space "parameters" to a `Gradient`."""
    found = [GradientFidelity.from_json(each) for each in measured if each["space"] == "parameters"]
    rows = sorted(found, key=lambda row: row.batch_tokens)
    on = measurement.on.planned
    assert on.folder is not None  # a finished run has a folder
    return Gradient(
        student_method=on.method.title,
        student_seed=on.seed,
        student_folder=on.folder.relative_to(out).as_posix(),
        entries=rows[0].entries if measurement.method.sampler is not None else None,
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
