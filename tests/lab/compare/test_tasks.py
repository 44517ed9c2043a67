"""Test tasks of a comparison: added without training, stored separately, shown, recorded."""

import csv
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from sparselogits.errors import MissingDependencyError
from sparselogits.lab.compare import Results, compare, parse_compare_recipe, read_results
from sparselogits.lab.compare import tasks as of_comparisons
from sparselogits.lab.report.comparison import report_page
from sparselogits.lab.tasks import run_tasks
from sparselogits.teacher.loading import load_language_model
from sparselogits.train.trainer import SparseKDTrainer
from tests.pages import ROOT

NAMES = ["continuation", "last_word", "agreement"]
FIGURES = ["agreement/acc", "continuation/acc", "continuation/acc_norm"]
FIGURES += ["last_word/acc", "last_word/perplexity"]


@pytest.fixture(scope="module")
def values(tiny, tmp_path_factory) -> dict[str, Any]:
    folder, methods = tmp_path_factory.mktemp("tasks"), ["ce", {"sampler": "topk", "k": 5}]
    return tiny(folder, longest=4000, window=64, holdout=0.4, methods=methods)


def carried_out(values: dict[str, Any], **changes: Any) -> Results:
    return compare(parse_compare_recipe(values | changes, source="test"))


@pytest.fixture(scope="module")
def before(values) -> Results:
    return carried_out(values)


@pytest.fixture(scope="module")
def results(values, before) -> Results:
    """Tasks added to a comparison that is finished, which trains nothing again."""

    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("trained")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseKDTrainer, "train", refuse)
        return carried_out(values, tasks={"names": NAMES, "limit": 20})


def test_tasks_are_added_and_nothing_else_changes(values, before, results):
    assert all(not row.tasks for row in before.methods)
    for old, new in zip(before.runs, results.runs, strict=True):
        assert sorted(new.tasks) == FIGURES
        assert new.tasks_failed == {}
        assert new.model_copy(update={"tasks": {}}) == old
    for old, new in zip(before.methods, results.methods, strict=True):
        assert new.model_copy(update={"tasks": {}}) == old
    assert "tasks" not in before.settings["recipe"]


def test_scores_are_of_the_saved_students(values, results):
    from sparselogits.teacher.loading import load_tokenizer

    tokenizer, out = load_tokenizer(values["teacher"]), Path(values["out"])
    for run in results.runs:
        model = load_language_model(str(out / str(run.folder) / "model"), dtype="float32")
        how = {"limit": 20, "data": out / "tasks", "prefix_token_id": 0}
        found = {own.name: own.value for own in run_tasks(model, tokenizer, NAMES, **how)}
        assert run.tasks == pytest.approx(found)
    assert results.teacher is not None
    teacher = load_language_model(values["teacher"], dtype="float32")
    found = {own.name: own.value for own in run_tasks(teacher, tokenizer, NAMES, **how)}
    assert results.teacher.tasks == pytest.approx(found)


def test_a_method_has_the_mean_of_its_seeds(results):
    for row in results.methods:
        own = [run.tasks for run in results.runs if run.method == row.method]
        for name in FIGURES:
            mean = sum(found[name] for found in own) / 2
            assert row.tasks[name].mean == pytest.approx(mean)
            assert row.tasks[name].both.low <= mean <= row.tasks[name].both.high


def test_they_are_in_every_form(values, results, capsys, monkeypatch):
    out = Path(values["out"])
    stored = read_results(out)
    assert stored.methods[0].tasks.keys() == results.methods[0].tasks.keys()
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    ce = next(line for line in lines if line["method"] == "CE")
    figure = stored.methods[0].tasks["last_word/perplexity"]
    assert float(ce["last_word/perplexity"]) == pytest.approx(figure.mean, rel=1e-5)
    assert float(ce["last_word/perplexity_high"]) == pytest.approx(figure.both.high, rel=1e-5)
    page = report_page(stored)
    assert "Zero-shot tasks" in page
    heads = re.findall(r'<th scope="col"[^>]*><button[^>]*>([^<]*)</button></th>', page)
    assert [head for head in heads if head.startswith(tuple(NAMES))] == [
        *("continuation acc %", "continuation acc_norm %"),
        *("last_word perplexity", "last_word acc %", "agreement acc %"),
    ]
    assert page.count('<th scope="row" class="name">the teacher</th>') == 2
    script = ROOT / "experiments" / "compare" / "tables.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(out / "results.json")])
    runpy.run_path(str(script), run_name="__main__")
    table = capsys.readouterr().out
    assert "| method | continuation acc % | continuation acc_norm % | last_word" in table
    assert "| (the teacher) |" in table


def test_results_without_tasks_are_read_and_show_none(tmp_path):
    stored = json.loads(
        (ROOT / "experiments" / "results" / "compare_small_teacher.json").read_text()
    )
    for row in [*stored["methods"], *stored["runs"], stored["teacher"]]:
        del row["tasks"]
        row.pop("tasks_failed", None)
    (tmp_path / "results.json").write_text(json.dumps(stored))
    old = read_results(tmp_path)
    assert all(row.tasks == {} for row in old.methods)
    assert "Zero-shot" not in report_page(old)


@pytest.mark.slow
def test_nothing_is_scored_twice_and_another_limit_anew(values, results, monkeypatch):
    asked = []

    def watched(model: Any, tokenizer: Any, names: Any, **how: Any) -> Any:
        asked.append((tuple(names), how["limit"]))
        return run_tasks(model, tokenizer, names, **how)

    monkeypatch.setattr(of_comparisons, "run_tasks", watched)
    tasks = {"names": NAMES, "limit": 20}
    assert carried_out(values, tasks=tasks).runs == results.runs
    assert asked == []
    kept = (Path(values["out"]) / "finished" / "tasks").glob("*.json")
    scored = {file: json.loads(file.read_text())["value"][0]["task"] for file in kept}
    next(file for file, task in scored.items() if task == "agreement").unlink()
    assert carried_out(values, tasks=tasks).runs == results.runs
    assert asked == [(("agreement",), 20)]
    asked.clear()
    fewer = carried_out(values, tasks={"names": ["agreement"], "limit": 5})
    assert asked == [(("agreement",), 5)] * 5  # four students and the teacher
    assert [list(run.tasks) for run in fewer.runs] == [["agreement/acc"]] * 4


@pytest.mark.slow
def test_what_fails_is_recorded_and_loses_nothing(values, results, tmp_path, monkeypatch):
    """A task without data, and one student that cannot be scored; both are tried again."""
    out = {
        "out": str(tmp_path / "out"),
        "tasks": {"names": ["agreement", "continuation"], "limit": 8},
    }
    failing = []

    def breaks(model: Any, *others: Any, **how: Any) -> Any:
        if model.config.hidden_size == 16 and not failing:
            failing.append(model)
            raise RuntimeError("out of memory, say")
        return run_tasks(model, *others, **how)

    def no_text(*_: Any, **__: Any) -> Any:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(of_comparisons, "run_tasks", breaks)
        patch.setattr("sparselogits.lab.tasks.local.passages", no_text)
        found = carried_out(values, **out)
    assert [run.status for run in found.runs] == ["done"] * 4
    # the student that failed at first was scored at the end
    assert [list(run.tasks) for run in found.runs] == [["agreement/acc"]] * 4
    assert [run.tasks_failed for run in found.runs] == [{"continuation": "no space left"}] * 4
    assert "Not measured: <bdi>continuation: no space left</bdi>" in report_page(found)

    with monkeypatch.context() as patch:
        patch.setattr(of_comparisons, "load_language_model", no_text)
        found = carried_out(values, **out)
    assert [run.tasks_failed for run in found.runs] == [{"continuation": "no space left"}] * 4
    assert all("agreement/acc" in run.tasks for run in found.runs)
    assert found.teacher is not None
    assert "continuation/acc" in found.teacher.tasks

    found = carried_out(values, **out)
    assert [run.tasks_failed for run in found.runs] == [{}] * 4
    assert all("continuation/acc" in run.tasks for run in found.runs)


def test_without_lm_eval_nothing_is_begun(values, results, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"sparselogits\[tasks\]"):
        carried_out(values, seeds=[7], tasks={"names": ["agreement"]})
    assert not list(Path(values["out"]).glob("runs/*--7--*"))


def test_a_figure_that_no_sample_adds_to_has_seeds_alone():
    from sparselogits.lab.compare.tasks import task_estimates
    from sparselogits.lab.tasks import TaskScore

    scores = [{"t/f1": TaskScore("t", "f1", value, None, 10)} for value in (0.2, 0.4)]
    (figure,) = task_estimates(scores, 50).values()
    assert figure.mean == pytest.approx(0.3)
    assert figure.both.low is None
    assert figure.seeds.low < 0.2
