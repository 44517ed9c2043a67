"""Carry out a comparison: every run of a recipe, then `results.json` and `results.csv`.

    OUT/
      corpus/         training and held-out windows, packed
      caches/         one for each draw that a method needs, all from one pass of the teacher
      students/       students made from the teacher, where the recipe has some; see students.py
      tasks/          data of zero-shot tasks, where the recipe has them; see tasks.py
      runs/           trained students; see runs.py
      finished/       outcomes, scores and measurements by what determines them; see finished.py
      results.json    see results.py; written anew after every run
      results.csv
      windows.npz     per-window sums of all runs, see windows.py; written last

An interrupted comparison continues with the same command: finished work is not done again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sparselogits.data import TextDataset
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate import evaluate
from sparselogits.files import write_whole
from sparselogits.lab.compare.caches import OpenStage, Setting, prepare, silent_stage
from sparselogits.lab.compare.finished import FinishedWork, fingerprint
from sparselogits.lab.compare.gradients import measure_missing, with_gradients
from sparselogits.lab.compare.older import take_over
from sparselogits.lab.compare.provenance import provenance
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.results import MethodRow, ReliabilityBin, Results, TeacherRow
from sparselogits.lab.compare.runs import (
    Outcome,
    Planned,
    carry_out,
    failure_of,
    figures_of,
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


class Standing:
    """The runs of one comparison with their outcomes, and rows that are computed once.

    Results are written anew after every run. To compute every interval again would take two
    seconds each time with a hundred runs of 96 windows and 1 000 resamples, so a row is computed
    again only when an outcome that it depends on is new: that of the method, CE or full KD.

    Args:
        recipe: the comparison.
        setting: see `caches.prepare`.
    """

    def __init__(self, recipe: CompareRecipe, setting: Setting) -> None:
        self.recipe, self.setting = recipe, setting
        self.planned = plan(recipe, setting)
        self._rows: dict[tuple[object, ...], MethodRow] = {}

    def outcome(self, planned: Planned) -> Outcome | None:
        """Return the outcome of a run; None if it is not finished."""
        return outcome_of(planned, self.setting.work)

    def runs(self) -> list[Run]:
        """Return all runs as they are now."""
        work = self.setting.work
        return [Run(own, self.outcome(own), failure_of(own, work)) for own in self.planned]

    def method_rows(self, runs: list[Run]) -> list[MethodRow]:
        """Return a row for every method and student, over the seeds that are done.

        Args:
            runs: as `runs` returned them.
        """
        return method_rows(runs, self.recipe, self.setting, self._rows)


def compare(
    recipe: CompareRecipe, *, device: str = "cpu", stage: OpenStage = silent_stage
) -> Results:
    """Carry out what is left of a comparison.

    Runs that failed before are tried again; runs that another process is training are skipped.

    Args:
        recipe: the comparison.
        device: device of teacher and students.
        stage: shows progress of a piece of work, see `console.stage`.

    Returns:
        The results so far, as stored in `recipe.out`.

    Raises:
        SparseLogitsError: for a teacher or text that cannot be used, a directory that holds a
            model or a comparison of others, or tasks without lm-eval. A run or a task that fails
            raises nothing: it is recorded.
    """
    if (recipe.out / "config.json").exists():
        raise InvalidArgumentError(
            f"{recipe.out} is a model's folder; give --out (in the recipe: out) one of its own"
        )
    recipe.out.mkdir(parents=True, exist_ok=True)
    work = FinishedWork(recipe.out)
    with work.claimed("prepare", wait=True):  # one process prepares, others wait for it
        take_over(recipe.out, work)
        setting = prepare(recipe, work, device=device, stage=stage)
        teacher = _teacher_row(recipe, setting)
        tasks = prepare_tasks(recipe, setting, stage=stage)
    standing = Standing(recipe, setting)
    with stage("training", "runs") as update:
        for run in standing.planned:
            if run.folder is None or standing.outcome(run) is not None:
                continue
            with work.claimed("runs", run.fingerprint) as mine:
                if not mine or standing.outcome(run) is not None:
                    continue
                done = sum(standing.outcome(other) is not None for other in standing.planned)

                def tell(step: int, steps: int, done: int = done, title: str = run.title) -> None:
                    update(done, len(standing.planned), f"{title}: step {step}/{steps}")

                carry_out(run, recipe, setting, device=device, progress=tell)
                measure_tasks(run, tasks, device=device)
            write_results(standing, teacher, tasks)
    measure_missing_tasks(standing.planned, tasks, device=device, stage=stage)
    measure_missing(recipe, setting, standing.runs(), device=device, stage=stage)
    results = write_results(standing, teacher, tasks)
    sums = {run.place: run.outcome.sums for run in standing.runs() if run.outcome is not None}
    write_whole(recipe.out / "windows.npz", pack_windows(sums))
    return results


def write_results(
    standing: Standing, teacher: TeacherRow | None, tasks: TaskSetting | None
) -> Results:
    """Compute the results of all finished work, and write them."""
    recipe, setting, runs = standing.recipe, standing.setting, standing.runs()
    rows = standing.method_rows(runs)
    results = Results(
        title=recipe.title,
        complete=all(run.outcome is not None for run in runs),
        settings=_settings(recipe, setting, runs),
        provenance=provenance(),
        teacher=teacher,
        methods=with_gradients(rows, recipe, setting, runs),
        runs=run_rows(runs, recipe),
    )
    results = with_tasks(results, standing.planned, tasks, recipe.resamples)
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
    }


def _parameters(runs: Sequence[Run], student: str) -> int | None:
    """Return the number of parameters of a student, counted in the weights of a finished run."""
    for run in runs:
        if run.outcome is None or run.planned.student != student or run.planned.folder is None:
            continue
        file = run.planned.folder / "model" / "model.safetensors"
        if file.exists():
            return sum(math.prod(shape) for _, shape in tensor_shapes(file))
    return None


def _teacher_row(recipe: CompareRecipe, setting: Setting) -> TeacherRow:
    weights, text = setting.teacher.identity["weights"], setting.corpus.source_fingerprint
    key = fingerprint([weights, text, recipe.heldout_windows])
    if (kept := setting.work.value("teacher", key)) is not None:
        return TeacherRow.model_validate(kept)
    windows = TextDataset(setting.corpus, limit=recipe.heldout_windows)
    with setting.teacher.remembering():
        found = evaluate({}, windows, setting.teacher, resamples=1)["teacher"]
    bins = found.calibration.to_json()["equal_width"]["bins"]
    row = TeacherRow(
        figures=figures_of(found),
        reliability=[ReliabilityBin.model_validate(own) for own in bins],
        positions=found.positions,
        windows=len(found.positions_by_window),
    )
    setting.work.keep("teacher", key, row.model_dump(mode="json"))
    return row


def _rounded(value: Any) -> Any:
    """Round to six significant digits, more than a metric of some thousand positions has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    return [_rounded(own) for own in value] if isinstance(value, list) else value
