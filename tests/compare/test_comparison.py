"""Comparisons on a tiny teacher: alike but for the method, resumed, failing in parts, stored."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparselogits.compare import Results, compare, parse_compare_recipe, read_results
from sparselogits.compare.caches import prepare
from sparselogits.compare.runs import Planned
from sparselogits.compare.standing import Standing
from sparselogits.data import CacheDataset, WindowRequest
from sparselogits.errors import InvalidArgumentError
from sparselogits.store import Cache
from sparselogits.train.trainer import SparseKDTrainer

METHODS: list[Any] = [
    "ce",
    "full",
    {"sampler": "topk", "k": 5, "missing_mass": ["drop", "ghost"]},
    {"sampler": "systematic", "budget": 6},
    {"sampler": "systematic", "budget": 6, "alpha": 0.5},
    {"sampler": "uniform", "budget": 2000},  # more than there are tokens: cannot be
]


@pytest.fixture(scope="module")
def values(tiny: Any, tmp_path_factory: Any) -> dict[str, Any]:
    return tiny(tmp_path_factory.mktemp("compare"), heldout_windows=8, methods=METHODS)


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Any]]:
    """What every run began with: its first weights and the windows it asked for."""
    return {}


@pytest.fixture(scope="module")
def results(values: dict[str, Any], seen: dict[str, list[Any]]) -> Results:
    with pytest.MonkeyPatch.context() as patch:
        train = SparseKDTrainer.train
        read = CacheDataset.__getitem__

        def watched_train(self: Any, *arguments: Any, **options: Any) -> Any:
            first = {k: v.clone() for k, v in self.model.state_dict().items()}
            seen[Path(self.args.output_dir).parent.name] = [first]
            self.train_dataset.asked = seen[Path(self.args.output_dir).parent.name]
            return train(self, *arguments, **options)

        def watched_read(self: Any, request: int | WindowRequest) -> Any:
            item = read(self, request)
            if hasattr(self, "asked"):
                self.asked.append(item["input_ids"].clone())
            return item

        patch.setattr(SparseKDTrainer, "train", watched_train)
        patch.setattr(CacheDataset, "__getitem__", watched_read)
        return compare(parse_compare_recipe(values, source="test"))


def test_every_method_starts_alike_and_reads_alike(
    results: Results, seen: dict[str, list[Any]]
) -> None:
    for seed in (0, 1):
        runs = [own for folder, own in seen.items() if f"--{seed}--" in folder]
        assert len(runs) == 6
        weights, *windows = runs[0]
        for other_weights, *other_windows in runs[1:]:
            assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
            assert torch.equal(torch.stack(windows), torch.stack(other_windows))
    first, second = (next(own for f, own in seen.items() if f"--{s}--" in f) for s in (0, 1))
    assert not torch.equal(torch.stack(first[1:]), torch.stack(second[1:]))


def test_methods_that_draw_alike_share_a_cache(results: Results, values: dict[str, Any]) -> None:
    caches = [Cache.open(path) for path in (Path(values["out"]) / "caches").iterdir()]
    samplers = sorted(cache.identity.sampler["name"] for cache in caches)
    assert samplers == ["systematic", "topk", "topk"]  # one of them for the text alone
    assert len({len(cache) for cache in caches}) == 1


def test_a_failing_method_does_not_lose_the_others(results: Results) -> None:
    failed = [run for run in results.runs if run.status == "failed"]
    assert {run.method for run in failed} == {"uniform 2000"}
    assert all("out of reach" in (run.message or "") for run in failed)
    assert sum(run.status == "done" for run in results.runs) == 12
    assert not results.complete


def test_rows_are_of_their_runs(results: Results) -> None:
    for row in results.methods[:6]:
        runs = [r for r in results.runs if r.method == row.method]
        for name in ("loss", "kl", "acceptance", "ece"):
            mean = sum(run.figures[name] for run in runs) / len(runs)
            assert row.figures[name].mean == pytest.approx(mean, rel=1e-6)
        ends = row.figures["loss"].both
        assert ends.low <= row.figures["loss"].mean <= ends.high
    ce, other = results.methods[0], results.methods[2]
    assert other.minus_ce["loss"].mean == pytest.approx(
        other.figures["loss"].mean - ce.figures["loss"].mean, rel=1e-5, abs=1e-9
    )


def test_a_row_is_formed_again_when_what_it_rests_on_is_new(
    results: Results, values: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(values["out"], out)
    recipe = parse_compare_recipe(values | {"out": str(out)}, source="test")
    setting = prepare(recipe)
    folders = {(run.method, run.seed): out / str(run.folder) for run in results.runs}
    away = [folders["Top-K 5", 1] / "outcome.json", folders["CE", 0] / "outcome.json"]
    for file in away:
        file.rename(file.with_suffix(".away"))
    standing = Standing(recipe, setting)
    first = standing.method_rows(standing.runs())
    assert first[2].seeds_done == [0]
    assert [a is b for a, b in zip(first, standing.method_rows(standing.runs()), strict=True)] == (
        [True] * 7
    )
    away[0].with_suffix(".away").rename(away[0])
    second = standing.method_rows(standing.runs())
    assert [a is b for a, b in zip(first, second, strict=True)] == [True] * 2 + [False] + [True] * 4
    away[1].with_suffix(".away").rename(away[1])
    third = standing.method_rows(standing.runs())
    fresh = Standing(recipe, setting)
    assert third == fresh.method_rows(fresh.runs())
    assert third[4].minus_ce != second[4].minus_ce  # CE's outcome is in all of them


def test_csv_and_json_agree(results: Results, values: dict[str, Any]) -> None:
    stored = read_results(Path(values["out"]))
    lines = list(csv.DictReader(io.StringIO((Path(values["out"]) / "results.csv").read_text())))
    methods = [line for line in lines if line["row"] == "method"]
    assert len(lines) == len(stored.methods) + len(stored.runs)
    for row, line in zip(stored.methods, methods, strict=True):
        assert line["method"] == row.method
        if "loss" in row.figures:
            assert float(line["loss"]) == pytest.approx(row.figures["loss"].mean, rel=1e-5)
            assert float(line["loss_low"]) == pytest.approx(row.figures["loss"].both.low, rel=1e-5)


def test_finished_runs_are_not_repeated(
    results: Results, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("trained")  # what no run's failure is taken for

    monkeypatch.setattr(SparseKDTrainer, "train", refuse)
    again = compare(parse_compare_recipe(values, source="test"))
    assert again.runs == results.runs
    longer = values | {"training": values["training"] | {"epochs": 2}, "methods": ["ce"]}
    with pytest.raises(KeyboardInterrupt, match="trained"):  # another training is another run
        compare(parse_compare_recipe(longer, source="test"))


def test_a_run_that_breaks_is_recorded_and_tried_again(
    results: Results, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(values["out"]) / "caches", tmp_path / "out" / "caches")
    recipe = parse_compare_recipe(
        values
        | {"out": str(tmp_path / "out"), "seeds": [0]}
        | {"methods": ["ce", {"sampler": "topk", "k": 5}]},
        source="test",
    )
    train = SparseKDTrainer.train

    def breaks(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.objective.method == "ce":
            raise RuntimeError("out of memory, say")
        return train(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SparseKDTrainer, "train", breaks)
        found = compare(recipe)
    assert [run.status for run in found.runs] == ["failed", "done"]
    assert found.runs[0].message == "out of memory, say"
    assert [run.status for run in compare(recipe).runs] == ["done", "done"]


def test_killed_in_a_run_it_goes_on_to_the_same_students(
    results: Results, values: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL between two checkpoints; the students come out as those of a run that was not."""
    out = tmp_path / "out"
    shutil.copytree(Path(values["out"]) / "caches", out / "caches")
    own = values | {"out": str(out), "seeds": [0], "methods": ["ce", METHODS[4]]}
    own["training"] = own["training"] | {"save_steps": 2}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(own))
    command = [sys.executable, "-m", "sparselogits", "compare", str(file), "--device", "cpu"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/checkpoints/checkpoint-*")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = compare(parse_compare_recipe(own, source="test"))
    assert finished.complete
    for run in finished.runs:
        first = next(r for r in results.runs if (r.method, r.seed) == (run.method, run.seed))
        weights, resumed = (
            load_file(Path(root) / str(folder) / "model" / "model.safetensors")
            for root, folder in ((values["out"], first.folder), (out, run.folder))
        )
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
        assert first.folder == run.folder  # checkpoints do not change what a run is


def test_the_command_prints_json(results: Results, values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "sparselogits", "compare", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = Results.model_validate(json.loads(done.stdout))
    assert len(printed.runs) == 14
    assert "uniform 2000, tiny, seed 1" in done.stderr


def test_a_models_folder_is_no_place_for_a_comparison(
    values: dict[str, Any], teacher_folder: Path
) -> None:
    before = sorted(teacher_folder.iterdir())
    recipe = parse_compare_recipe({**values, "out": str(teacher_folder)}, source="test")
    with pytest.raises(InvalidArgumentError, match="is a model's folder; give --out"):
        compare(recipe)
    assert sorted(teacher_folder.iterdir()) == before


def test_a_run_in_another_hand_is_left_to_it(tmp_path: Path) -> None:
    from sparselogits.compare.recipe import MethodSpec
    from sparselogits.compare.runs import claimed

    run = Planned(MethodSpec(method="ce"), "tiny", 0, tmp_path / "run", "f")
    with claimed(run) as mine, claimed(run) as theirs:
        assert mine
        assert not theirs
    with claimed(run) as again:
        assert again
