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

NAMES = {
    "sparselogits": sorted(sparselogits.__all__),
    "sparselogits.wording": ("counted", "significant", "rate", "duration"),
    "sparselogits.samplers": (
        *("Adaptive", "Multinomial", "StudentSignal.of", "Systematic", "Threshold", "TopK"),
        *("TopP", "Uniform", "choose", "draw_with_statistics", "fit_budget", "from_parameters"),
        *("parameter", "thinning_starts", "window_uniforms"),
    ),
    "sparselogits.lab.planning": ("device_kind", "plan", "quantity"),
    "sparselogits.corpus": ("PackedCorpus", "Packing"),
    "sparselogits.evaluate": ("evaluate", "fieller_interval", "t_interval"),
    "sparselogits.train": ("Recipe", "run"),
    "sparselogits.caching.plan": ("Share", "shard_ranges"),
    "sparselogits.data": ("Pace", "Schedule", "WindowOrder", "WindowSampler", "teacher_mass"),
    "sparselogits.store": (
        *("Cache", "CopyFolder", "codec_for", "export", "merge", "push", "repair"),
        *("sample_cache", "verify"),
    ),
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in NAMES.items() for name in names]
)
def test_a_docstring_has_an_example_that_runs(module, name, cache, tmp_path, monkeypatch):
    """In a folder with a cache, a student and a recipe; public names are imported already."""
    shutil.copytree(cache, tmp_path / "my-cache")
    tiny_llama(seed=3).save_pretrained(tmp_path / "my-student")
    recipe = "cache: my-cache\nout: my-run\nstudent: {path: my-student}\n"
    (tmp_path / "recipe.yaml").write_text(f"{recipe}per_device_train_batch_size: 2")
    monkeypatch.chdir(tmp_path)
    # what transformers prints on the way is no part of an example
    monkeypatch.setattr(ProgressCallback, "on_log", lambda *_, **__: None)
    found = importlib.import_module(module)
    alone = module in ("sparselogits", "sparselogits.wording")
    known = {name} if alone else {*dir(found), *getattr(found, "__all__", ())}
    names = {each: getattr(found, each) for each in known if each[0] != "_"}
    run_examples(attrgetter(name)(found), name, names)


def run_examples(described: object, name: str, names: dict[str, object]) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(described, name, globs=names)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    transformers.logging.set_verbosity_warning()  # at a higher level the Trainer prints metrics
    result = doctest.DocTestRunner().run(test, out=said.append)
    assert result.failed == 0, "".join(said)
