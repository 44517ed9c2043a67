"""Test that each command ends with a next step, which can be run as printed."""

import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparselogits.identity import Identity
from sparselogits.store.cache import read_identity
from sparselogits.store.storage.interface import ReadableFiles
from tests.conftest import tiny_llama
from tests.test_docs_code import assert_command

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def desk(tmp_path, teacher_folder, cache, monkeypatch) -> Path:
    shutil.copytree(cache, tmp_path / "my-cache")
    shutil.copytree(teacher_folder, tmp_path / "my teacher")
    tiny_llama(seed=3).save_pretrained(tmp_path / "my-student")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(desk, line) -> Run:
    def command(*words: str) -> tuple[str, str]:
        code, out, err = line(*words)
        assert code == 0, err
        return out, err

    return command


NEXT = {
    "info my-cache": "train --cache my-cache",
    "verify my-cache": "train --cache my-cache",
    "repair my-cache": "train --cache my-cache",
    "merge my-cache --out whole": "verify whole",
    "card my-cache": "push my-cache hf://datasets/ORG/NAME",
    "plan --teacher-params 8B": "cache --teacher MODEL --data TEXT --out my-cache --budget 12",
    "plan --teacher-params 8B --window 2048": "--out my-cache --budget 12 --window 2048",
    "eval my-student --cache my-cache --limit 2": (
        "eval my-student --cache my-cache --teacher MODEL"
    ),
    "eval my-student --cache my-cache --limit 2 --teacher 'my teacher' --allow other-teacher": (
        "view my-cache --teacher 'my teacher' --student my-student --allow other-teacher"
    ),
    "export my-cache --out plain": 'polars.read_parquet("plain/*.parquet")',
    "view my-cache": "open window-0.html in a browser",
}


@pytest.mark.parametrize("command", NEXT)
def test_a_command_ends_with_the_next_step(command, run):
    out, err = run(*shlex.split(command))
    last = err.strip().splitlines()[-1]
    assert last.startswith("Next: ")
    assert NEXT[command] in last
    assert "Next:" not in out
    if last.startswith("Next: sparselogits"):
        assert_command(shlex.split(last.removeprefix("Next: ")), command)
    assert not re.search(r"(?<![\d.,])1 (shards|windows|entries|rows|files|tokens)\b", out + err)
    assert not re.search(r"\b0(\.0)?( \w+)?/s\b", err)


@pytest.mark.parametrize("command", ["info", "verify", "repair"])
def test_the_next_step_reads_no_identity_again(command, run, monkeypatch):
    reads = []

    def counted(storage: ReadableFiles) -> Identity:
        reads.append(storage)
        return read_identity(storage)

    monkeypatch.setattr("sparselogits.store.cache.read_identity", counted)
    run(command, "my-cache", "--json")
    without = len(reads)
    run(command, "my-cache")
    assert len(reads) == 2 * without > 0


def test_a_cache_without_held_out_windows_needs_another_text(run, desk, short):
    shutil.copy(short, desk / "page.txt")
    data = ["--data", "page.txt"]
    options = shlex.split("--teacher 'my teacher' --out plain --window 32 --rounds 4")
    run("cache", *options, *data)
    train = "train --cache plain --student-config layers=1,width=16 --out my-run"
    _, err = run(*train.split(), "--device", "cpu", "--allow", "long-windows")
    following = "Next: sparselogits eval my-run --cache plain --data TEXT --allow long-windows\n"
    assert err.endswith(following)
    of_text = ["--window", "16", "--no-reset-attention", "--allow", "long-windows"]
    _, err = run("eval", "my-run", "--cache", "plain", "--limit", "2", *data, *of_text)
    again = "eval my-run --data page.txt --cache plain --teacher MODEL"
    assert f"{again} {' '.join(of_text)}\n" in err


@pytest.mark.parametrize("command", ["info my-cache", "eval my-student --cache my-cache --limit 2"])
def test_not_where_a_machine_reads(command, run):
    assert "Next:" not in "".join(run(*shlex.split(command), "--json"))


def test_a_terminal_without_utf_8(run, monkeypatch):
    """As a Windows console or LANG=C has it: what cannot be shown is replaced, nothing fails."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run("eval", "my-student", "--cache", "my-cache", "--limit", "2")
    sys.stdout.flush()
    shown = written.getvalue().decode("ascii")
    assert "| loss " in shown
    assert "?" in shown


def test_eval_prints_a_table_like_that_of_lm_eval(run):
    """Pipes, a row per metric, value and ±, the teacher beside the student."""
    command = "eval my-student --cache my-cache --limit 8 --teacher"
    out, _ = run(*command.split(), "my teacher")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    header, _, *body = rows
    assert sorted(header[2:]) == ["student", "teacher", "±", "±"]
    assert [row[0] for row in body][:3] == ["loss", "perplexity", "KL to the teacher"]
    for row in body:
        assert all(re.fullmatch(r"-?\d+(\.\d+)?|-", cell) for cell in row[2:]), row
    loss = dict(zip(header, body[0], strict=True))
    assert float(loss["student"]) > 4
    assert float(body[0][3]) > 0
