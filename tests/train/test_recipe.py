"""Test that errors of recipes name the problem and the probable intention."""

import re
from pathlib import Path

import pytest

from sparselogits.errors import RecipeError
from sparselogits.methods import METHODS
from sparselogits.safe_yaml import parse_yaml
from sparselogits.train import load_recipe
from sparselogits.train.recipe import (
    SIZES,
    Recipe,
    Student,
    TrainingSettings,
    parse_recipe,
    student_of,
    with_new_names,
    with_old_names,
)
from sparselogits.train.recipe_text import recipe_table, recipe_text

GOOD = {"cache": "c", "out": "o", "student": {"size": "tiny"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"student": {"layer": 2}}, "student.layer: unknown key; did you mean 'layers'"),
        ({"alpha": 1.5}, r"alpha: .*less than or equal to 1 \(found 1.5\)"),
        ({"method": "topk"}, "method: unknown method 'topk'; available: sparse, ce"),
        ({"method": "reverse_kl"}, "'reverse_kl' runs the teacher online, but no teacher is given"),
        ({"teacher": "t"}, "'sparse' does not use a teacher, .*full, reverse_kl or jensen_shannon"),
        ({"beta": 0.5}, "'sparse' has no beta, .*choose jensen_shannon"),
        ({"beta": 1, "method": "jensen_shannon", "teacher": "t"}, "beta must be in .0, 1., found"),
        ({"thinning": {}}, r"thinning: give one of rounds, budget and schedule \(found none\)"),
        ({"thinning": {"rounds": 2, "budget": 3}}, r"found rounds and budget"),
        ({"thinning": {"round": 2}}, "thinning.round: unknown key; did you mean 'rounds'"),
        ({"thinning": {"schedule": []}}, "thinning: a thinning schedule needs at least one stage"),
        (
            {"thinning": {"schedule": [{"until": 0.5, "rounds": 5}, {"until": 0.2, "rounds": 9}]}},
            r"thinning: .*must end one after another, found until \[0.5, 0.2\]",
        ),
        (
            {"thinning": {"schedule": [{"untill": 0.5, "rounds": 5}]}},
            "thinning.schedule.0.untill: unknown key; did you mean 'until'",
        ),
        ({"student": {"hidden_size": 30, "heads": 4}}, "does not divide"),
        ({"student": {"heads": 4, "kv_heads": 3}}, "kv_heads=3 does not divide"),
        ({"student": {"size": "huge"}}, "unknown size 'huge'; available: tiny, 3m"),
        ({"student": {"size": "tiny", "layers": 9}}, "found size and layers"),
        ({"student": {"path": "a", "config": "b"}}, "found path and config"),
        ({"student": {"size": "tiny", "lora": {}}}, "give path, or leave lora out"),
        ({"student": {"path": "a", "lora": {"rang": 3}}}, "lora.rang: unknown key; .*'rank'"),
        ({"student": {}}, "student: missing; specify the student.*--student MODEL"),
        ({"student": None}, "student: missing; specify the student"),
        ({"learning_rate": float("inf")}, "learning_rate: .*finite number"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs: .*finite number"),
        ({"epochs": 2}, "epochs: renamed; use 'num_train_epochs'"),
        ({"batch_windows": 2}, "batch_windows: renamed; use 'per_device_train_batch_size'"),
        ({"accumulate": 2}, "accumulate: renamed; use 'gradient_accumulation_steps'"),
        ({"warmup": 0.1}, "warmup: renamed; use 'warmup_steps' .number of steps over which"),
        ({"precision": "bfloat16"}, "precision: renamed; use 'bf16' .compute in bfloat16"),
        ({"log_steps": 2}, "log_steps: renamed; use 'logging_steps'"),
        ({"epoch": 2}, "epoch: unknown key; did you mean 'num_train_epochs'"),
        ({"trainer": {"optim": "sgd"}}, "trainer: .*are keys of the recipe itself"),
        ({"output_dir": "x"}, "output_dir: set by the recipe's key 'out'"),
        ({"max_step": 3, "a_b_c": 1}, "did you mean 'max_steps'.*\n  a_b_c: unknown key; known"),
        ({"warmup_ratio": 1}, r"warmup_ratio: must be a share in \[0, 1\), found 1"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "give warmup_steps or warmup_ratio"),
        ({"alpha": [0] * 9999}, r"alpha: .*\(found \[0, 0, 0, 0, 0, 0, 0, 0, \.\.\.\]\)"),
        ({"\x1b[2J": 1}, r"^recipe.yaml is not a valid recipe:\n  \\x1b\[2J: unknown key"),
        (
            {"out": "s3://bucket/run"},
            "out: s3:/bucket/run is a URL; expected a path on this machine",
        ),
        ({"zzz": 1}, "zzz: unknown key; known: .*cache.*TrainingArguments"),
    ],
)
def test_mistakes_are_named(change, said):
    with pytest.raises(RecipeError, match=re.compile(said, re.DOTALL)):
        parse_recipe(GOOD | change, source="recipe.yaml")


def test_what_is_missing_is_named():
    with pytest.raises(RecipeError, match="cache: missing"):
        parse_recipe({"out": "o", "student": {"size": "tiny"}}, source="recipe.yaml")
    with pytest.raises(RecipeError, match="--student-config 30m"):
        parse_recipe({"cache": "c", "out": "o"}, source="recipe.yaml")


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: c\nout: o\nalpha: 0.1\nstudent: {layers: 2}\n")
    recipe = load_recipe(path, alpha=0.2, num_train_epochs=None)
    assert (recipe.alpha, recipe.num_train_epochs, recipe.student.layers) == (0.2, 1.0, 2)


def test_every_field_of_training_arguments_is_a_key():
    from dataclasses import fields

    from transformers import TrainingArguments

    for field in fields(TrainingArguments):
        if field.name in Recipe.model_fields or field.name == "output_dir":
            continue
        recipe = parse_recipe(GOOD | {field.name: "x"}, source="x")
        assert recipe.training_arguments[field.name] == "x"
        assert recipe.model_dump(mode="json")[field.name] == "x"


def test_a_share_of_warm_up_has_two_names():
    for name in ("warmup_steps", "warmup_ratio"):
        assert parse_recipe(GOOD | {name: 0.25}, source="x").warmup_steps == 0.25
    assert parse_recipe(GOOD | {"warmup_steps": 300}, source="x").warmup_steps == 300


OLD = {
    **{"epochs": 2.0, "batch_windows": 4, "accumulate": 3, "learning_rate": 0.1, "warmup": 0.2},
    **{"weight_decay": 0.0, "max_grad_norm": 2.0, "precision": "bfloat16", "log_steps": 7},
}


def test_old_names_are_those_of_the_new_names():
    new = with_new_names(OLD | {"trainer": {"optim": "sgd"}})
    settings = TrainingSettings.model_validate(new).training_arguments
    assert settings == new | {"save_steps": None}
    del settings["optim"], settings["save_steps"]
    assert with_old_names(settings) == OLD
    assert with_new_names(settings) == settings


@pytest.mark.parametrize(
    ("content", "said"), [("a: [", "not YAML"), ("- a", "must be a mapping"), (None, "be read")]
)
def test_files_that_are_no_recipe(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_yaml_runs_no_code(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, "anchors .* are not supported: repeat the value .line 1, column 4"),
        ("a: 1\na: 2", "the key 'a' occurs twice: remove one .line 2"),
        ("1: 2", "the key '1' is not a string: put it in quotes"),
        ("a: " + "[" * 5000, "nested deeper than 32"),
        ("a: " + "9" * 5000, "has 5000 digits"),
        ("a: !!timestamp 2020-01-01", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!bool x", "'x' does not match its tag !!bool: remove the tag .line 1, column 4"),
        ('a: !!float ""', "'' does not match its tag !!float"),
        ("a: !!float 1" + ":0" * 200, "does not match its tag !!float"),
        ("a: !!map [b]", "expected a mapping node, but found sequence"),
        ("!!str [a]: b", "is not a string: put it in quotes"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x07", "not YAML"),
        ("x" * (2 << 20), "more than the 1,048,576 that are allowed"),
        ("", "found nothing"),
    ],
    ids=lambda value: value[:12],
)
def test_yaml_that_is_refused(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=said) as refused:
        load_recipe(path)
    assert len(str(refused.value)) < 1000


def test_scalars_are_those_of_yaml_1_2():
    text = "{a: 1e-3, b: no, c: 1:30, d: 2020-01-01, e: 0x1f, f: 1_0, g: .5, h: -7, i: ~, j: true}"
    assert parse_yaml(text, "it") == {
        **{"a": 1e-3, "b": "no", "c": "1:30", "d": "2020-01-01", "e": "0x1f", "f": "1_0"},
        **{"g": 0.5, "h": -7, "i": None, "j": True},
    }


def test_dates_and_pipes_are_named(tmp_path):
    import os

    path = tmp_path / "recipe.yaml"
    path.write_text("cache: 2020-01-01\nout: o\nstudent: {size: tiny}\nalpha: 2020-01-01\n")
    with pytest.raises(RecipeError, match=r"alpha: .*number.*\(found '2020-01-01'\)"):
        load_recipe(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="pipe"):
        load_recipe(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ("30m", {"size": "30m"}),
        ("layers=12,width=768", {"layers": 12, "hidden_size": 768, "heads": 12}),
        ("width=48", {"hidden_size": 48, "heads": 1}),
        (
            "layers=2, width=96,heads=4,kv_heads=2,mlp=200,tied=false",
            {"layers": 2, "hidden_size": 96, "heads": 4, "kv_heads": 2, "intermediate_size": 200}
            | {"tied": "false"},
        ),
        ("some/config.json", {"config": "some/config.json"}),
    ],
)
def test_a_student_by_size_or_numbers(said, fields):
    assert student_of(said) == fields
    assert parse_recipe(GOOD | {"student": fields}, source="x").student.is_new


@pytest.mark.parametrize("said", ["layer=3", "layers=many", "layers=", "width=0"])
def test_sizes_that_are_none(said):
    with pytest.raises(RecipeError):
        parse_recipe(GOOD | {"student": student_of(said)}, source="x")


@pytest.mark.parametrize("name", SIZES)
def test_the_name_of_a_size_is_its_number_of_parameters(name):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads = SIZES[name]
    assert width % heads == 0
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8,
                hidden_size=width,
                intermediate_size=round(width * 8 / 3 / 8) * 8,
                num_hidden_layers=layers,
                num_attention_heads=heads,
            )
        )
    found = sum(p.numel() for p in model.parameters())
    named = {"tiny": 0.8e6, "m": 1e6, "b": 1e9}
    expected = named["tiny"] if name == "tiny" else float(name[:-1]) * named[name[-1]]
    assert found == pytest.approx(expected, rel=0.07)


def test_the_default_learning_rate_is_that_of_the_kind_of_student():
    rates = [
        parse_recipe(GOOD | {"student": student}, source="x").peak_learning_rate
        for student in ({"size": "tiny"}, {"path": "a", "lora": {}}, {"path": "a"})
    ]
    assert rates[0] > rates[1] > rates[2] > 0
    assert parse_recipe(GOOD | {"learning_rate": 0.5}, source="x").peak_learning_rate == 0.5


def test_old_students_are_described_as_before():
    """Runs of comparisons are known by a hash of this."""
    assert set(Student(layers=2).model_dump(mode="json")) == {
        *("path", "hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "tied")
    }
    assert Student(size="tiny").model_dump(mode="json")["size"] == "tiny"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cache": "s3://b/c d", "out": "/a/b", "student": {"path": "o/name", "lora": {"rank": 4}}},
        {"student": {"layers": 3, "hidden_size": 64}, "alpha": 0.25, "learning_rate": 1e-5}
        | {"thinning": {"rounds": 3}, "report_to": ["tensorboard"], "optim": "sgd"},
        {"cache": "it's: #1", "out": "2020", "student": {"size": "30m"}, "tokenizer": "true"},
    ],
)
def test_a_printed_recipe_loads_again(given):
    text = recipe_text(given)
    read = parse_recipe(parse_yaml(text, "it"), source="it")
    start = {"cache": "my-cache", "out": "my-run", "student": {"size": "tiny"}}
    assert read == parse_recipe(start | given, source="given")
    for model in (type(read), Student):
        for name, field in model.model_fields.items():
            assert re.search(rf"^ *(# )?{name}:", text, re.MULTILINE), name
            assert field.description, name


def test_the_docs_have_every_method():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = page.partition("## Methods\n")[2].partition("\n\n`alpha`")[0]
    rows = [line.replace("\\|", "/").split("|")[1:-1] for line in table.strip().splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [f"`{m.name}`", m.loss.replace("|", "/"), "yes" if m.online else "no"]
        for m in METHODS.values()
    ]


def test_the_docs_have_every_key():
    page = Path(__file__).parents[2] / "docs" / "training.md"
    begin, end = "<!-- recipe -->\n", "<!-- end of recipe -->\n"
    written = page.read_text().partition(begin)[2].partition(end)[0]
    assert written == recipe_table(), "copy it: python -m sparselogits.train.recipe_text"


def test_the_home_folder_in_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "recipe.yaml"
    file.write_text("cache: [~/c, '~/d']\nout: ~/o\nstudent: {path: ~/s}\n")
    recipe = load_recipe(file)
    assert recipe.out == tmp_path / "o"
    assert recipe.student.path == f"{tmp_path}/s"
    assert [*map(str, recipe.caches)] == [f"{tmp_path}/c", f"{tmp_path}/d"]
