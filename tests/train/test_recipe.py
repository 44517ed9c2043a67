"""Recipes say what is wrong with them, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparselogits.errors import RecipeError
from sparselogits.train import load_recipe
from sparselogits.train.recipe import parse_recipe

GOOD = {"cache": "c", "out": "o"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"student": {"layer": 2}}, "student.layer: unknown key; did you mean 'layers'"),
        ({"alpha": 1.5}, r"alpha: .*less than or equal to 1 \(found 1.5\)"),
        ({"method": "topk"}, "method: .*'ce', 'sparse', 'full' or 'reverse_kl'"),
        ({"method": "reverse_kl"}, "give a teacher with method: full or reverse_kl"),
        ({"thinning": {}}, r"thinning: give one of rounds, budget and schedule \(found none\)"),
        ({"thinning": {"rounds": 2, "budget": 3}}, r"found rounds and budget"),
        ({"thinning": {"round": 2}}, "thinning.round: unknown key; did you mean 'rounds'"),
        ({"thinning": {"schedule": []}}, "thinning: a thinning schedule needs at least one stage"),
        (
            {"thinning": {"schedule": [{"until": 0.5, "rounds": 5}, {"until": 0.2, "rounds": 9}]}},
            r"thinning: .*must end one after another; until is \[0.5, 0.2\]",
        ),
        (
            {"thinning": {"schedule": [{"untill": 0.5, "rounds": 5}]}},
            "thinning.schedule.0.untill: unknown key; did you mean 'until'",
        ),
        ({"method": "full"}, "give a teacher with method: full"),
        ({"student": {"hidden_size": 30, "heads": 4}}, "does not divide"),
        ({"zzz": 1}, "zzz: unknown key; known: cache"),
    ],
)
def test_mistakes_are_named(change: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(GOOD | change, source="recipe.yaml")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RecipeError, match="cache: missing"):
        parse_recipe({"out": "o"}, source="recipe.yaml")


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: c\nout: o\nalpha: 0.1\nstudent: {layers: 2}\n")
    recipe = load_recipe(path, alpha=0.2, epochs=None)
    assert (recipe.alpha, recipe.epochs, recipe.student.layers) == (0.2, 1.0, 2)


@pytest.mark.parametrize(
    ("content", "said"), [("a: [", "not YAML"), ("- a", "must be a mapping"), (None, "be read")]
)
def test_files_that_are_no_recipe(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)
