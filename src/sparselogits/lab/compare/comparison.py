"""Run a comparison: train and measure all students of a recipe, and write the results.

    OUT/
      corpus/         training and held-out windows, packed
      caches/         caches, see `Draw` in caches.py
      students/       students made from the teacher, see students.py
      tasks/          data of zero-shot tasks, see tasks.py
      runs/           students, trained or measured before training, see runs.py
      finished/       values that are not computed again, see finished.py
      results.json    see results.py; rewritten after every run
      results.csv     metrics from results.json as a table
      windows.npz     per-window sums of all finished runs, see windows.py; written last

The same command resumes an interrupted comparison; finished work is not repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sparselogits.devices import resolve_training_device
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate import evaluate
from sparselogits.files import write_whole
from sparselogits.lab.compare.caches import OpenStage, Setting, key_of, prepare, silent_stage
from sparselogits.lab.compare.finished import FinishedWork
from sparselogits.lab.compare.gradients import measure_missing, with_gradients
from sparselogits.lab.compare.older import convert_older_work
from sparselogits.lab.compare.provenance import provenance
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.results import MethodRow, ReliabilityBin, Results, TeacherRow
from sparselogits.lab.compare.runs import (
    Outcome,
    Planned,
    execute,
    failure_of,
    metrics_by_name,
    outcome_of,
    plan,
)
from sparselogits.lab.compare.summary import Run, method_rows, run_rows
from sparselogits.lab.compare.tasks import (
    TaskSetting,
    measure_missing_tasks,
    measure_tasks,
    prepare_tasks,
    with_tasks,
)
from sparselogits.lab.compare.windows import pack_windows
from sparselogits.teacher.checkpoint import tensor_shapes


class ComparisonState:
    """Outcomes of a comparison's runs, and the rows computed from them.

    Results are rewritten after every run, so a row is computed again only if its method, or a
    method that it is compared with, has a new outcome or failure.

    Args:
        recipe: the comparison.
        setting: result of `caches.prepare`.
    """

    def __init__(self, recipe: CompareRecipe, setting: Setting) -> None:
        self.recipe, self.setting = recipe, setting
        self.planned = plan(recipe, setting)
        self._rows: dict[tuple[object, ...], MethodRow] = {}

    def outcome(self, planned: Planned) -> Outcome | None:
        """Load the outcome of a run; None if the run is not finished."""
        return outcome_of(planned, self.setting.work)

    def runs(self) -> list[Run]:
        """Return all runs, each with its current outcome or failure, if any."""
        work = self.setting.work
        return [Run(each, self.outcome(each), failure_of(each, work)) for each in self.planned]

    def method_rows(self, runs: list[Run]) -> list[MethodRow]:
        """Return a row for each method and student, over the finished seeds of `runs`."""
        return method_rows(runs, self.recipe, self.setting, self._rows)


def compare(
    recipe: CompareRecipe, *, device: str = "cpu", stage: OpenStage = silent_stage
) -> Results:
    """Run the unfinished part of a comparison.

    Runs that have failed are repeated; runs that another process is training are skipped.

    Args:
        recipe: the comparison.
        device: device of teacher and students, as for `train.run`; "auto" for CUDA if it is
            available, otherwise the CPU.
        stage: function that shows the progress of a stage, such as `console.stage`.

    Returns:
        The results of all runs, finished or not; results.json has them with rounded numbers.

    Raises:
        SparseLogitsError: If the teacher, the text or a student cannot be used, the directory
            contains a model, or text or caches with other settings, or lm-eval is needed but not
            installed. The failure of a run, a task or a measurement of gradients is recorded in
            the results.
    """
    device = resolve_training_device(device)
    if (recipe.out / "config.json").exists():
        raise InvalidArgumentError(
            f"{recipe.out} is the folder of a model; choose another folder with --out (out: in the "
            "recipe)"
        )
    recipe.out.mkdir(parents=True, exist_ok=True)
    work = FinishedWork(recipe.out)
    with work.claimed("prepare", wait=True):  # other processes wait
        convert_older_work(recipe.out, work)
        setting = prepare(recipe, work, device=device, stage=stage)
        teacher = _teacher_row(recipe, setting)
        tasks = prepare_tasks(recipe, setting, stage=stage)
    state = ComparisonState(recipe, setting)
    with stage("training", "runs") as update:
        for run in state.planned:
            if run.folder is None or state.outcome(run) is not None:
                continue
            with work.claimed("runs", run.fingerprint) as mine:
                if not mine or state.outcome(run) is not None:
                    continue
                done = sum(state.outcome(other) is not None for other in state.planned)

                def report(step: int, steps: int, done: int = done, title: str = run.title) -> None:
                    update(done, len(state.planned), f"{title}: step {step}/{steps}")

                execute(run, recipe, setting, device=device, progress=report)
                measure_tasks(run, tasks, device=device)
            write_results(state, teacher, tasks)
    measure_missing_tasks(state.planned, tasks, device=device, stage=stage)
    measure_missing(recipe, setting, state.runs(), device=device, stage=stage)
    results = write_results(state, teacher, tasks)
    sums = {run.key: run.outcome.sums for run in state.runs() if run.outcome is not None}
    write_whole(recipe.out / "windows.npz", pack_windows(sums))
    return results


def write_results(
    state: ComparisonState, teacher: TeacherRow | None, tasks: TaskSetting | None
) -> Results:
    """Write results.json and results.csv from all finished work, and return the results."""
    recipe, setting, runs = state.recipe, state.setting, state.runs()
    rows = state.method_rows(runs)
    results = Results(
        title=recipe.title,
        complete=all(run.outcome is not None for run in runs),
        settings=_settings(recipe, setting, runs),
        provenance=provenance(),
        teacher=teacher,
        methods=with_gradients(rows, recipe, setting, runs),
        runs=run_rows(runs, recipe),
    )
    results = with_tasks(results, state.planned, tasks, recipe.resamples)
    text = json.dumps(_rounded(results.model_dump(mode="json")), indent=1)
    write_whole(recipe.out / "results.json", text + "\n")
    write_whole(recipe.out / "results.csv", results.to_csv())
    return results


def _settings(recipe: CompareRecipe, setting: Setting, runs: Sequence[Run]) -> dict[str, Any]:
    corpus, teacher = setting.corpus, setting.teacher
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"methods"}, exclude_none=True),
        "teacher": {
            **{k: v for k, v in teacher.identity.items() if v is not None},
            "parameters": sum(p.numel() for p in teacher.model.parameters()),
            "vocabulary": teacher.vocab_size,
        },
        "corpus": {
            "name": corpus.source_name,
            "fingerprint": corpus.source_fingerprint,
            "training_windows": corpus.windows,
            "training_tokens": corpus.windows * recipe.window,
            "heldout_windows": min(
                corpus.holdout_windows, recipe.heldout_windows or corpus.holdout_windows
            ),
        },
        "student_parameters": {name: _parameters(runs, name) for name in recipe.students},
        **(
            {}
            if setting.corruption is None
            else {"objective": setting.corruption.objective.to_json()}
        ),
    }


_GRID = ("._weight_scale", "._weight_zero_point")
"""Ends of the names of tensors that torchao stores in addition to quantised weights."""


def _parameters(runs: Sequence[Run], student: str) -> int | None:
    """Return a student's number of parameters, read from a run's model.safetensors, or None."""
    for run in runs:
        if run.outcome is None or run.planned.student != student or run.planned.folder is None:
            continue
        file = run.planned.folder / "model" / "model.safetensors"
        if file.exists():
            shapes = tensor_shapes(file)
            return sum(math.prod(shape) for name, shape in shapes if not name.endswith(_GRID))
    return None


def _teacher_row(recipe: CompareRecipe, setting: Setting) -> TeacherRow:
    """Load the metrics of the teacher, or measure and store them."""
    weights, text = setting.teacher.identity["weights"], setting.corpus.source_fingerprint
    key = key_of(setting.corruption, weights, text, recipe.heldout_windows)
    if (stored := setting.work.value("teacher", key)) is not None:
        return TeacherRow.model_validate(stored)
    windows = setting.heldout(recipe.heldout_windows)
    with setting.teacher.remembering():
        found = evaluate({}, windows, setting.teacher, resamples=1)["teacher"]
    bins = found.calibration.to_json()["equal_width"]["bins"]
    row = TeacherRow(
        figures=metrics_by_name(found),
        reliability=[ReliabilityBin.model_validate(each) for each in bins],
        positions=found.positions,
        windows=len(found.positions_by_window),
    )
    setting.work.store("teacher", key, row.model_dump(mode="json"))
    return row


def _rounded(value: Any) -> Any:
    """Round the floats in a JSON value to six significant digits; metrics are less precise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
