"""Test the benchmark for a GPU without one, and its time limits."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.stand_ins import stand_in_for_named_models

ROOT = Path(__file__).parents[1]
PARTS = ["loss", "sampling", "build 1B", "step", "build 8B", "demo"]
OF_LABELS = ["ours_labels", "cross_entropy", "torch_chunked"]


@pytest.fixture
def gpu(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.fixture
def report(gpu) -> Any:
    return importlib.import_module("report")


def is_spread(value: Any) -> bool:
    return 0 < value["p20"] <= value["median"] <= value["p80"]


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(gpu, report, tmp_path, tokenizer, monkeypatch):
    stand_in_for_named_models(tmp_path / "home", tokenizer, monkeypatch)
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["rehearsal"]
    assert found["complete"]
    assert found["machine"]["device"] == "cpu"
    assert found["versions"].keys() == set(gpu.PACKAGES)
    assert list(found["parts"]) == PARTS == list(found["sizes"]["limits"])
    for name, part in found["parts"].items():
        assert (part["status"], part["reason"]) == ("done", None), (name, done.stderr)
        assert 0 < part["seconds"] < part["limit_seconds"] + 1
    results = {name: part["results"] for name, part in found["parts"].items()}

    problems = results["loss"]["problems"]
    assert [(p["D"], p["V"], p["rows"]) for p in problems] == list(gpu.REHEARSAL.losses)
    for problem in problems:
        assert problem["tuning"].keys() == gpu.LOSSES.keys()
        measured = [n for n, record in problem["tuning"].items() if "chosen" in record]
        assert {"ours", *OF_LABELS} <= set(measured)
        for kind in ("value", "peak_gib", "over_products"):
            assert list(problem[kind]) == measured
        assert all(map(is_spread, problem["over_products"].values()))
        for name in measured:
            if name not in ("ours", "triton"):  # all others compute one quantity
                value = problem["value"][name]
                assert value == pytest.approx(problem["value"]["cross_entropy"], rel=0.02), name
        refused = problem["tuning"]["triton"]
        assert "chosen" not in refused
        assert refused["not_measured"]

    assert results["sampling"].keys() == {"float32", "bfloat16"}
    for sampling in results["sampling"].values():
        assert len(sampling["ratio_to_softmax"]) == 5
        assert sampling["by_pytorch"].keys() == sampling["ratio_to_softmax"].keys()
        assert all(map(is_spread, sampling["ratio_to_softmax"].values()))
        assert not sampling["kernel"]
    for name in ("build 1B", "build 8B"):
        assert is_spread(results[name]["build_over_forward"])
        assert results[name]["parameters"] > 0
    assert results["step"]["over_ce"].keys() == {"cache", "cache worker"}
    assert 0 < results["step"]["entries_per_token"] <= found["sizes"]["rounds"]
    assert set(results["demo"]["runs"].values()) == {"done"}

    assert "rehearsal" in report.gpu(found)
    page = report.gpu(found | {"rehearsal": False})
    assert all(f"### {name}\n" in page for name in PARTS)
    assert "| loss, triton, D = 32, 64 rows | " in page
    median = report.number(results["build 8B"]["build_over_forward"])
    assert f"| the whole build | **{median}** |" in page


def test_the_page_is_what_the_stored_results_say(report):
    assert report.page() == report.PAGE.read_text(encoding="utf-8"), "run benchmarks/report.py"


def test_without_a_file_the_page_says_not_measured(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    section = next(s for s in report.SECTIONS if s[0] == "gpu")
    assert report.section(*section).endswith("Not measured.")


def overruns(sizes: Any, scratch: Path, write: Any) -> None:
    write({"first": 1})
    time.sleep(60)


def crashes(sizes: Any, scratch: Path, write: Any) -> None:
    write({"first": 1})
    os.kill(os.getpid(), 9)


def fails(sizes: Any, scratch: Path, write: Any) -> None:
    raise ValueError("a reason\nand its details")


@pytest.mark.parametrize(
    ("measure", "status", "reason"),
    [
        (overruns, "not finished", "stopped after its limit of 2 s"),
        (crashes, "not finished", "its process ended with exit code -9"),
        (fails, "not measured", "ValueError: a reason"),
    ],
)
def test_a_part_that_ends_early_keeps_its_results(gpu, tmp_path, measure, status, reason):
    notes: list[dict[str, Any]] = []
    record = gpu.run_part(measure, gpu.REHEARSAL, tmp_path, 2, notes.append)
    assert (record["status"], record["reason"]) == (status, reason)
    assert record.get("results") == (None if status == "not measured" else {"first": 1})
    assert record["seconds"] < 10
    if measure is overruns:  # the file is written while the part still runs
        assert notes[0]["status"] == "running"
        assert notes[0]["results"] == {"first": 1}


def test_a_loss_that_does_not_end_is_left_out_with_the_reason(gpu, monkeypatch):
    import torch

    problem = gpu.Problem(*(torch.zeros(1) for _ in gpu.Problem._fields))
    endless = lambda p, **chunks: time.sleep(60)  # noqa: E731
    monkeypatch.setitem(gpu.LOSSES, "endless", (endless, [{"chunk_rows": 8}]))
    started = time.perf_counter()
    run, record = gpu.tuned("endless", problem, replace(gpu.REHEARSAL, tuning_seconds=0.2))
    assert run is None
    assert record["not_measured"] == "not finished in 0.2 s for all settings"
    assert time.perf_counter() - started < 10


def test_a_model_that_does_not_fit_is_left_out_with_the_reason(gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**30, 2**30))
    sizes = replace(gpu.REHEARSAL, device="cuda")
    with pytest.raises(gpu.NotMeasuredError, match=r"8B needs about 6 GiB .* 1 GiB are free"):
        gpu.random_llama(sizes, "8B", 2, activations_gib=6)
