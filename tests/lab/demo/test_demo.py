"""Test the whole demo with a tiny model instead of SmolLM2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselogits.lab.compare import read_results
from sparselogits.lab.demo import DemoResult, Scale, run_demo
from sparselogits.lab.demo.demo import HEALED, METHODS, SAMPLED, talk_command
from sparselogits.lab.demo.samples import QUESTIONS
from sparselogits.lab.report import write_report
from tests.lab.report.browser import DESKTOP, cut_off, opened
from tests.stand_ins import stand_in_for_named_models

SMALL = Scale(characters=6_000, heldout_windows=4, window=48, layers=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_named_models(folder, tokenizer, patch)
    return folder


@pytest.fixture(autouse=True)
def _named_models(home, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))


@pytest.fixture(scope="module")
def found(tmp_path_factory, home) -> DemoResult:
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        return run_demo(out, SMALL)


def test_every_method_heals_the_same_pruned_student(found):
    out = found.report.parent
    results = read_results(out)
    assert [row.method for row in results.methods] == [method["name"] for method in METHODS]
    assert {run.status for run in results.runs} == {"done"}
    by_name = {row.method: row for row in results.methods}
    assert by_name["Top-12"].sampler == by_name["Top-12 ghost"].sampler
    assert len(list((out / "caches").iterdir())) == 4  # one of them for the text alone
    start = AutoModelForCausalLM.from_pretrained(next((out / "students").iterdir()))
    assert start.config.num_hidden_layers == 1
    unhealed = out / str(next(run.folder for run in results.runs if run.method == "not healed"))
    for name, value in AutoModelForCausalLM.from_pretrained(unhealed / "model").named_parameters():
        torch.testing.assert_close(value, start.get_parameter(name).float(), atol=0, rtol=0)
    kl = {name: row.figures["kl"].mean for name, row in by_name.items()}
    assert kl["full KD"] < kl["not healed"]
    assert kl[HEALED] < kl["not healed"]


def test_its_table_has_the_stored_figures(found):
    table = found.table()
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert columns["method"] == [*(method["name"] for method in METHODS), "the teacher"]
    stored = json.loads((found.report.parent / "demo.json").read_text())
    assert stored["results"] == found.results.model_dump(mode="json")
    assert stored["elapsed_s"] > sum(run["seconds"] or 0 for run in stored["results"]["runs"])
    rows = stored["results"]["methods"]
    assert columns["KL"] == [*(f"{row['figures']['kl']['mean']:.3f}" for row in rows), "0.000"]
    assert columns["entries"][0] == "-"
    assert columns["entries"][-2] == "all"


def test_the_healed_student_answers_the_printed_command(found):
    """As a user gives it: in a shell, without a network, with a question typed in."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    asked = subprocess.run(
        ["bash", "-c", found.talk],
        input="What is a list?\n",
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("you: ")
    assert len(asked.stdout) > len("you: \n")
    tokenizer = AutoTokenizer.from_pretrained(found.student)
    assert tokenizer.chat_template
    assert not list(found.student.glob("*.bin"))


@pytest.mark.parametrize("name", ["a b", "it's", 'say "$HOME"', "back`tick"])
def test_the_command_names_any_folder(name, tmp_path):
    told = talk_command(tmp_path / name).replace(
        "from transformers import pipeline; print(pipeline(", "print((lambda *words: words)("
    )
    told = told.partition("([{")[0] + (')"' if told.endswith('"') else ")'")
    said = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == repr(("text-generation", str(tmp_path / name)))


def test_what_is_finished_is_not_done_again(found, monkeypatch):
    out = found.report.parent
    before = {
        file: file.stat().st_mtime_ns
        for pattern in ("finished/*/*.json", "*.safetensors", "shards/*")
        for file in out.rglob(pattern)
    }
    again = run_demo(out, SMALL)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again.samples == found.samples
    assert again.results.methods == found.results.methods
    assert json.loads((out / "demo.json").read_text())["elapsed_s"] is None


def test_the_models_continue_a_page_and_answer(found):
    assert [sample.prompt for sample in found.samples[1:]] == list(QUESTIONS)
    for sample in found.samples:
        assert list(sample.texts) == ["the teacher", *SAMPLED]


def test_its_page(found, browser):
    with opened(browser, found.report.as_uri(), size=DESKTOP) as page:
        words = page.inner_text("main")
        for method in METHODS:
            assert method["name"] in words
        assert found.talk in words
        assert page.locator(".sample").count() == len(found.samples)
        assert cut_off(page) == []
        link = page.locator("a", has_text="token by token").get_attribute("href")
    assert link is not None
    assert "Window 0" in (found.report.parent / link).read_text(encoding="utf-8")


def test_the_page_of_the_comparison_does_not_replace_it(found):
    before = found.report.read_bytes()
    write_report(found.results, found.report.parent)
    assert found.report.read_bytes() == before


def test_the_python_is_that_of_the_demo(found, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert talk_command(found.student).startswith(sys.executable)
