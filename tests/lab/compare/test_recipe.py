"""A comparison's recipe says what is wrong with it, and its lists stand for what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparselogits.errors import RecipeError
from sparselogits.lab.compare import load_compare_recipe, parse_compare_recipe
from sparselogits.train.recipe import with_old_names

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
RESULTS = EXPERIMENTS / "results"

GOOD = {"teacher": "t", "data": "d", "out": "o", "methods": ["ce"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": []}, "methods: .*at least 1 item"),
        (
            {"methods": ["topk"]},
            "methods.0.method: unknown method; available: sparse, ce, full, .*, none",
        ),
        ({"methods": [{"sampler": "topk", "kay": 3}]}, "kay: unknown key; did you mean 'k'"),
        ({"methods": [{"sampler": "multinomial"}]}, "multinomial needs a budget or rounds"),
        ({"methods": [{"alpha": 0.5}]}, "give a sampler, or method"),
        ({"methods": [{"method": "ce", "budget": 5}]}, "method: ce takes no budget"),
        ({"methods": [{"method": "full", "beta": 0.5}]}, "'full' has no beta"),
        ({"methods": [{"method": "jensen_shannon", "beta": 1.5}]}, "beta must be in .0, 1."),
        ({"methods": [{"sampler": "topk", "rounds": 5}]}, "sampler 'topk'.*'rounds'"),
        (
            {"methods": [{"sampler": "systematic", "budget": 5, "missing_mass": "ghost"}]},
            "unbiased",
        ),
        ({"methods": [{"sampler": "systematic", "budget": 5, "rounds": 5}]}, "not both"),
        ({"methods": [{"sampler": "adaptive", "budget": 5}]}, "adaptive needs a student"),
        ({"tasks": {"name": ["agreement"]}}, "tasks.name: unknown key; did you mean 'names'"),
        ({"tasks": {"names": []}}, "tasks.names: .*at least 1 item"),
        ({"tasks": {"names": ["a", "a"]}}, "a task is there twice: a, a"),
        ({"methods": ["ce", "ce"]}, "methods are there twice: CE"),
        ({"seeds": [1, 1]}, "seeds are there twice: 1"),
        ({"students": {"a": {"layer": 2}}}, "students.a.layer: unknown key; did you mean 'layers'"),
        ({"training": {"epoch": 2}}, "training.epoch: .* did you mean 'num_train_epochs'"),
        ({"training": {"epochs": 2}}, "training.epochs: renamed; use 'num_train_epochs'"),
        ({"training": {"seed": 2}}, "training.seed: set by the recipe's key 'seeds'"),
        ({"gradients": {"draw": 4}}, "gradients.draw: unknown key; did you mean 'draws'"),
        ({"gradients": {"draws": 1}}, "gradients.draws: .*greater than or equal to 2"),
        ({"gradients": {"batch_windows": []}}, "batch_windows: .*at least 1 item"),
        ({"gradients": {"windows": 2}}, "gradients: 2 windows do not fill a batch of 4"),
        ({"windo": 2}, "windo: unknown key; did you mean 'window'"),
    ],
)
def test_mistakes_are_named(change: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_compare_recipe(GOOD | change, source="recipe.yaml")


def test_lists_stand_for_all_pairs() -> None:
    lists = {"sampler": "topk", "k": [3, 12], "missing_mass": ["drop", "ghost"]}
    recipe = parse_compare_recipe(GOOD | {"methods": ["full", lists]}, source="recipe.yaml")
    assert [method.title for method in recipe.methods] == [
        *("full KD", "Top-K 3", "Top-K 3, ghost", "Top-K 12", "Top-K 12, ghost")
    ]


@pytest.mark.parametrize("results", sorted(RESULTS.glob("compare_*.json")), ids=lambda f: f.stem)
def test_training_is_known_by_the_names_it_was_first_known_by(results: Path) -> None:
    """The fingerprint of a run holds these values: results of earlier versions stay valid."""
    before = json.loads(results.read_text())["settings"]["recipe"]["training"]
    recipe = results.stem.removeprefix("compare_") + ".yaml"
    training = load_compare_recipe(EXPERIMENTS / "compare" / recipe).training
    assert with_old_names(training.model_dump(mode="json", exclude={"save_steps"})) == before
