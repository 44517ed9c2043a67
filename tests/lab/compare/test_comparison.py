"""Test comparisons of a tiny teacher: equal conditions, resuming, partial failures, storage."""

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparselogits.corpus import PackedCorpus
from sparselogits.data import CacheDataset, WindowRequest
from sparselogits.errors import CacheError, CorpusError, InvalidArgumentError
from sparselogits.lab.compare import Results, compare, parse_compare_recipe, read_results
from sparselogits.lab.compare.caches import Draw, prepare
from sparselogits.lab.compare.comparison import ComparisonState
from sparselogits.lab.compare.finished import FinishedWork
from sparselogits.lab.compare.results import MetricEstimate, Realised
from sparselogits.lab.compare.windows import differences, read_windows, windows_of
from sparselogits.store import Cache
from sparselogits.train.trainer import SparseKDTrainer
from tests.conftest import write_lines

METHODS: list[Any] = [
    "ce",
    "full",
    {"sampler": "topk", "k": 5, "missing_mass": ["drop", "ghost"]},
    {"sampler": "systematic", "budget": 6},
    {"sampler": "systematic", "budget": 6, "alpha": 0.5},
    {"sampler": "uniform", "budget": 2000},  # more than there are tokens: cannot be
]


@pytest.fixture(scope="module")
def values(tiny, tmp_path_factory) -> dict[str, Any]:
    return tiny(tmp_path_factory.mktemp("compare"), heldout_windows=8, methods=METHODS)


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Any]]:
    """What every run began with: its first weights and the windows it asked for."""
    return {}


@pytest.fixture(scope="module")
def results(values, seen) -> Results:
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


def test_every_method_starts_alike_and_reads_alike(results, seen):
    for seed in (0, 1):
        runs = [own for folder, own in seen.items() if f"--{seed}--" in folder]
        assert len(runs) == 6
        weights, *windows = runs[0]
        for other_weights, *other_windows in runs[1:]:
            assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
            assert torch.equal(torch.stack(windows), torch.stack(other_windows))
    first, second = (next(own for f, own in seen.items() if f"--{s}--" in f) for s in (0, 1))
    assert not torch.equal(torch.stack(first[1:]), torch.stack(second[1:]))


def test_methods_that_draw_alike_share_a_cache(results, values):
    caches = [Cache.open(path) for path in (Path(values["out"]) / "caches").iterdir()]
    samplers = sorted(cache.identity.sampler["name"] for cache in caches)
    assert samplers == ["systematic", "topk", "topk"]  # one of them for the text alone
    assert len({len(cache) for cache in caches}) == 1


def test_a_failing_method_does_not_lose_the_others(results):
    failed = [run for run in results.runs if run.status == "failed"]
    assert {run.method for run in failed} == {"uniform 2000"}
    assert all("out of reach" in (run.message or "") for run in failed)
    assert sum(run.status == "done" for run in results.runs) == 12
    assert not results.complete


def test_rows_are_of_their_runs(results):
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


def test_every_interval_can_be_recomputed_from_the_sums_of_windows(results, values, tmp_path):
    out = Path(values["out"])
    sums = read_windows(out / "windows.npz")
    stored = read_results(out)
    assert len(sums) == 12
    assert windows_of(out) == (out / "windows.npz").read_bytes()
    assert differences(stored, sums) == []
    place = (stored.methods[2].method, stored.methods[2].student, 0)
    other = {**sums, place: {**sums[place], "loss": sums[place]["loss"] * [1.01, 1]}}
    found = differences(stored, other)
    assert found
    assert all(place[0] in line for line in found)
    with pytest.raises(CacheError, match=f"no per-window sums of {place[0]}, {place[1]}, seed 0"):
        differences(stored, {run: own for run, own in sums.items() if run != place})
    np.save(tmp_path / "array.npy", np.zeros(3))
    whole, array = (out / "windows.npz").read_bytes(), (tmp_path / "array.npy").read_bytes()
    for content in (b"no archive", whole[: len(whole) // 2], array):
        (tmp_path / "w.npz").write_bytes(content)
        with pytest.raises(CacheError, match="not a file of per-window sums"):
            read_windows(tmp_path / "w.npz")
    for at in range(0, len(whole), max(1, len(whole) // 400)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        (tmp_path / "w.npz").write_bytes(damaged)
        with suppress(CacheError):  # damage may be in bytes that are not read
            read_windows(tmp_path / "w.npz")


def test_a_row_is_formed_again_when_what_it_rests_on_is_new(results, values, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(values["out"], out)
    recipe = parse_compare_recipe(values | {"out": str(out)}, source="test")
    work = FinishedWork(out)
    setting = prepare(recipe, work)
    state = ComparisonState(recipe, setting)
    files = {
        (run.method.title, run.seed): work.folder / "runs" / f"{run.fingerprint}.json"
        for run in state.planned
    }
    away = [files["Top-K 5", 1], files["CE", 0]]
    for file in away:
        file.rename(file.with_suffix(".away"))
    first = state.method_rows(state.runs())
    assert first[2].seeds_done == [0]
    assert [a is b for a, b in zip(first, state.method_rows(state.runs()), strict=True)] == (
        [True] * 7
    )
    away[0].with_suffix(".away").rename(away[0])
    second = state.method_rows(state.runs())
    assert [a is b for a, b in zip(first, second, strict=True)] == [True] * 2 + [False] + [True] * 4
    away[1].with_suffix(".away").rename(away[1])
    third = state.method_rows(state.runs())
    fresh = ComparisonState(recipe, setting)
    assert third == fresh.method_rows(fresh.runs())
    assert third[4].minus_ce != second[4].minus_ce  # CE's outcome is in all of them


def test_csv_and_json_agree(results, values):
    stored = read_results(Path(values["out"]))
    lines = list(csv.DictReader(io.StringIO((Path(values["out"]) / "results.csv").read_text())))
    # the recipe has no drafts; rows that have them get them here
    drafts = Realised(verified=147, accepted=61, acceptance=0.4149, expected=0.46, error=0.04)
    drafted = stored.model_copy(
        update={
            "methods": [row.model_copy(update={"realised": drafts}) for row in stored.methods],
            "runs": [row.model_copy(update={"realised": drafts}) for row in stored.runs],
        }
    )
    with_drafts = list(csv.DictReader(io.StringIO(drafted.to_csv())))
    assert stored.teacher is not None
    names = ["loss", "kl", "ece", "ece_equal_mass", "overconfidence", "acceptance", "agreement"]

    def same(line: dict[str, str], expected: dict[str, object]) -> None:
        known = {name: value for name, value in expected.items() if value is not None}
        assert {name for name, cell in line.items() if cell} == known.keys()
        for name, value in known.items():
            if isinstance(value, float):  # six digits of it in the JSON
                assert float(line[name]) == pytest.approx(value, rel=2e-5), name
            else:
                assert line[name] == str(value)

    def ends(name: str, figure: MetricEstimate | None) -> dict[str, object]:
        if figure is None:
            return {}
        return {name: figure.mean, f"{name}_low": figure.both.low, f"{name}_high": figure.both.high}

    realised = {"realised_acceptance": 0.4149, "realised_expected": 0.46, "realised_error": 0.04}
    realised["realised_verified"] = 147
    for table, more in ((lines, {}), (with_drafts, realised)):
        assert [line["row"] for line in table] == (
            ["method"] * len(stored.methods) + ["run"] * len(stored.runs) + ["teacher"]
        )
        for row, line in zip(stored.methods, table, strict=False):
            expected: dict[str, object] = {
                "row": "method",
                "method": row.method,
                "student": row.student,
                "seeds": len(row.seeds_done),
                "entries": row.entries,
                "bytes_per_token": row.bytes_per_token,
                "tokens_per_cpu_second": row.tokens_per_cpu_second,
            }
            for name in names:
                expected |= ends(name, row.figures.get(name))
            expected |= ends("perplexity", row.perplexity)
            expected |= ends("loss_minus_ce", row.minus_ce.get("loss"))
            same(line, expected | ends("gap_closed", row.gap_closed) | more)
        for run, line in zip(stored.runs, table[len(stored.methods) :], strict=False):
            per_second = run.tokens / run.cpu_seconds if run.tokens and run.cpu_seconds else None
            expected = {
                "row": "run",
                "method": run.method,
                "student": run.student,
                "seed": run.seed,
                "status": run.status,
                "gap_closed": run.gap_closed,
                "tokens_per_cpu_second": per_second,
            }
            expected |= {name: run.figures.get(name) for name in [*names, "perplexity"]}
            same(line, expected | more)
        figures = stored.teacher.figures
        same(table[-1], {"row": "teacher"} | {n: figures[n] for n in [*names, "perplexity"]})
    # CE's row lacks none of them, and its perplexity is what the word means
    assert all(lines[0][name + end] for name in names for end in ("", "_low", "_high"))
    for end in ("", "_low", "_high"):
        perplexity = math.exp(float(lines[0]["loss" + end]))
        assert float(lines[0]["perplexity" + end]) == pytest.approx(perplexity, rel=1e-9)


def test_finished_runs_are_not_repeated(results, values, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("trained")  # what no run's failure is taken for

    monkeypatch.setattr(SparseKDTrainer, "train", refuse)
    again = compare(parse_compare_recipe(values, source="test"))
    assert again.runs == results.runs
    longer = values | {"training": values["training"] | {"num_train_epochs": 2}, "methods": ["ce"]}
    with pytest.raises(KeyboardInterrupt, match="trained"):  # another training is another run
        compare(parse_compare_recipe(longer, source="test"))


def test_a_renamed_method_keeps_its_run(results, values, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(values["out"], out)
    names = [{"method": "ce", "name": name} for name in ("labels", "labels again")]
    again = compare(parse_compare_recipe(values | {"out": str(out), "methods": names}, source="it"))
    before = {run.seed: run.folder for run in results.runs if run.method == "CE"}
    assert [run.folder for run in again.runs] == [before[run.seed] for run in again.runs]
    assert {(run.method, run.seed) for run in again.runs} == {
        (name, seed) for name in ("labels", "labels again") for seed in (0, 1)
    }


def test_a_run_that_breaks_is_recorded_and_tried_again(results, values, tmp_path, monkeypatch):
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


def test_killed_in_a_run_it_goes_on_to_the_same_students(results, values, tmp_path):
    """SIGKILL between two checkpoints: it goes on from the last, and ends with the same students.

    The same weights alone would not do: a run that began again from scratch has them too.
    """
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
    checkpoints = "runs/*/checkpoints/checkpoint-*"
    # what our Trainer writes when the checkpoint is whole, and no sooner
    while not list(out.glob(f"{checkpoints}/sparselogits.json")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.005)
    assert process.poll() is None, "it was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    steps: dict[str, list[int]] = {}  # of the whole checkpoints, by run
    for state in out.glob(f"{checkpoints}/trainer_state.json"):
        with suppress(OSError, ValueError):  # cut short
            step = json.loads(state.read_text())["global_step"]
            steps.setdefault(state.parents[2].name, []).append(step)
    assert len(steps) == 1, "it was not killed in a run, but between two"

    told: list[str] = []

    @contextmanager
    def watched(*_: Any, **__: Any) -> Iterator[Any]:
        yield lambda done, total, note="": told.append(note)

    finished = compare(parse_compare_recipe(own, source="test"), stage=watched)
    assert finished.complete
    for run in finished.runs:
        first = next(r for r in results.runs if (r.method, r.seed) == (run.method, run.seed))
        weights, resumed = (
            load_file(Path(root) / str(folder) / "model" / "model.safetensors")
            for root, folder in ((values["out"], first.folder), (out, run.folder))
        )
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
        assert first.folder == run.folder  # checkpoints do not change what a run is
        here = [note for note in told if note.startswith(f"{run.method}, tiny, seed 0: step ")]
        if not here:
            continue  # finished before the kill
        last = max(steps.get(Path(str(run.folder)).name, [0]))
        assert here[0].endswith(f" {last}/{run.steps}")
        assert here[-1].endswith(f" {run.steps}/{run.steps}")
        assert (run.seconds is None) == (last > 0)
        assert (run.cpu_seconds is None) == (last > 0)
        assert [step for step, _ in run.curve] == [step for step, _ in first.curve]


def test_the_command_prints_json(results, values, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "sparselogits", "compare", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = Results.model_validate(json.loads(done.stdout))
    assert len(printed.runs) == 14
    assert "uniform 2000, tiny, seed 1" in done.stderr


def test_a_models_folder_is_no_place_for_a_comparison(values, teacher_folder):
    before = sorted(teacher_folder.iterdir())
    recipe = parse_compare_recipe({**values, "out": str(teacher_folder)}, source="test")
    with pytest.raises(
        InvalidArgumentError, match="is the folder of a model; choose another folder"
    ):
        compare(recipe)
    assert sorted(teacher_folder.iterdir()) == before


def test_claimed_work_is_skipped_and_values_outlast_failures(tmp_path):
    work, other = FinishedWork(tmp_path), FinishedWork(tmp_path)
    with work.claimed("runs", "f") as mine, other.claimed("runs", "f") as theirs:
        assert mine
        assert not theirs
        with other.claimed("runs", "g") as third:
            assert third
    with other.claimed("runs", "f") as again:
        assert again
    work.fail("runs", "f", "out of memory", traceback="...")
    assert (other.value("runs", "f"), other.failure("runs", "f")) == (None, "out of memory")
    other.store("runs", "f", {"loss": 1.5})
    work.fail("runs", "f", "too late")
    assert (work.value("runs", "f"), work.failure("runs", "f")) == ({"loss": 1.5}, None)


def test_finished_work_of_older_versions_is_taken_over(results, values, tmp_path, monkeypatch):
    """The same comparison as an older version leaves it: nothing is computed again."""
    out = tmp_path / "out"
    shutil.copytree(values["out"], out)
    recipe = parse_compare_recipe(values | {"out": str(out)}, source="test")
    setting = prepare(recipe, FinishedWork(out))
    state = ComparisonState(recipe, setting)
    weights = setting.teacher.identity["weights"]
    samplers = {
        Draw.of(run.method, recipe, run.seed).fit_key: Cache.open(cache).identity.sampler
        for run in state.planned
        if (cache := setting.caches.get(Draw.of(run.method, recipe, run.seed).key))
    }
    (out / "draws.json").write_text(json.dumps({"teacher": weights, "parameters": dict(samplers)}))
    of = [weights, setting.corpus.source_fingerprint, recipe.heldout_windows]
    (row,) = (out / "finished" / "teacher").glob("*.json")
    row = json.loads(row.read_text())["value"]
    (out / "teacher.json").write_text(json.dumps({"of": of, "row": row}))
    for run in state.planned:
        if run.folder is not None:
            outcome = json.dumps(setting.work.value("runs", run.fingerprint))
            (run.folder / "outcome.json").write_text(outcome)
    shutil.rmtree(out / "finished")

    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("computed")

    monkeypatch.setattr(SparseKDTrainer, "train", refuse)
    monkeypatch.setattr("sparselogits.lab.compare.comparison.evaluate", refuse)
    again = compare(recipe)
    assert again.runs == results.runs
    assert again.teacher == results.teacher


def test_rows_of_token_ids_are_compared(tiny, tokenizer, teacher_folder, tmp_path):
    """Each row is a window of every cache and of the held-out text; padding has no target."""
    values = tiny(tmp_path, methods=["ce", {"sampler": "topk", "k": 4}], seeds=[0])
    texts = [json.loads(line)["text"] for line in Path(values["data"]).read_text().splitlines()]
    rows = [ids[:n] for text in texts for n in (32, 20) if (ids := tokenizer(text)["input_ids"])]
    data = write_lines(tmp_path / "rows.jsonl", ({"input_ids": ids} for ids in rows))
    values |= {"data": str(data), "tokenized_by": str(teacher_folder)}
    found = compare(parse_compare_recipe(values, source="a test"))
    assert [run.status for run in found.runs] == ["done", "done"]
    corpus = PackedCorpus.open(tmp_path / "out" / "corpus")
    assert corpus.windows + corpus.holdout_windows == len(rows)
    held = corpus.read_holdout(0, corpus.holdout_windows)
    assert all(window.tokens.tolist()[:20] in [row[:20] for row in rows] for window in held)
    for root in (tmp_path / "out" / "caches").iterdir():
        cache = Cache.open(root)
        assert {int(cache.read(i).present().sum()) for i in range(len(cache))} == {31, 19}
    without = {**values, "tokenized_by": None, "out": str(tmp_path / "none")}
    with pytest.raises(CorpusError, match="--tokenized-by"):
        compare(parse_compare_recipe(without, source="a test"))
