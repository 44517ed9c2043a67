"""Test `sparselogits gradients`. Run with `pytest tests/cli/test_gradients.py`."""

import json
from pathlib import Path

import pytest

from sparselogits.corpus import open_source, pack, packing_for
from tests.cli.test_commands import command
from tests.conftest import tiny_llama, write_lines
from tests.masked_models import VOCABULARY, bert_tokenizer, tiny_bert, write_short_texts


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    tiny_llama(seed=4).save_pretrained(folder / "model")  # a run, as `train` leaves it
    return folder


@pytest.fixture(scope="module")
def masked_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    bert_tokenizer().save_pretrained(folder)
    return folder


def test_a_table_and_its_results(student, teacher_folder, text, tmp_path):
    out = tmp_path / "results.json"
    run = command(
        *("gradients", student, "--teacher", teacher_folder, "--data", text, "--window", 32),
        *("--batch", 32, "--batch", 64, "--batches", 2, "--draws", 2, "--budget", 4),
        *("--top-k", 4, "--missing-mass", "drop", "--missing-mass", "ghost"),
        *("--adaptive", student / "model", "--fresh", "--out", out),
    )
    assert run.returncode == 0, run.stderr
    assert "fresh: all parameters, 2 batches of 64 tokens" in run.stdout
    assert "small: hidden, 2 batches of 64 tokens" in run.stdout
    found = json.loads(out.read_text())
    assert found["conditions"]["tokens"] == 128
    assert len(found["conditions"]["text_sha256"]) == 64
    assert found["conditions"]["students"]["small"]["parameters"] > 0
    names = ["Top-4", "Top-4, ghost", "RS-KD", "systematic", "threshold", "uniform", "adaptive"]
    rows = {
        (row["student"], row["target"], row["space"], row["batch_tokens"]) for row in found["rows"]
    }
    assert len(rows) == len(found["rows"]) == 2 * 8 * 5 * 2
    assert {target for _, target, _, _ in rows} == {*names, "label (CE)"}


def test_rows_of_token_ids_give_the_results_of_their_text(
    student, teacher_folder, tokenizer, text, line, tmp_path
):
    """The rows are the windows of the text; short rows are padded, and padding counts nowhere."""
    packing = packing_for(tokenizer, window_length=32)
    corpus = pack(open_source(text), tokenizer, packing, tmp_path / "c", vocab_size=520)
    windows = [window.tokens.tolist() for window in corpus.read(0, 4)]
    rows = write_lines(tmp_path / "rows.jsonl", ({"input_ids": ids} for ids in windows))
    given = ("gradients", student, "--teacher", teacher_folder, "--window", 32, "--batch", 64)
    given = (*given, "--draws", 2, "--budget", 4, "--top-k", 4, "--json", "--device", "cpu")
    of_text = json.loads(line(*given, "--data", text).out)
    given = (*given, "--tokenized-by", teacher_folder)
    assert json.loads(line(*given, "--data", rows).out)["rows"] == of_text["rows"]
    joined = write_lines(tmp_path / "j.jsonl", [{"input_ids": [i for w in windows for i in w]}])
    refused = line(*given, "--data", joined)
    assert refused.code != 0
    assert "more than a window of 32" in refused.err
    whole = json.loads(line(*given, "--data", joined, "--join-rows").out)
    assert whole["rows"] == of_text["rows"]
    lengths = ({"input_ids": ids[:20], "seq_lengths": [8, 12]} for ids in windows)
    short = json.loads(line(*given, "--data", write_lines(tmp_path / "s.jsonl", lengths)).out)
    top = [row["entries"] for row in short["rows"] if row["target"] == "Top-4"]
    assert set(top) == {4.0}  # of the positions with a label


def test_token_ids_of_another_tokenizer_are_refused(
    student, teacher_folder, masked_tokenizer, line, tmp_path
):
    rows = write_lines(tmp_path / "rows.jsonl", [{"input_ids": [1] * 32}] * 8)
    done = line(
        *("gradients", student, "--teacher", teacher_folder, "--window", 32, "--data", rows),
        *("--tokenized-by", masked_tokenizer),
    )
    assert done.code != 0
    assert "tokenizer" in done.err
    done = line("gradients", student, "--teacher", teacher_folder, "--data", rows)
    assert "--tokenized-by" in done.err


def test_masked_models_are_compared_on_corrupted_text(text, line, tmp_path):
    models = [tmp_path / "teacher", tmp_path / "student"]
    for seed, folder in enumerate(models):
        tiny_bert(seed, vocab_size=VOCABULARY).save_pretrained(folder)
        bert_tokenizer().save_pretrained(folder)
    short = write_short_texts(text, tmp_path / "short.jsonl")
    out = tmp_path / "results.json"
    options = ["--window", 32, "--batch", 64, "--draws", 2, "--budget", 4, "--top-k", 4]
    given = ["gradients", models[1], "--teacher", models[0], "--data", short, *options]
    masks = ["--mask-rate", 0.4, "--mask-units", "words"]
    done = line(*given, *masks, "--fresh", "--adaptive", models[1], "--out", out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    objective = found["conditions"]["objective"]
    assert (objective["rate"], objective["units"]) == (0.4, "words")
    students = found["conditions"]["students"]
    assert {own["architecture"] for own in students.values()} == {"BertForMaskedLM"}
    assert {row["target"] for row in found["rows"]} >= {"RS-KD", "adaptive", "label (CE)"}


@pytest.mark.parametrize("option", [("--mask-rate", "random"), ("--mask-units", "words")])
def test_masking_is_refused_for_a_causal_teacher(student, teacher_folder, text, line, option):
    done = line("gradients", student, "--teacher", teacher_folder, "--data", text, *option)
    assert done.code != 0
    assert f"{option[0]} is for a masked language model" in done.err
