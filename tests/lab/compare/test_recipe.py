"""Test the errors of a comparison's recipe, and the expansion of its lists."""

import hashlib
import json
from pathlib import Path

import pytest

from sparselogits.errors import RecipeError
from sparselogits.identity import canonical_json
from sparselogits.lab.compare import load_compare_recipe, parse_compare_recipe
from sparselogits.lab.compare.caches import Draw
from sparselogits.lab.compare.recipe import MethodSpec
from sparselogits.lab.compare.runs import in_fingerprint
from sparselogits.train.recipe import with_old_names

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
RESULTS = EXPERIMENTS / "results"

GOOD = {"teacher": "t", "data": "d", "out": "o", "methods": ["ce"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": []}, "methods: .*at least 1 item"),
        (
            {"out": "s3://bucket/run"},
            "out: s3:/bucket/run is a URL; expected a path on this machine",
        ),
        ({"methods": ["topk"]}, "0.method: unknown method; available: sparse, ce, full, .*, none"),
        ({"methods": [{"sampler": "topk", "kay": 3}]}, "has no field 'kay'; did you mean 'k'"),
        ({"methods": [{"sampler": "multinomial"}]}, "multinomial needs a budget or rounds"),
        ({"methods": [{"alpha": 0.5}]}, "found no sampler; give one, or method"),
        ({"methods": [{"method": "ce", "budget": 5}]}, "method: ce does not use budget"),
        ({"methods": [{"method": "full", "beta": 0.5}]}, "'full' has no beta"),
        ({"methods": [{"method": "jensen_shannon", "beta": 1.5}]}, "beta must be in .0, 1."),
        ({"methods": [{"sampler": "topk", "rounds": 5}]}, "sampler 'topk'.*'rounds'"),
        (
            {"methods": [{"sampler": "systematic", "rounds": 5, "missing_mass": "ghost"}]},
            "unbiased",
        ),
        ({"methods": [{"sampler": "systematic", "budget": 5, "rounds": 5}]}, "not both"),
        ({"methods": [{"sampler": "systematic", "budget": 0.5}]}, "budget is 0.5; give a finite"),
        ({"methods": [{"sampler": "adaptive", "budget": 5}]}, "adaptive' requires a value for stu"),
        ({"tasks": {"name": ["agreement"]}}, "tasks.name: unknown key; did you mean 'names'"),
        ({"tasks": {"names": []}}, "tasks.names: .*at least 1 item"),
        ({"tasks": {"names": ["a", "a"]}}, "a task is named twice: a, a"),
        ({"methods": ["ce", "ce"]}, "methods occur twice: CE"),
        ({"seeds": [1, 1]}, "seeds occur twice: 1"),
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
def test_mistakes_are_named(change, said):
    with pytest.raises(RecipeError, match=said):
        parse_compare_recipe(GOOD | change, source="recipe.yaml")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"sampler": "topk", "k": 0}, "k is 0; expected a whole number of at least 1"),
        ({"sampler": "topk", "k": 2.5}, "k is 2.5; expected a whole number"),
        ({"sampler": "topk", "k": "five"}, "k is 'five'; expected a whole number"),
        ({"sampler": "topp", "p": 0}, "p is 0; expected a number above 0, at most 1"),
        ({"sampler": "topp", "budget": 5}, "a budget of 5 entries could set.*p, max_entries"),
        ({"sampler": "threshold", "taw": 0.1}, "no field 'taw'; did you mean 'tau'"),
        ({"sampler": "systematic", "bugdet": 5}, "no field 'bugdet'; did you mean 'budget'"),
        ({"sampler": "sistematic", "budget": 5}, "unknown sampler 'sistematic'; available: sys"),
        ({"sampler": "adaptive", "student": "s", "budget": 5, "nominal_rounds": 5}, "not both"),
        ({"sampler": "adaptive", "student": "s"}, "adaptive needs a budget or nominal_rounds"),
        ({"sampler": "adaptive", "student": "s", "signal": "x"}, "expected distance or variance"),
        ({"sampler": "topk", "thinning": {"rounds": 5}}, "topk draws no rounds"),
    ],
)
def test_a_sampler_has_its_own_fields(method, said):
    with pytest.raises(RecipeError, match=said):
        parse_compare_recipe(GOOD | {"methods": [method]}, source="recipe.yaml")


@pytest.mark.parametrize(
    ("words", "title", "fingerprint", "folder"),
    [
        ({"method": "ce"}, "CE", "b252edc428c87646", "topk-1-e5e863"),
        (
            *({"method": "reverse_kl", "alpha": 0.25}, "reverse KL, alpha 0.25"),
            *("550e09373163d021", "topk-1-e5e863"),
        ),
        (
            *({"sampler": "topk", "k": 5, "missing_mass": "ghost"}, "Top-K 5, ghost"),
            *("168f3b1ba74b75e4", "topk-5-5fb256"),
        ),
        ({"sampler": "topk", "budget": 7}, "Top-K 7", "b59f86a7e8664373", "topk-7.0-864b28"),
        (
            *({"sampler": "topp", "p": 1, "max_entries": 40}, "Top-P 1 of at most 40"),
            *("200930d0424d6d1a", "topp-1.0-40-fdc603"),
        ),
        (
            {"sampler": "multinomial", "budget": 12, "proposal_exponent": 1},
            *("RS-KD 12, exponent 1", "89f7573b5d8ae456", "multinomial-1.0-12.0-56a2dd"),
        ),
        (
            {"sampler": "systematic", "rounds": 21, "alpha": 0.1, "learning_rate": 0.004},
            "systematic N = 21, alpha 0.1, learning rate 0.004",
            *("f437efd8712c2c18", "systematic-21-c05487"),
        ),
        (
            {
                **{"sampler": "systematic", "budget": 12},
                "thinning": {"budget": 5, "fresh_noise": False},
            },
            *("systematic 12, thinned to 5, frozen", "15c4cad35d438711", "systematic-12.0-5df89f"),
        ),
        (
            *({"sampler": "threshold", "tau": 0.1}, "threshold tau 0.1"),
            *("028dede230ba1cba", "threshold-0.1-3b2c21"),
        ),
        (
            {
                **{"sampler": "adaptive", "student": "runs/first", "budget": 6},
                **{"signal": "distance", "position_power": 6},
            },
            "adaptive 6 distance",
            *("9cc409770960b2b1", "adaptive-distance-6.0-6.0-88631d"),
        ),
        (
            {
                **{"sampler": "adaptive", "student": "runs/first", "nominal_rounds": 3},
                **{"reference": 1, "token_power": 0},
            },
            *("adaptive N = 3", "9e7d07fe8113d350", "adaptive-3-1.0-0.0-2b9e22"),
        ),
    ],
)
def test_finished_runs_of_earlier_versions_are_found(words, title, fingerprint, folder):
    """Titles, hashes and folders as the version wrote them that had samplers' fields in methods."""
    recipe = parse_compare_recipe(GOOD | {"methods": [words]}, source="recipe.yaml")
    (method,) = recipe.methods
    assert method.title == title
    found = hashlib.sha256(canonical_json(in_fingerprint(method))).hexdigest()
    assert found.startswith(fingerprint)
    assert Draw.of(method, recipe, 0).key == folder
    assert MethodSpec(**method.model_dump(exclude_defaults=True)) == method


def test_lists_stand_for_all_pairs():
    lists = {"sampler": "topk", "k": [3, 12], "missing_mass": ["drop", "ghost"]}
    recipe = parse_compare_recipe(GOOD | {"methods": ["full", lists]}, source="recipe.yaml")
    assert [method.title for method in recipe.methods] == [
        *("full KD", "Top-K 3", "Top-K 3, ghost", "Top-K 12", "Top-K 12, ghost")
    ]


@pytest.mark.parametrize("results", sorted(RESULTS.glob("compare_*.json")), ids=lambda f: f.stem)
def test_training_is_known_by_the_names_it_was_first_known_by(results):
    """The fingerprint of a run holds these values: results of earlier versions stay valid."""
    before = json.loads(results.read_text())["settings"]["recipe"]["training"]
    recipe = results.stem.removeprefix("compare_") + ".yaml"
    training = load_compare_recipe(EXPERIMENTS / "compare" / recipe).training
    assert with_old_names(training.model_dump(mode="json", exclude={"save_steps"})) == before
