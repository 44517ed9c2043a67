"""Test that checks without weights run before weights are loaded, and hold-outs of any text."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from sparselogits.corpus import PackedCorpus
from tests.conftest import Ended, tiny_llama, write_lines

Line = Callable[..., Ended]


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Loading a model's weights ends the command."""

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture(scope="module")
def places(tmp_path_factory, teacher_folder, text, cache) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("first")
    tiny_llama(seed=3).save_pretrained(root / "student")
    tiny_llama(seed=3).save_pretrained(root / "fresh")
    tiny_llama(seed=3).save_pretrained(root / "other/fresh")
    (root / "other/thesis.tex").write_text("years of work")
    (root / "latin.txt").write_bytes("Se\xf1or, the text.\n".encode("latin-1") * 400)
    (root / "short.txt").write_text("Hardly a window of text.")
    found = {path.stem: path for path in root.iterdir()}
    found["again"] = root / "other/fresh"
    return found | {"teacher": teacher_folder, "text": text, "cache": cache}


_RECIPE = ["teacher: {teacher}", "out: {new}", "window: 32", "methods: [{{method: ce}}]"]
RECIPES = {"latin_recipe": ["data: {latin}", *_RECIPE], "short_recipe": ["data: {short}", *_RECIPE]}
CACHE = "cache --teacher {teacher} --data {text} --window 32"
BEGUN = "cache --teacher {teacher} --data {text} --out {cache} --window 32 --rounds 12"
MISTAKES = {
    CACHE + " --out {new} --holdout 1": ("--holdout is 1;", "below 1"),
    CACHE + " --out {new} --windows 0:99999999": ("are not in the corpus", "windows 0:"),
    CACHE + " --out {new} --separator-id 999999": ("lies outside", "vocabulary"),
    CACHE + " --out {new} --tokenized-by {teacher}": ("no column `input_ids`", "tokenized data"),
    CACHE + " --out {new} --join-rows": ("join_rows with text", "remove it"),
    CACHE + " --out {new} --append": ("cannot append", "with which they were begun"),
    CACHE + " --out {other}": ("is not a cache", "choose an empty"),
    CACHE + " --out {latin}": ("latin.txt", "choose another folder"),
    BEGUN: ("packing.holdout: 0.0 in this build, 0.2", "use the same settings"),
    BEGUN + " --holdout 0.2": ("was begun with other text", "--append"),
    BEGUN + " --holdout 0.3": ("packing.holdout: 0.3 in this build, 0.2", "use the same settings"),
    BEGUN + " --holdout 0.2 --seed 4": ("seed: 4 in this build, 0 in", "use the same settings"),
    BEGUN + " --holdout 0.2 --temperature 2": ("temperature", "another output"),
    BEGUN + " --holdout 0.2 --sampler multinomial": ("sampler.name", "another output"),
    BEGUN + " --holdout 0.2 --windows-per-shard 3": ("windows_per_shard", "another output"),
    "cache --teacher {teacher} --data {latin} --out {new}": ("byte 0xf1 at offset 2", "iconv"),
    "cache --teacher {teacher} --data {short} --out {new}": ("too short", "--window"),
    "cache --teacher {teacher} --data {short} --out {new} --window 16 --holdout 0.1": (
        "too short for a hold-out",
        "window of at most",
    ),
    "eval {student}": ("--cache cache", "--data file"),
    "eval {student} --cache {cache} --window 16": (
        "--window can only be used with --data",
        "or leave the option out",
    ),
    "eval {student} --data {text} --corpus {cache}": ("both name the text", "one of them"),
    "eval {student} --data {text}": ("--data needs a tokenizer", "--tokenizer"),
    "eval {student} --data {latin} --tokenizer {teacher}": ("byte 0xf1", "iconv"),
    "eval {student} --data {short} --tokenizer {teacher}": ("too short", "--window"),
    "eval {student} --cache {cache} --teacher /no/teacher": ("no model folder", "give a folder"),
    "gradients {student} --teacher {teacher} --data {latin}": ("byte 0xf1", "iconv"),
    "gradients {student} --teacher {teacher} --data {short}": ("too short", "--window"),
    "gradients {fresh} --fresh --teacher {teacher} --data {text}": ("named fresh", "rename"),
    "gradients {fresh} {again} --teacher {teacher} --data {text}": (
        "the same folder name",
        "rename",
    ),
    "compare {latin_recipe}": ("byte 0xf1", "iconv"),
    "compare {short_recipe}": ("too short", "--window"),
    "view {cache} --window 999999 --student {student} --teacher {teacher}": ("999999", "window"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_weights_are_loaded_for_a_mistake(mistake, line, places, tmp_path, no_weights):
    names = places | {"new": tmp_path / "new"}
    for key, lines in RECIPES.items():
        names[key] = tmp_path / f"{key}.yaml"
        names[key].write_text("\n".join(lines).format(**names))
    code, _, said = line(*(word.format(**names) for word in mistake.split()))
    assert code == 2, said
    told = " ".join(said.lower().split())
    assert all(part.lower() in told for part in MISTAKES[mistake]), said


def unequal(count: int) -> list[dict[str, Any]]:
    rng = random.Random(count)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    return [
        {"text": " ".join(rng.choices(words, k=int(rng.lognormvariate(3.5, 1)) + 5))}
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["one text file", 3, 13, 100, "a folder"])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_first_command_holds_out_what_it_is_asked_for(
    kind, share, line, teacher_folder, tmp_path
):
    """As in the README, on the kinds of text that it names; up to the teacher's pass."""
    if kind == "one text file":
        data = tmp_path / "book.txt"
        data.write_text("\n".join(row["text"] for row in unequal(60)))
    elif kind == "a folder":
        data = tmp_path / "pages"
        data.mkdir()
        for number, row in enumerate(unequal(20)):
            (data / f"{number}.md").write_text(row["text"])
    else:
        data = write_lines(tmp_path / "pages.jsonl", unequal(int(kind)))
    out = tmp_path / "cache"
    code, _, said = line(
        *("cache", "--teacher", teacher_folder, "--data", data, "--out", out, "--window", 16),
        *("--holdout", share, "--rounds", 5, "--device", "cpu"),
        *("--windows-per-shard", 8, "--windows", "0:8"),
    )
    assert code == 0, said
    corpus = PackedCorpus.open(out / "corpus")
    total = corpus.summary.tokens + corpus.summary.holdout_tokens
    assert abs(corpus.holdout_windows * 16 - share * total) <= 16
    assert corpus.in_words() in said
    rule = corpus.summary.holdout_rule
    assert "whole document" in said if rule == "documents" else "the last of the text" in said


def test_eval_on_any_text(line, places, tmp_path):
    """Equal to the held-out text where that is the text; nothing of the cache is needed."""
    rows = unequal(40)
    data, same = tmp_path / "pages.jsonl", tmp_path / "same.jsonl"
    write_lines(data, ({"body": row["text"]} for row in rows))
    words = ["eval", places["student"], "--data", data, "--text-field", "body", "--json"]
    words += ["--tokenizer", places["teacher"], "--device", "cpu"]
    code, out, said = line(*words, "--window", 32, "--tasks", "last_word", "--task-limit", 3)
    assert code == 0, said
    alone = json.loads(out)["student"]
    assert alone["positions"] == 31 * len(alone["loss_by_window"]) > 0
    assert alone["kl"] is None
    assert alone["tasks"]
    # with the cache: its packing, its teacher
    write_lines(same, rows)
    words = ["eval", places["student"], "--data", same, "--cache", places["cache"], "--json"]
    code, out, said = line(*words, "--teacher", places["teacher"], "--device", "cpu")
    assert code == 0, said
    found = json.loads(out)
    assert found["student"]["loss"] == pytest.approx(alone["loss"])
    assert found["student"]["kl"] > 0 == pytest.approx(found["teacher"]["kl"])
    # the whole of the text, every window of it
    assert found["student"]["loss_by_window"] == pytest.approx(alone["loss_by_window"])


def test_a_student_of_another_tokenizer_is_refused(line, places, tmp_path, no_weights):
    folder = tmp_path / "student"
    tiny_llama(seed=3).save_pretrained(folder)
    for file in places["teacher"].glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    described = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    words = ("eval", folder, "--data", places["text"], "--tokenizer", places["teacher"])
    code, _, said = line(*words)
    assert code == 2
    assert "2 tokens have other ids" in said
    assert "--tokenizer" in said
