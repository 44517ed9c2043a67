"""A recipe -> every run of it -> `results.json` and `results.csv`.

    OUT/
      corpus/         training and held-out windows, packed
      caches/         one for each draw that a method needs, all from one pass of the teacher
      students/       students made from the teacher, where the recipe has some; see students.py
      tasks/          zero-shot tasks, where the recipe has them; see task_scores.py
      draws.json      what budgets came to
      runs/           see runs.py
      teacher.json    the teacher on the held-out windows
      gradients.json  gradients of the targets, where the recipe asks for them; see gradients.py
      results.json    see results.py; written anew after every run
      results.csv
      windows.npz     per-window sums of all runs, see windows.py; written last

Interrupted at any moment, the same command goes on: text, caches and runs that are there stay.
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
from sparselogits.lab.compare.gradients import measure_missing, with_gradients
from sparselogits.lab.compare.provenance import provenance
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.results import ReliabilityBin, Results, TeacherRow
from sparselogits.lab.compare.runs import carry_out, claimed, figures_of
from sparselogits.lab.compare.standing import Standing
from sparselogits.lab.compare.summary import Run, run_rows
from sparselogits.lab.compare.task_scores import with_tasks
from sparselogits.lab.compare.tasks import measure_missing_tasks, measure_tasks, prepare_tasks
from sparselogits.lab.compare.windows import pack_windows
from sparselogits.locks import lock_file


def compare(
    recipe: CompareRecipe, *, device: str = "cpu", stage: OpenStage = silent_stage
) -> Results:
    """Carry out what is left of a comparison.

    Runs that failed before are tried again; runs another process has in hand are left to it.

    Args:
        recipe: the comparison.
        device: of teacher and students.
        stage: shows progress of a piece of work, see `console.stage`.

    Returns:
        What is known now, as stored in `recipe.out`.

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
    with lock_file(recipe.out / "lock", wait=True):  # one process prepares, others wait for it
        setting = prepare(recipe, device=device, stage=stage)
        teacher = _teacher_row(recipe, setting)
        tasks = prepare_tasks(recipe, setting, stage=stage)
    standing = Standing(recipe, setting)
    with stage("training", "runs") as update:
        for run in standing.planned:
            if run.folder is None or standing.outcome(run) is not None:
                continue
            with claimed(run) as mine:
                if not mine or standing.outcome(run) is not None:
                    continue
                done = sum(standing.outcome(other) is not None for other in standing.planned)

                def tell(step: int, steps: int, done: int = done, title: str = run.title) -> None:
                    update(done, len(standing.planned), f"{title}: step {step}/{steps}")

                carry_out(run, recipe, setting, device=device, progress=tell)
                measure_tasks(run, tasks, device=device)
            write_results(standing, teacher)
    measure_missing_tasks(standing.planned, tasks, device=device, stage=stage)
    measure_missing(recipe, setting, standing.runs(), device=device, stage=stage)
    results = write_results(standing, teacher)
    sums = {run.place: run.outcome.sums for run in standing.runs() if run.outcome is not None}
    write_whole(recipe.out / "windows.npz", pack_windows(sums))
    return results


def write_results(standing: Standing, teacher: TeacherRow | None) -> Results:
    """Put together what is known now, and store it."""
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
    results = with_tasks(results, recipe)
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
    """Of a student, counted in the weights of a finished run."""
    from safetensors import safe_open

    for run in runs:
        if run.outcome is None or run.planned.student != student or run.planned.folder is None:
            continue
        file = run.planned.folder / "model" / "model.safetensors"
        if file.exists():
            with safe_open(file, "pt") as weights:
                shapes = [weights.get_slice(k).get_shape() for k in weights.keys()]  # noqa: SIM118
                return int(sum(math.prod(shape) for shape in shapes))
    return None


def _teacher_row(recipe: CompareRecipe, setting: Setting) -> TeacherRow:
    file = recipe.out / "teacher.json"
    key = [setting.teacher.identity["weights"], setting.corpus.source_fingerprint]
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["of"] == [*key, recipe.heldout_windows]:
            return TeacherRow.model_validate(kept["row"])
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
    kept = {"of": [*key, recipe.heldout_windows], "row": row.model_dump(mode="json")}
    write_whole(file, json.dumps(kept) + "\n")
    return row


def _rounded(value: Any) -> Any:
    """Six significant digits: what a figure of some thousand positions can hold, twice over."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    return [_rounded(own) for own in value] if isinstance(value, list) else value
