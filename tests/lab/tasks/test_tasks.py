"""Test zero-shot tasks: deterministic data, scores of a plain computation, no output, offline."""

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparselogits.corpus import PackedCorpus
from sparselogits.errors import InvalidArgumentError, MissingDependencyError, TaskError
from sparselogits.lab.tasks import LOCAL_TASKS, TaskScore, check_task, run_tasks, write_tasks
from tests.conftest import documents, tiny_llama

COUNT = 30


@pytest.fixture(scope="module")
def corpus(packed_text) -> PackedCorpus:
    return packed_text(64, holdout=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory, corpus, tokenizer) -> Path:
    folder: Path = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, LOCAL_TASKS, corpus=corpus, tokenizer=tokenizer, count=COUNT)
    return folder


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_data_are_the_same_bytes_again(data, corpus, tokenizer, tmp_path):
    how = {"corpus": corpus, "tokenizer": tokenizer, "count": COUNT}
    again = write_tasks(tmp_path / "again", LOCAL_TASKS, **how)
    other = write_tasks(tmp_path / "other", LOCAL_TASKS, **how, seed=1)
    for name in LOCAL_TASKS:
        file = f"{name}.jsonl"
        assert (tmp_path / "again" / file).read_bytes() == (data / file).read_bytes()
        assert (again[name] == other[name]) == (name == "last_word")  # it draws nothing


def test_passages_are_of_held_out_documents_alone(data, corpus, tokenizer):
    def stream(read: Any, windows: int) -> str:
        ids = np.concatenate([window.tokens for window in read(0, windows)])
        return str(tokenizer.decode(ids.tolist()))

    held_out = stream(corpus.read_holdout, corpus.holdout_windows)
    learnt = stream(corpus.read, corpus.windows)
    pages = documents()
    asked = rows_of(data, "continuation")
    assert len(asked) == COUNT
    for row in asked:
        start = held_out.index(row["prefix"])
        rest = held_out[start + len(row["prefix"]) :].lstrip()
        assert rest.startswith(row["endings"][row["label"]])
        quoted = sum(row["prefix"] in page for page in pages)
        assert quoted  # no separator was crossed
        assert row["prefix"] not in learnt or quoted > 1
        assert len(set(row["endings"])) == 4
        assert all(ending in held_out for ending in row["endings"])
    assert {row["label"] for row in asked} == {0, 1, 2, 3}
    for row in rows_of(data, "last_word"):
        start = held_out.index(row["passage"])
        assert held_out[start + len(row["passage"]) :].lstrip().startswith(row["word"])
        assert row["word"].isalpha()
        assert len(row["word"]) >= 3


def test_pairs_differ_in_one_word_and_favour_no_number(tmp_path):
    write_tasks(tmp_path, ["agreement"], count=600)
    rows = rows_of(tmp_path, "agreement")
    assert len({row["good"] for row in rows}) == len(rows) == 600
    assert not {row["good"] for row in rows} & {row["bad"] for row in rows}
    for phenomenon in ("subject_verb", "subject_verb_attractor", "determiner_noun"):
        own = [row for row in rows if row["phenomenon"] == phenomenon]
        assert len(own) == 200
        words: dict[str, list[str]] = {"good": [], "bad": []}
        for row in own:
            good, bad = row["good"].split(), row["bad"].split()
            (changed,) = ((g, b) for g, b in zip(good, bad, strict=True) if g != b)
            words["good"].append(changed[0])
            words["bad"].append(changed[1])
        plural = {"were", "are", "have", "seem", "look", "remain", "these", "those"}
        for side in words.values():
            assert sum(word in plural for word in side) == 100
    with pytest.raises(TaskError, match="at most 3000"):
        write_tasks(tmp_path, ["agreement"], count=3001)


def log_likelihood(
    model: Any, tokenizer: Any, context: str, more: str, first: int
) -> tuple[float, bool]:
    """Of what follows a context, and whether it is what the model finds likeliest throughout."""
    whole = tokenizer.encode(context + more)
    before = tokenizer.encode(context) if context else []
    ids = whole if context else [first, *whole]
    start = len(before) or 1
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    at = torch.arange(start - 1, len(ids) - 1)
    told = torch.tensor(ids[start:])
    greedy = bool((logs[at].argmax(-1) == told).all())
    return float(logs[at, told].sum()), greedy


def test_scores_are_those_of_a_plain_computation(data, tokenizer, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where git has nothing to tell
    model = tiny_llama(seed=5).train()
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    padding = tokenizer.pad_token_id
    told = []
    found = {
        score.name: score
        for score in run_tasks(
            model,
            tokenizer,
            LOCAL_TASKS,
            data=data,
            prefix_token_id=0,
            progress=lambda *said: told.append(said),
        )
    }
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    per_row = {"continuation": 4, "last_word": 1, "agreement": 2}  # endings, words, sentences
    total = sum(count * len(rows_of(data, name)) for name, count in per_row.items())
    assert told[-1][:2] == (total, total)
    assert model.training
    assert tokenizer.pad_token_id == padding
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])

    model.eval()
    hits: dict[str, list[float]] = {name: [] for name in found}
    for row in rows_of(data, "continuation"):
        logs = [
            log_likelihood(model, tokenizer, row["prefix"], f" {ending}", 0)[0]
            for ending in row["endings"]
        ]
        a_letter = [log / len(ending) for log, ending in zip(logs, row["endings"], strict=True)]
        hits["continuation/acc"].append(np.argmax(logs) == row["label"])
        hits["continuation/acc_norm"].append(np.argmax(a_letter) == row["label"])
    for row in rows_of(data, "last_word"):
        log, greedy = log_likelihood(model, tokenizer, row["passage"], f" {row['word']}", 0)
        hits["last_word/perplexity"].append(log)
        hits["last_word/acc"].append(greedy)
    for row in rows_of(data, "agreement"):
        good, bad = (log_likelihood(model, tokenizer, "", row[s], 0)[0] for s in ("good", "bad"))
        hits["agreement/acc"].append(good > bad)
    assert set(found) == set(hits)
    for name, own in hits.items():
        assert found[name].values == pytest.approx([float(x) for x in own], abs=1e-4), name
        assert found[name].samples == len(own)
    logs = hits["last_word/perplexity"]
    perplexity = found["last_word/perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-statistics.fmean(logs)), rel=1e-4)
    error = perplexity.value * statistics.stdev(logs) / math.sqrt(len(logs))
    assert perplexity.stderr == pytest.approx(error, rel=1e-3)
    share = found["agreement/acc"]
    assert share.value == pytest.approx(statistics.fmean(hits["agreement/acc"]))
    half = math.sqrt(share.value * (1 - share.value) / (share.samples - 1))
    assert share.stderr == pytest.approx(half)


def test_a_limit_takes_the_first(data, tokenizer):
    model = tiny_llama(seed=5)
    how = {"data": data, "prefix_token_id": 0}
    (whole,) = run_tasks(model, tokenizer, ["agreement"], **how)
    (few,) = run_tasks(model, tokenizer, ["agreement"], limit=7, **how)
    assert few.values == whole.values[:7]


def test_a_figure_that_is_no_mean_has_no_error():
    assert TaskScore.of("t", "f1", 0.9, [0.0, 1.0], 2).stderr is None
    assert TaskScore.of("t", "acc", 0.5, [0.0, 1.0], 2).stderr == pytest.approx(0.5)
    assert TaskScore.of("t", "acc", 1.0, [1.0], 1).stderr is None


def test_mistakes_are_named(data, packed_text, tokenizer, tmp_path):
    model = tiny_llama()
    with pytest.raises(InvalidArgumentError, match="found the tasks agreement, agreement; give"):
        run_tasks(model, tokenizer, ["agreement", "agreement"], data=data)
    with pytest.raises(InvalidArgumentError, match="give at least 1"):
        run_tasks(model, tokenizer, ["agreement"], data=data, limit=0)
    with pytest.raises(InvalidArgumentError, match="ids up to 511, but the model has only 300"):
        run_tasks(tiny_llama(vocab_size=300), tokenizer, ["agreement"], data=data)
    with pytest.raises(TaskError, match=r"the file .* does not exist; create it with write_tasks"):
        run_tasks(model, tokenizer, ["agreement"], data=tmp_path)
    with pytest.raises(TaskError, match=r"call write_tasks\(FOLDER"):
        run_tasks(model, tokenizer, ["agreement"])
    with pytest.raises(TaskError, match="give a corpus and its tokenizer"):
        write_tasks(tmp_path, ["last_word"])
    with pytest.raises(TaskError, match="unknown local task 'hellaswag'"):
        write_tasks(tmp_path, ["hellaswag"])
    for count in (0, -1):
        how = {"corpus": packed_text(64, holdout=0.3), "tokenizer": tokenizer, "count": count}
        with pytest.raises(TaskError, match=f"found count={count}; expected at least 1"):
            write_tasks(tmp_path, ["continuation"], **how)
    for said, window, share in (
        ("has no held-out text", 64, 0.0),
        ("words on average.*pack longer windows", 12, 0.3),
    ):
        other = packed_text(window, holdout=share)
        with pytest.raises(TaskError, match=said):
            write_tasks(tmp_path, ["continuation"], corpus=other, tokenizer=tokenizer)


def test_without_lm_eval_it_says_what_to_install(data, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sparselogits\[tasks\]'"):
        run_tasks(tiny_llama(), tokenizer, ["agreement"], data=data)


@pytest.mark.slow
def test_other_names_are_lm_evals_and_need_a_network(tokenizer):
    with pytest.raises(TaskError, match=r"'hellaswag' could not be loaded.*network once"):
        run_tasks(tiny_llama(), tokenizer, ["hellaswag"])
    with pytest.raises(TaskError, match="unknown task 'hellaswagg', did you mean 'hella"):
        check_task("hellaswagg")
    check_task("continuation")


@pytest.mark.slow
def test_local_tasks_reach_for_no_network(data, teacher_folder):
    """Not even where the hub is not said to be offline."""
    script = f"""
import os, pathlib, socket
os.environ["HF_HUB_OFFLINE"] = "0"
asked = []
def refuse(*where, **_):
    asked.append(where)
    raise OSError("no network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from sparselogits.lab.tasks import LOCAL_TASKS, run_tasks
from sparselogits.teacher.loading import load_language_model, load_tokenizer
name = {str(teacher_folder)!r}
found = run_tasks(
    load_language_model(name), load_tokenizer(name), LOCAL_TASKS, data=pathlib.Path({str(data)!r})
)
print(len(found), asked)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "5 []", done.stdout + done.stderr
