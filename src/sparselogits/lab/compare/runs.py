"""Train and measure the students of a comparison, one per run.

    OUT/runs/METHOD--STUDENT--SEED--KEY/    the student, see train/run.py
    OUT/finished/runs/FINGERPRINT.json      outcome of the run, see finished.py

The fingerprint covers the identity of the cache, text, method, student, training settings, seed,
held-out windows and drafting, but neither names nor the device; KEY is the first eight digits of
the fingerprint. A finished run is not repeated when other settings of the recipe change, and keeps
its folder. Processes may share a directory; each skips runs that another process is training.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparselogits.errors import reason_of
from sparselogits.evaluate import METRICS, HeldOut, draft_from_prefixes, evaluate
from sparselogits.lab.compare.caches import Draw, Setting
from sparselogits.lab.compare.finished import FinishedWork, fingerprint
from sparselogits.lab.compare.provenance import commit
from sparselogits.lab.compare.recipe import UNTRAINED, CompareRecipe, MethodSpec, slug
from sparselogits.store import Cache
from sparselogits.teacher.checkpoint import files_fingerprint, find_checkpoint
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.loading import load_language_model
from sparselogits.train import Recipe, RunResult, run, save_untrained
from sparselogits.train.recipe import with_old_names

OUTCOME = 1
"""Version of the measurements in an outcome; a new version makes stored outcomes invalid."""


@dataclass(frozen=True)
class Planned:
    """Run that a recipe defines, finished or not.

    Args:
        method: training method with its targets.
        student: name of the student.
        seed: random seed for initial weights and the order of windows.
        folder: folder of the run; None if the cache of the run could not be built.
        fingerprint: fingerprint of the run, see the module's docstring; empty without a cache.
        why_not: reason why the cache could not be built; None if it was built.
    """

    method: MethodSpec
    student: str
    seed: int
    folder: Path | None
    fingerprint: str
    why_not: str | None = None

    @property
    def title(self) -> str:
        """Name of the run in progress messages."""
        return f"{self.method.title}, {self.student}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """Measurements of a finished run.

    Args:
        fingerprint: fingerprint of the run, see `Planned`.
        figures: metrics by name.
        sums: sums per window by the names in `METRICS`, [W, C] as lists, see `HeldOut.sums`.
        reliability: bins of two reliability diagrams, by `equal_width` and `equal_mass`.
        drafting: result of `Drafting.to_json`; None if drafting was not measured.
        curve: pairs of step and training cross-entropy to the labels, in nats.
        entries: mean entries per position of the cache, or at the last log line if thinned; None
            without cached targets.
        steps: number of optimiser steps.
        tokens: number of steps times tokens per step, with padding.
        seconds: wall time of training in seconds; None if training was resumed.
        cpu_seconds: processor time of creating and training the student, all threads, in seconds;
            None if training was resumed.
        commit: commit of the source tree; None in outcomes of earlier versions.
    """

    fingerprint: str
    figures: dict[str, float]
    sums: dict[str, list[list[float]]]
    reliability: dict[str, list[dict[str, Any]]]
    drafting: dict[str, Any] | None
    curve: list[tuple[int, float]]
    entries: float | None
    steps: int
    tokens: int
    seconds: float | None
    cpu_seconds: float | None
    commit: str | None = None


def plan(recipe: CompareRecipe, setting: Setting) -> list[Planned]:
    """Return all runs of a recipe, ordered by seed, then by student, then by method."""
    heldout = {"windows": recipe.heldout_windows, "draft": [recipe.draft, recipe.draft_windows]}
    identities = {key: Cache.open(path).identity for key, path in setting.caches.items()}
    weights = {
        name: {"weights": files_fingerprint(find_checkpoint(model_named(student.path)))}
        for name, student in setting.students.items()
        if student.path is not None
    }
    runs = recipe.out / "runs"
    folders = {path.name.rpartition("--")[2]: path for path in runs.glob("*--*")}
    found = []
    for seed in recipe.seeds:
        for name, student in recipe.students.items():
            for method in recipe.methods:
                existing = setting.students[name].path is not None
                if method.method == UNTRAINED and existing and seed != recipe.seeds[0]:
                    continue  # the weights are the same for every seed
                key = Draw.of(method, recipe, seed).key
                if key not in identities:
                    why = setting.failures.get(key, "its cache was not built")
                    found.append(Planned(method, name, seed, None, "", why))
                    continue
                training = recipe.training.model_dump(mode="json", exclude={"save_steps"})
                inputs = {
                    "outcome": OUTCOME,
                    "cache": identities[key].fingerprint,
                    "text": setting.corpus.source_fingerprint,
                    "method": in_fingerprint(method),
                    "student": weights.get(name, {}) | student.model_dump(mode="json"),
                    "training": with_old_names(training),
                    "seed": seed,
                    "heldout": heldout,
                }
                key = fingerprint(inputs)
                words = [slug(method.title)[:60], slug(name), str(seed), key[:8]]
                # a run keeps its folder when a method or a student is renamed
                folder = folders.setdefault(key[:8], runs / "--".join(words))
                found.append(Planned(method, name, seed, folder, key))
    return found


def outcome_of(planned: Planned, work: FinishedWork) -> Outcome | None:
    """Load the outcome of a run; None if the run is not finished."""
    found = work.value("runs", planned.fingerprint)
    return None if found is None else Outcome(**found)


def failure_of(planned: Planned, work: FinishedWork) -> str | None:
    """Return why a run's cache was not built, or why the run's last attempt failed, or None."""
    return planned.why_not or work.failure("runs", planned.fingerprint)


def execute(
    planned: Planned,
    recipe: CompareRecipe,
    setting: Setting,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train and measure a student, and store the outcome or the reason for a failure.

    Args:
        planned: the run.
        recipe: the comparison.
        setting: result of `caches.prepare`.
        device: device of the student.
        progress: function that is called with the number of steps done and the total number.
    """
    try:
        outcome = _train_and_measure(planned, recipe, setting, device, progress)
    except Exception as error:  # a failed run must not stop the others
        why, where = reason_of(error), traceback.format_exc()
        setting.work.fail("runs", planned.fingerprint, why, traceback=where)
        return
    setting.work.store("runs", planned.fingerprint, asdict(outcome))


def _train_and_measure(
    planned: Planned,
    recipe: CompareRecipe,
    setting: Setting,
    device: str,
    progress: Callable[[int, int], None] | None,
) -> Outcome:
    assert planned.folder is not None
    resumed = (planned.folder / "recipe.json").exists()
    clock = time.process_time()
    training_recipe = _training_recipe(planned, recipe, setting)
    if planned.method.method == UNTRAINED:
        result = save_untrained(training_recipe)
    else:
        result = run(
            training_recipe,
            teacher=setting.teacher if planned.method.online else None,
            device=device,
            progress=None if progress is None else lambda done, total, _: progress(done, total),
        )
    cpu_seconds = time.process_time() - clock
    model = load_language_model(str(result.model_path), dtype="float32").to(device)
    windows = setting.heldout(recipe.heldout_windows)
    with setting.teacher.remembering():  # all runs share the teacher's pass over these windows
        found = evaluate({"student": model}, windows, setting.teacher, resamples=1)["student"]
    drafting = None
    if recipe.draft:
        windows = setting.heldout(recipe.draft_windows)
        drafting = draft_from_prefixes(
            model, windows, setting.teacher, draft=recipe.draft, seed=planned.seed
        ).to_json()
    training = recipe.training
    windows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    tokens = result.steps * windows_per_step * recipe.window
    calibration = found.calibration.to_json()
    return Outcome(
        fingerprint=planned.fingerprint,
        figures=metrics_by_name(found),
        sums={name: found.sums(name).tolist() for name in METRICS},
        reliability={name: calibration[name]["bins"] for name in ("equal_width", "equal_mass")},
        drafting=drafting,
        curve=result.label_curve,
        entries=_entries(planned, recipe, setting, result),
        steps=result.steps,
        tokens=tokens,
        seconds=None if resumed else result.seconds,
        cpu_seconds=None if resumed else cpu_seconds,
        commit=commit(),
    )


def metrics_by_name(found: HeldOut) -> dict[str, float]:
    """Return the computed metrics of a model on held-out text, by their names in results.json."""
    metrics = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "agreement": found.agreement,
        "acceptance": found.acceptance,
        "accuracy": found.calibration.accuracy,
        "confidence": found.calibration.confidence,
        "overconfidence": found.calibration.overconfidence,
        "ece": found.calibration.equal_width.ece,
        "ece_equal_mass": found.calibration.equal_mass.ece,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def _training_recipe(planned: Planned, recipe: CompareRecipe, setting: Setting) -> Recipe:
    assert planned.folder is not None
    method = planned.method
    training = recipe.training.model_dump()
    if method.learning_rate is not None:
        training["learning_rate"] = method.learning_rate
    return Recipe(
        cache=setting.caches[Draw.of(method, recipe, planned.seed).key],
        out=planned.folder,
        method="ce" if method.method == UNTRAINED else method.method,
        student=setting.students[planned.student],
        teacher=recipe.teacher if method.online else None,
        teacher_dtype=recipe.teacher_dtype,
        alpha=method.alpha,
        beta=method.beta,
        cosine=method.cosine,
        missing_mass=method.missing_mass,
        thinning=method.thinning,
        seed=planned.seed,
        save_dtype="float32",  # the measured weights are those that were trained
        **training,
    )


_FIELDS_OF_SAMPLERS = (
    *("rounds", "proposal_exponent", "k", "p", "max_entries", "tau"),
    *("student", "nominal_rounds", "reference", "signal", "position_power", "token_power"),
)
"""Sampler fields that earlier versions included in the fingerprint of every method."""


def in_fingerprint(method: MethodSpec) -> dict[str, Any]:
    """Return the values of a method that enter fingerprints, in the form of earlier versions."""
    later = {name for name in ("learning_rate", "beta", "cosine") if not getattr(method, name)}
    values = method.model_dump(mode="json", exclude={"name"} | later)
    return dict.fromkeys(_FIELDS_OF_SAMPLERS) | values


def _entries(
    planned: Planned, recipe: CompareRecipe, setting: Setting, result: RunResult
) -> float | None:
    method = planned.method
    if method.sampler is None:
        return None
    if method.thinning is not None:
        return result.entries
    cache = Cache.open(setting.caches[Draw.of(method, recipe, planned.seed).key])
    return cache.statistics().entries_per_position
