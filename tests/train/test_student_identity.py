"""Test that a run resumes only from its student, identified by weights and not by path."""

import json

import pytest

from sparselogits.data import CacheDataset
from sparselogits.errors import RecipeError
from sparselogits.train.recipe import parse_recipe
from sparselogits.train.run import _described, _made_from, _read_finished
from tests.conftest import tiny_llama


def test_another_student_under_the_same_path_is_noticed(cache, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "student")
    values = {"cache": str(cache), "out": str(tmp_path), "student": {"path": f"{tmp_path}/student"}}
    recipe = parse_recipe(values, source="test")
    described = _described(recipe)
    made_from = _made_from(CacheDataset(cache), recipe)
    begun = described | {"made_from": made_from}
    (tmp_path / "recipe.json").write_text(json.dumps(begun))
    assert _read_finished(tmp_path, described, recipe) is None  # begun, and goes on
    tiny_llama(seed=1).save_pretrained(tmp_path / "student")
    with pytest.raises(RecipeError, match="the weights of the student"):
        _read_finished(tmp_path, described, recipe)
    del made_from["student"]  # as earlier versions wrote it
    (tmp_path / "recipe.json").write_text(json.dumps(begun))
    assert _read_finished(tmp_path, described, recipe) is None
