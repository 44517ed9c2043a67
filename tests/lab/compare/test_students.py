"""Test that all methods start from the same pruned or quantised weights."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparselogits.errors import RecipeError
from sparselogits.lab.compare import compare, parse_compare_recipe


def test_pruned_and_quantised_students(tiny, tmp_path):
    pytest.importorskip("torchao")
    students = {
        "pruned": {"from": "teacher", "layers": 1},
        "int4": {"from": "teacher", "quantize": {"config": "int4-weight-only", "group_size": 16}},
    }
    values = tiny(tmp_path, students=students, seeds=[0], training={"learning_rate": 1e-9})
    methods = ["ce", {"sampler": "systematic", "rounds": 5}]
    recipe = parse_compare_recipe({**values, "methods": methods}, source="the test")
    results = compare(recipe)
    assert results.complete, [run.message for run in results.runs]
    (start,) = (recipe.out / "students").iterdir()
    pruned = AutoModelForCausalLM.from_pretrained(start)
    assert pruned.config.num_hidden_layers == 1
    # at a learning rate of nothing a run ends with the weights it started from
    folders = {(run.student, run.method): recipe.out / str(run.folder) for run in results.runs}
    for (student, _), folder in folders.items():
        trained = AutoModelForCausalLM.from_pretrained(folder / "model")
        if student == "pruned":
            for name, value in trained.state_dict().items():
                torch.testing.assert_close(value, pruned.state_dict()[name], atol=1e-6, rtol=0)
        else:
            config = json.loads((folder / "model" / "config.json").read_text())
            assert config["quantization_config"]["quant_method"] == "torchao"
            assert trained.config.num_hidden_layers == 2
    counted = results.settings["student_parameters"]
    assert counted["int4"] == results.settings["teacher"]["parameters"]
    assert counted["pruned"] == sum(value.numel() for value in pruned.parameters())
    # the teacher's own weights in four bits are nearer to it than one block of two
    kl = {row.student: row.figures["kl"].mean for row in results.methods if row.method == "CE"}
    assert kl["int4"] < kl["pruned"]
    made = start.stat().st_mtime_ns
    assert compare(recipe).complete
    assert start.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"from": "teacher"}, "needs a size or a quantisation; give layers, drop_layers"),
        ({"from": "teacher", "drop_layers": []}, "needs a size or a quantisation"),
        ({"from": "scratch", "layers": 2}, "teacher"),
        ({"from": "teacher", "layer": 2}, "layer: unknown key; did you mean 'layers'"),
        ({"layer": 2}, "layer: unknown key; did you mean 'layers'"),
    ],
)
def test_a_student_that_cannot_be_is_refused(tiny, tmp_path, student, message):
    values = tiny(tmp_path, students={"own": student})
    with pytest.raises(RecipeError, match=message):
        parse_compare_recipe({**values, "methods": ["ce"]}, source="the test")


def test_the_student_before_training_and_what_training_recovers(tiny, tmp_path):
    students = {"pruned": {"from": "teacher", "layers": 1}}
    training = {"learning_rate": 1e-3, "num_train_epochs": 2}
    values = tiny(tmp_path, students=students, seeds=[0, 1], training=training, vary_draws=True)
    methods = [
        "none",
        "full",
        {"sampler": "multinomial", "rounds": 8},
        {"sampler": "topk", "k": 3, "learning_rate": 1e-9},
    ]
    recipe = parse_compare_recipe({**values, "methods": methods}, source="the test")
    results = compare(recipe)
    assert results.complete, [run.message for run in results.runs]
    # the same weights for every seed: measured once
    assert [run.seed for run in results.runs if run.method == "before training"] == [0]
    (start,) = (recipe.out / "students").iterdir()
    (folder,) = [run.folder for run in results.runs if run.method == "before training"]
    before = AutoModelForCausalLM.from_pretrained(recipe.out / str(folder) / "model").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(start).state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    rows = {row.method: row for row in results.methods}
    recovered = {name: row.recovered for name, row in rows.items()}
    kl = {name: row.figures["kl"].mean for name, row in rows.items()}
    assert kl["full KD"] < kl["before training"]
    assert recovered["before training"] is not None
    assert recovered["full KD"] is not None
    assert recovered["before training"].mean == pytest.approx(0, abs=1e-9)
    assert recovered["full KD"].mean == pytest.approx(100)
    # a learning rate of its own: that method has not moved
    still = recovered["Top-K 3, learning rate 1e-09"]
    assert still is not None
    assert abs(still.mean) < 1
    # a cache for each seed where draws are random, one for both where they are not
    names = sorted(folder.name.rpartition("-")[0] for folder in (recipe.out / "caches").iterdir())
    drawn = [name for name in names if name.startswith("multinomial")]
    assert drawn == ["multinomial-8-0", "multinomial-8-1"]
    assert len(names) == 4


def test_nothing_is_trained_takes_no_settings_of_training(tiny, tmp_path):
    for wrong in ({"alpha": 0.5}, {"learning_rate": 1e-3}):
        methods = [{"method": "none", **wrong}]
        with pytest.raises(RecipeError, match=f"none does not use {next(iter(wrong))}"):
            parse_compare_recipe({**tiny(tmp_path), "methods": methods}, source="the test")
