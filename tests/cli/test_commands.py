"""Test the commands on their results, JSON output and error messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_python


def command(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "sparselogits", *words, timeout=timeout, env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_folder, short) -> Path:
    out = tmp_path_factory.mktemp("caches") / "cache"
    made = command(
        *("cache", "--teacher", teacher_folder, "--data", short, "--out", out),
        *("--window", 32, "--holdout", 0.2),
    )
    assert made.returncode == 0, made.stderr
    assert "entries" in made.stdout
    assert "tokens" in made.stderr
    assert "Traceback" not in made.stderr
    return out


def test_the_module_is_the_command():
    script = Path(sys.executable).with_name("sparselogits")
    named = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=240)
    module = command("--version")
    assert (module.returncode, module.stdout) == (named.returncode, named.stdout)
    assert module.stdout.startswith("sparselogits ")
    assert "python -m sparselogits [OPTIONS] COMMAND" in command("--help").stdout


def test_info_as_json(cache):
    facts = json.loads(command("info", cache, "--json").stdout)
    assert facts["identity"]["sampler"]["name"] == "systematic"
    assert facts["identity"]["sampler"]["budget"] == 12.0
    assert abs(facts["statistics"]["entries_per_position"] - 12) < 1
    assert facts["statistics"]["bits_per_entry"] < 24
    assert facts["sample"]["of"] == facts["statistics"]["windows"]


def test_info_draws_in_a_pipe_within_a_screenful(cache):
    drawn = command("info", cache)
    assert drawn.returncode == 0
    assert drawn.stderr.startswith("Next: sparselogits train --cache ")
    lines = drawn.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert "entries per position" in drawn.stdout
    assert "\x1b" not in drawn.stdout
    assert json.loads((cache / "cache.json").read_text())["fingerprint"] in drawn.stdout


def test_train_and_eval(cache, teacher_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"cache: {cache}\nout: {tmp_path / 'run'}\nnum_train_epochs: 1\n"
        "per_device_train_batch_size: 16\nlogging_steps: 1\n"
        "student: {hidden_size: 16, layers: 1, heads: 2}\n"
    )
    trained = command("train", recipe, "--alpha", 0.1, "--device", "cpu", "--json")
    assert trained.returncode == 0, trained.stderr
    facts = json.loads(trained.stdout)
    assert facts["curve"][-1][1] < facts["curve"][0][1]
    evaluated = command(
        *("eval", tmp_path / "run", "--cache", cache, "--teacher", teacher_folder),
        *("--limit", 4, "--draft", 2, "--json"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert found["student"]["kl"] > found["teacher"]["kl"] == pytest.approx(0.0, abs=1e-6)
    loss = found["student"]["intervals"]["loss"]
    assert loss["low"] < found["student"]["loss"] < loss["high"]
    assert found["student"]["drafting"]["drafts"] == 16


@pytest.mark.slow
def test_eval_scores_tasks(tmp_path, teacher_folder, short):
    from tests.conftest import tiny_llama

    cache = tmp_path / "cache"
    options = base(teacher_folder, short, cache) | {"--window": 64, "--holdout": 0.3}
    assert command("cache", *[word for pair in options.items() for word in pair]).returncode == 0
    tiny_llama(seed=3).save_pretrained(tmp_path / "student")
    words = ["eval", tmp_path / "student", "--cache", cache, "--limit", 2, "--task-limit", 9]
    words += ["--tasks", "agreement", "--tasks", "last_word"]
    shown = command(*words, "--tokenizer", teacher_folder)
    assert shown.returncode == 0, shown.stderr
    assert "last_word" in shown.stdout
    assert "perplexity" in shown.stdout
    *progress, following = shown.stderr.splitlines()
    assert all(line.startswith(("evaluating: ", "tasks, student: ")) for line in progress)
    assert following == f"Next: sparselogits eval {words[1]} --cache {cache} --teacher MODEL"
    found = json.loads(command(*words, "--teacher", teacher_folder, "--json").stdout)
    for name in ("student", "teacher"):
        scores = {(own["task"], own["metric"]): own for own in found[name]["tasks"]}
        assert list(scores) == [
            *(("agreement", "acc"), ("last_word", "perplexity"), ("last_word", "acc"))
        ]
        own = scores["agreement", "acc"]
        assert own["value"] == pytest.approx(sum(own["values"]) / 9)
        assert own["samples"] == len(own["values"]) == 9
    refused = command(*words)
    assert refused.returncode == 2
    assert "name a model that has one with --teacher or --tokenizer" in " ".join(
        refused.stderr.split()
    )


@pytest.mark.parametrize("sampler", ["threshold", "topk"])
def test_a_budget_sets_what_the_sampler_has_instead_of_rounds(
    teacher_folder, short, tmp_path, sampler
):
    options = base(teacher_folder, short, tmp_path / "out")
    options |= {"--sampler": sampler, "--budget": 6, "--window": 64}
    words = [word for pair in options.items() for word in pair]
    made = command("cache", *words, "--json")
    facts = json.loads(made.stdout)
    assert abs(facts["statistics"]["entries_per_position"] - 6) < 1
    assert {"k", "tau"} & set(facts["identity"]["sampler"])
    resumed = command("cache", *words, "--json")
    assert json.loads(resumed.stdout) == facts
    options["--budget"] = 9
    refused = command("cache", *[word for pair in options.items() for word in pair])
    assert refused.returncode == 2
    assert "a budget of 6" in refused.stderr


def base(teacher_folder: Path, short: Path, out: Path) -> dict[str, object]:
    return {"--teacher": teacher_folder, "--data": short, "--out": out, "--window": 32}


def test_another_window_length_is_refused_and_harms_nothing(cache, teacher_folder, short):
    before = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    options = base(teacher_folder, short, cache) | {"--window": 64, "--holdout": 0.2}
    failed = command("cache", *[word for pair in options.items() for word in pair])
    assert failed.returncode == 2
    assert "window_length" in failed.stderr
    assert {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()} == before


def test_training_with_another_teacher_is_refused(cache, tmp_path):
    from tests.conftest import tiny_llama

    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    for file in cache.parent.parent.rglob("teacher*/tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    failed = command(
        *("train", "--cache", cache, "--student-config", "tiny", "--out", tmp_path / "run"),
        *("--method", "full", "--teacher", other),
    )
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
