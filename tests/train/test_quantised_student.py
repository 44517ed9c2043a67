"""Test that a student trained for quantised weights is saved and evaluated with them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparselogits.cli.models import load_student
from sparselogits.errors import RecipeError
from sparselogits.train import run
from sparselogits.train.recipe import Recipe, parse_recipe

pytest.importorskip("torchao")


def recipe_of(cache: Path, out: Path, teacher: Path, **student: object) -> Recipe:
    return parse_recipe(
        {
            "cache": str(cache),
            "out": str(out),
            "student": {"path": str(teacher), **student},
            "num_train_epochs": 0.1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
        },
        source="the test",
    )


def test_training_ends_with_quantised_weights(cache, teacher_folder, tmp_path):
    quantize = {"config": "int4-weight-only", "group_size": 16}
    recipe = recipe_of(cache, tmp_path / "run", teacher_folder, quantize=quantize)
    result = run(recipe, device="cpu")
    assert result.steps > 1
    config = json.loads((result.model_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    student = AutoModelForCausalLM.from_pretrained(result.model_path)
    groups = student.model.layers[0].mlp.up_proj.weight.dequantize().reshape(-1, 16)
    assert max(len(group.unique()) for group in groups) <= 16
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    plain = teacher.model.layers[0].mlp.up_proj.weight.reshape(-1, 16)
    assert len(plain[0].unique()) == 16
    assert not torch.allclose(plain, groups, atol=1e-4)
    card = (result.model_path / "README.md").read_text()
    assert "int4-weight-only, groups of 16" in card
    assert {f.name for f in result.model_path.iterdir()} >= {"README.md", "tokenizer.json"}
    # the run's folder stands for its student wherever a model is named
    loaded = load_student(str(tmp_path / "run"), "cpu")
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(loaded(tokens).logits, student(tokens).logits)
    # a second run finds it
    assert not run(recipe, device="cpu").fresh


def test_an_adapter_of_quantised_weights_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="give one of them"):
        recipe_of(tmp_path, tmp_path, tmp_path, lora={}, quantize={"config": "int8-weight-only"})
    with pytest.raises(RecipeError, match="int8-weight-only"):
        recipe_of(tmp_path, tmp_path, tmp_path, quantize={"config": "int5"})
