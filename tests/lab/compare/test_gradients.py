"""Test gradients in a comparison: correct, computed once, and isolated in failure."""

import csv
import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from sparselogits.corpus import PackedCorpus
from sparselogits.data import CacheDataset, TextDataset, rounds_for_entries
from sparselogits.lab.compare import MethodRow, Results, compare, parse_compare_recipe, read_results
from sparselogits.lab.compare import gradients as room
from sparselogits.lab.compare.finished import FinishedWork
from sparselogits.lab.gradients import Target, measure_gradients
from sparselogits.samplers import from_parameters
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer
from sparselogits.train.trainer import SparseKDTrainer

SYSTEMATIC = {"sampler": "systematic", "budget": 6}
METHODS: list[Any] = [
    {"sampler": "topk", "k": 5, "missing_mass": ["drop", "ghost"]},
    "full",
    SYSTEMATIC,
    {**SYSTEMATIC, "alpha": 0.5},
    {**SYSTEMATIC, "name": "fresh", "thinning": {"budget": 3}},
    {**SYSTEMATIC, "name": "frozen", "thinning": {"budget": 3, "fresh_noise": False}},
    {**SYSTEMATIC, "thinning": {"schedule": [{"rounds": 3, "until": 0.5}, {"rounds": 4}]}},
    {**SYSTEMATIC, "name": "too much", "thinning": {"budget": 500}},
    "ce",
]
GRADIENTS = {"windows": 5, "batch_windows": [2, 1], "draws": 3}
RECORD = Path(__file__).parents[3] / "experiments" / "results" / "compare_small_teacher.json"


@pytest.fixture(scope="module")
def values(tiny, tmp_path_factory) -> dict[str, Any]:
    own = {"training": {"per_device_train_batch_size": 8}, "seeds": [0], "resamples": 20}
    folder = tmp_path_factory.mktemp("gradients")
    return tiny(folder, gradients=GRADIENTS, methods=METHODS, **own)


def compared(values: dict[str, Any], **changes: Any) -> Results:
    return compare(parse_compare_recipe(values | changes, source="test"))


@pytest.fixture(scope="module")
def results(values) -> Results:
    return compared(values)


@pytest.fixture
def copied(results, values, tmp_path) -> dict[str, Any]:
    """The same comparison in a directory of its own, all runs done, no gradients measured."""
    out = tmp_path / "out"
    shutil.copytree(values["out"], out)
    shutil.rmtree(out / "finished" / "gradients")
    return values | {"out": str(out)}


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """How many targets each call to the measurement was for."""
    calls: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[3]))
        return measure_gradients(*arguments, **options)

    monkeypatch.setattr(room, "measure_gradients", watched)
    return calls


def rows_of(results: Results) -> dict[str, MethodRow]:
    return {row.method: row for row in results.methods}


def test_figures_are_those_of_the_methods_targets_on_the_student_of_ce(results, values):
    rows, out = rows_of(results), Path(values["out"])
    teacher = load_teacher(values["teacher"], tokenizer=load_tokenizer(values["teacher"]))
    ce = next(run for run in results.runs if run.method == "CE")
    student = load_language_model(str(out / str(ce.folder) / "model"), dtype="float32")
    own = rows["systematic 6"].sampler
    assert own is not None
    sampler = from_parameters(own)
    (cache,) = (out / "caches").glob("systematic*")
    rounds = rounds_for_entries(CacheDataset(cache, seed=0), 3)
    assert rounds < (sampler.rounds or 0)
    targets = [
        Target("Top-K 5, ghost", from_parameters({"name": "topk", "k": 5}), "ghost"),
        Target("systematic 6", sampler),
        Target("systematic 6, alpha 0.5", sampler, alpha=0.5),
        Target("fresh", sampler, rounds=rounds),
        Target("CE", None),
    ]
    windows = TextDataset(PackedCorpus.open(out / "corpus"), limit=5)
    options: dict[str, Any] = {"batch_tokens": [32, 64], "draws": 3}
    for row in measure_gradients({"s": student}, windows, teacher, targets, **options):
        if row.space != "parameters":
            continue
        found = rows[row.target].gradient
        assert found is not None
        assert (found.student_method, found.student_seed) == ("CE", 0)
        assert found.student_folder == ce.folder
        size = found.sizes[0 if row.batch_tokens == 32 else 1]
        assert (size.batch_tokens, size.batches) == (row.batch_tokens, row.angle.units)
        assert found.draws == row.draws
        assert size.angle.mean == pytest.approx(row.angle.mean, rel=1e-9)
        assert size.angle.high == pytest.approx(row.angle.high, rel=1e-9)
        assert size.norm_ratio.mean == pytest.approx(row.norm_ratio.mean, rel=1e-9)
        assert size.noise == pytest.approx(row.noise, rel=1e-9, abs=1e-12)
        assert (size.bias, size.bias_below) == (row.bias, row.bias_below)
        assert found.entries == (None if row.target == "CE" else row.entries)


def test_what_has_no_one_target_has_no_gradient(results):
    rows = rows_of(results)
    schedule = next(name for name in rows if "schedule" in name)
    for name in ("full KD", schedule):
        assert rows[name].seeds_done == [0]
        assert rows[name].gradient is None
        assert rows[name].gradient_failure is None


def test_equal_targets_share_a_measurement(copied, results, measured):
    assert compared(copied).methods == results.methods  # and all of it comes out as before
    assert measured == [6]  # "frozen" is measured as "fresh" is
    rows = rows_of(results)
    assert rows["fresh"].gradient == rows["frozen"].gradient is not None


def test_one_method_that_cannot_be_measured_does_not_stop_the_others(results):
    rows = rows_of(results)
    assert "500 entries" in (rows["too much"].gradient_failure or "")
    assert rows["too much"].gradient is None
    assert sum(row.gradient is not None for row in results.methods) == 7


def test_nothing_is_measured_twice_and_methods_may_be_added(copied, results, measured, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("trained")

    with monkeypatch.context() as patch:
        patch.setattr(SparseKDTrainer, "train", refuse)
        without = {k: v for k, v in copied.items() if k != "gradients"}
        few = [own for own in METHODS if "too much" not in str(own)]
        plain = compared(without, methods=few)  # the key does not make other runs of them
        assert all(row.gradient is None for row in plain.methods)
        assert "gradients" not in plain.settings["recipe"]
        compared(copied, methods=few[2:])
        assert measured == [4]
        compared(copied, methods=few)
        assert measured == [4, 2]  # those of Top-K
        again = compared(copied, methods=few)
        assert measured == [4, 2]
    assert again.methods == [row for row in results.methods if row.method != "too much"]


def test_a_measurement_that_breaks_loses_nothing_else(copied, results, measured):
    found = compared(copied, gradients={"windows": 5000, "batch_windows": [5000]})
    row = rows_of(found)["systematic 6"]
    assert "use more text or smaller batches" in (row.gradient_failure or "")
    assert row.figures == rows_of(results)["systematic 6"].figures
    done = [[run for run in own.runs if run.status == "done"] for own in (found, results)]
    assert done[0] == done[1]
    compared(copied, gradients={"windows": 5000, "batch_windows": [5000]})
    assert len(measured) == 2  # tried again
    assert compared(copied).methods == results.methods


def test_without_the_student_of_ce_another_is_taken(copied, results, monkeypatch):
    ce = next(run for run in results.runs if run.method == "CE")
    folder = Path(copied["out"]) / str(ce.folder)
    key = next(
        file.stem
        for file in (Path(copied["out"]) / "finished" / "runs").glob("*.json")
        if folder.name.endswith(file.stem[:8])
    )
    work = FinishedWork(Path(copied["out"]))
    (work.folder / "runs" / f"{key}.json").unlink()
    with work.claimed("runs", key):  # by another process, which will measure
        found = compared(copied)
    assert all(row.gradient is None for row in found.methods)

    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory, say")

    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(SparseKDTrainer, "train", breaks)
        failed = compared(copied)
    other = rows_of(failed)["systematic 6"].gradient
    assert other is not None
    assert other.student_method == "Top-K 5"
    again = rows_of(compared(copied))
    assert again["systematic 6"].gradient == rows_of(results)["systematic 6"].gradient


def test_processes_on_one_directory_measure_once(copied, results, measured):
    found: list[Results] = []
    with FinishedWork(Path(copied["out"])).claimed("gradients"):
        both = [threading.Thread(target=lambda: found.append(compared(copied))) for _ in range(2)]
        for one in both:
            one.start()
        both[0].join(timeout=0.5)
        assert not measured
    for one in both:
        one.join()
    assert measured == [6]
    assert [own.methods for own in found] == [results.methods] * 2


def test_stored_as_json_and_csv(results, values):
    stored = read_results(Path(values["out"]))
    lines = csv.DictReader(io.StringIO((Path(values["out"]) / "results.csv").read_text()))
    for row, line in zip(stored.methods, lines, strict=False):
        if row.gradient is None:
            assert line["gradient_angle"] == ""
            continue
        largest = row.gradient.sizes[-1]
        assert largest.batch_tokens == int(line["gradient_batch_tokens"]) == 64
        assert float(line["gradient_angle"]) == pytest.approx(largest.angle.mean, rel=1e-5)
        assert float(line["gradient_angle_high"]) == pytest.approx(largest.angle.high, rel=1e-5)


def test_results_stored_before_there_were_gradients_are_read(tmp_path):
    stored = json.loads(RECORD.read_text())
    for row in stored["methods"]:
        del row["gradient"], row["gradient_failure"]
    (tmp_path / "results.json").write_text(json.dumps(stored))
    old = read_results(tmp_path).methods
    assert all(row.gradient is None for row in old)
    assert [row.figures for row in old] == [row.figures for row in read_results(RECORD).methods]
