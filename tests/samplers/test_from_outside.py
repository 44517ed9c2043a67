"""Test a sampler of another package, declared by an entry point.

The sampler is the one of docs/extending.md, installed beside this package as pip would do it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from transformers import TrainingArguments
from typer.testing import CliRunner

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.cli import app
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.samplers import (
    find_sampler,
    fit_budget,
    from_parameters,
    samplers,
    window_uniforms,
)
from sparselogits.samplers.registry import GROUP, _from_packages
from sparselogits.store import Cache, codec_for, verify
from tests.conftest import tiny_llama, write_package
from tests.pages import ROOT, blocks
from tests.samplers.distributions import logits_of

PAGE = blocks(ROOT / "docs" / "extending.md")


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Iterator[Path]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    _from_packages.cache_clear()
    yield folder
    _from_packages.cache_clear()


@pytest.fixture
def stratified(packages) -> None:
    code = next(block.code for block in PAGE if "class Stratified" in block.code)
    (points,) = (block.code for block in PAGE if block.language == "toml")
    heading, line = points.splitlines()
    assert heading == f'[project.entry-points."{GROUP}"]'
    name, place = line.replace('"', "").split(" = ")
    module, kind = place.split(":")
    write_package(packages, module, code, GROUP, {name: kind})


def sparselogits(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("stratified")
def test_it_draws_what_it_states():
    """z-test at 1e-6 over 4 096 draws from 3 distributions of 60 tokens."""
    kind = find_sampler("stratified")
    assert kind is not None
    sampler = kind.of({"rounds": 7})
    assert codec_for(sampler)["weights"] == "counts"
    logits = torch.stack([logits_of("random", 60, seed) for seed in range(3)]).float()
    mean, square = torch.zeros(2, 3, 60, dtype=torch.float64)
    for window in range(64):
        uniforms = window_uniforms(1, window, 3 * 64, 7)
        dense = sampler(logits.repeat(64, 1), uniforms).dense().double().view(64, 3, -1)
        mean, square = mean + dense.sum(0) / 4096, square + dense.square().sum(0) / 4096
    error = ((square - mean.square()) / 4096).sqrt().clamp_min(1e-5)
    z = (mean - logits.double().softmax(-1)).abs() / error
    assert float(z.max()) < NormalDist().inv_cdf(1 - 0.5e-6 / 180)
    fitted = fit_budget(sampler, [logits], 5.0)
    uniforms = window_uniforms(2, 0, 3 * 64, fitted.uniforms_per_position)
    drawn = fitted(logits.repeat(64, 1), uniforms)
    assert float(drawn.entries_per_position.double().mean()) == pytest.approx(5, abs=0.6)


@pytest.mark.usefixtures("stratified")
def test_command_trainer_and_comparison_use_it(tmp_path, teacher_folder, text):
    assert "stratified" in sparselogits("cache", "--help")
    (words,) = next(block.commands for block in PAGE if "my-stratified" in block.code)
    pages, cache, out = tmp_path / "pages.jsonl", tmp_path / "my-stratified", tmp_path / "compared"
    pages.write_text("".join(line for line in text.open() if len(line) < 2500))
    places = {"MODEL": teacher_folder, "TEXT": pages, "my-stratified": cache}
    command = [places.get(word, word) for word in words[1:]]
    sparselogits(*command, "--window", 32, "--device", "cpu")
    sparselogits(*command, "--window", 32, "--device", "cpu")  # resumes: nothing is left to do
    opened = Cache.open(cache)
    assert opened.identity.sampler["name"] == "stratified"
    assert opened.identity.codec["weights"] == "counts"
    assert opened.statistics().entries_per_position == pytest.approx(12, rel=0.15)
    assert verify(opened).ok

    trainer = SparseKDTrainer(
        tiny_llama(seed=2),
        TrainingArguments(str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True),
        train_dataset=CacheDataset(cache),
        rounds=opened.identity.sampler["rounds"] // 2,
    )
    assert trainer.train().global_step == 2
    with pytest.raises(InvalidArgumentError, match="unbiased"):
        SparseKDTrainer(tiny_llama(), train_dataset=CacheDataset(cache), missing_mass="renormalise")

    recipe = tmp_path / "recipe.yaml"
    values = {
        **{"teacher": str(teacher_folder), "data": str(pages), "out": str(out), "window": 32},
        **{"holdout": 0.25, "heldout_windows": 4, "seeds": [0], "resamples": 20},
        "students": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2}},
        "training": {"logging_steps": 1},
        "methods": ["ce", {"sampler": "stratified", "budget": 5}],
    }
    recipe.write_text(json.dumps(values))  # JSON is YAML
    sparselogits("compare", recipe, "--device", "cpu")
    results = json.loads((out / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["done", "done"]
    row = results["methods"][1]
    assert (row["method"], row["family"], row["unbiased"]) == ("stratified 5", "stratified", True)
    assert "stratified" in (out / "report.html").read_text()


def test_a_package_that_is_broken_breaks_nothing_else(packages):
    code = """
from sparselogits.samplers import TopK, Sampler, parameter
from dataclasses import dataclass

class Mute(Sampler):
    name, title, unbiased, uniforms_per_position = "mute", "mute", True, 0
    def draw(self, logits, uniforms, first_position): ...

class Taken(TopK):
    pass

@dataclass(frozen=True)
class Clashing(TopK):
    k: str = parameter("a", "Another k")
    name = "clashing"

@dataclass(frozen=True)
class Good(TopK):
    name = title = "good"
"""
    points = {"absent": "Absent", "mute": "Mute", "topk": "Taken", "number": "__file__"}
    points |= {"clashing": "Clashing", "good": "Good"}
    write_package(packages, "strange", code, GROUP, points)
    with pytest.warns(SparseLogitsWarning) as said:
        known = samplers()
    assert "good" in known
    assert known["topk"].__module__ == "sparselogits.samplers.heads"
    for name, reason in {
        **{"absent": "no attribute 'Absent'", "mute": "does not define stores"},
        **{"topk": "has the name 'topk'", "number": "expected a subclass"},
        "clashing": "'k' of Clashing has the name of another option",
    }.items():
        assert name not in known or name == "topk"
        assert any(repr(name) in str(w.message) and reason in str(w.message) for w in said), name
    assert from_parameters({"name": "good", "k": 3})
    with pytest.raises(InvalidArgumentError, match=r"unknown sampler 'mute'; available: .*good"):
        from_parameters({"name": "mute"})
