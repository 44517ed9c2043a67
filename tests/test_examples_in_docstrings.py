"""Test that the docstring of each public name has an example that runs."""

import doctest
import importlib
import shutil
from operator import attrgetter

import pytest
import transformers
from transformers import ProgressCallback

import sparselogits
from tests.conftest import tiny_llama

NAMES = sorted(sparselogits.__all__)
WORDING = ("counted", "significant", "rate", "duration")


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_that_runs(name, cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "my-cache")
    tiny_llama(seed=3).save_pretrained(tmp_path / "my-student")
    monkeypatch.chdir(tmp_path)
    # what transformers prints on the way is no part of an example
    monkeypatch.setattr(ProgressCallback, "on_log", lambda *_, **__: None)
    run_examples(getattr(sparselogits, name), name, {name: getattr(sparselogits, name)})


@pytest.mark.parametrize("name", WORDING)
def test_the_wording_of_numbers(name):
    module = importlib.import_module("sparselogits.wording")
    run_examples(getattr(module, name), name, {name: getattr(module, name)})


@pytest.mark.parametrize(
    "name",
    [
        *("Adaptive", "Multinomial", "StudentSignal.of", "Systematic", "Threshold", "TopK"),
        *("choose", "fit_budget", "from_parameters", "parameter", "thinning_starts"),
        "window_uniforms",
    ],
)
def test_samplers(name, tmp_path, monkeypatch):
    tiny_llama(seed=3).save_pretrained(tmp_path / "my-student")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("sparselogits.samplers")
    names = {name: getattr(module, name) for name in module.__all__}
    run_examples(attrgetter(name)(module), name, names)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lab.planning", "device_kind"),
        ("lab.planning", "plan"),
        ("lab.planning", "quantity"),
        ("evaluate", "evaluate"),
        ("evaluate", "fieller_interval"),
        ("train", "run"),
    ],
)
def test_functions_of_packages(module, name, cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "my-cache")
    tiny_llama(seed=3).save_pretrained(tmp_path / "my-student")
    (tmp_path / "recipe.yaml").write_text(
        "cache: my-cache\nout: my-run\nstudent: {path: my-student}\nper_device_train_batch_size: 2"
    )
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(f"sparselogits.{module}")
    names = {each: getattr(found, each) for each in found.__all__}
    run_examples(names[name], name, names)


OTHERS = {
    "sparselogits.caching.plan": ("Share", "shard_ranges"),
    "sparselogits.data": ("Pace", "Schedule", "WindowOrder", "WindowSampler"),
    "sparselogits.store": (
        *("Cache", "CopyFolder", "codec_for", "export", "merge", "push", "repair"),
        *("sample_cache", "verify"),
    ),
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in OTHERS.items() for name in names]
)
def test_other_public_names(module, name, cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "my-cache")
    monkeypatch.chdir(tmp_path)
    found = vars(importlib.import_module(module))
    run_examples(found[name], name, {key: value for key, value in found.items() if key[0] != "_"})


def run_examples(described: object, name: str, names: dict[str, object]) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(described, name, globs=names)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    transformers.logging.set_verbosity_warning()  # at a higher level the Trainer prints metrics
    result = doctest.DocTestRunner().run(test, out=said.append)
    assert result.failed == 0, "".join(said)
