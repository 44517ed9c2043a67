"""Test common user errors: one message with the cause and the next step, no traceback."""

import gzip
import os
import shutil
from pathlib import Path

import pytest

from sparselogits.console import messages, stage
from tests.conftest import tiny_llama
from tests.masked_models import VOCABULARY, bert_tokenizer

CACHE = "cache --teacher {teacher} --data {text} --out {new} --window 32"
TRAIN = "train --cache {cache} --out {new} --student-config tiny"
GIVEN = "cache --teacher {teacher} --out {new} --data "
MISTAKES = {
    # command: the cause, the next step
    "info /nowhere": ("no cache at /nowhere", "check the path"),
    "info {teacher}": ("it has no cache.json", "sparselogits cache"),
    "info {newer}": ("format version 9", "install the version"),
    "info {torn}": ("cache.json is damaged", "restore it from a copy"),
    "info s3:/bucket/x": ("malformed url", "s3://bucket/prefix"),
    "info s3://": ("malformed url", "s3://bucket/prefix"),
    "info nowhere9://x/y": ("no installed fsspec driver opens", "protocol not known"),
    "train /nowhere.yaml": ("/nowhere.yaml cannot be read", "check the path"),
    "train --cache {cache} --out {new}": ("specify the student to train", "--student-config 30m"),
    "train --cache {cache} --out {new} --student a --student-config tiny": (
        "--student trains an existing model",
        "give one of them",
    ),
    "train --cache {cache} --out {new} --lora 4": ("--lora", "name the model with --student"),
    "train --cache {cache} --out {new} --student-config nope": ("is neither a size", "layers=12"),
    TRAIN + " --epochs 3": ("no such option: --epochs", "--num-train-epochs"),
    "train {recipe:cach: x}": ("cach: unknown key", "did you mean 'cache'"),
    "train --cache /nowhere --out {new} --student-config tiny": ("no cache at /nowhere", "check"),
    "train --cache {cache} --out {text} --student-config tiny": ("pages.jsonl is a file", "choose"),
    TRAIN + " --method full": ("runs the teacher online", "give the cache's teacher"),
    TRAIN + " --method gkd": ("unknown method 'gkd'", "available: sparse, ce"),
    TRAIN + " --device tpu": ("the device tpu", "choose auto or cpu (--device)"),
    TRAIN + " --device cuda:1": ("uses all visible gpus", "cuda_visible_devices=1"),
    "train {recipe:cache: {cache}\nout: {new}\nstudent: {{path: {small}}}}": (
        "400 ids",
        "give the student at least as many",
    ),
    "train {recipe:cache: {cache}\nout: {new}\nstudent: {{layers: 1}}\n"
    "per_device_train_batch_size: 9999}": (
        "fewer than one batch",
        "use a smaller batch (--per-device-train-batch-size",
    ),
    "train {recipe:cache: {cache}\nout: {new}\nstudent: {{size: 3m}}\nreport_to: [tensorbord]}": (
        "tensorbord is not supported",
        "only",
    ),
    CACHE + " --budget 0.1": ("at least 1", "--budget"),
    CACHE + " --budget nan": ("at least 1", "--budget"),
    CACHE + " --budget inf": ("finite", "--budget"),
    CACHE + " --budget 5 --rounds 5": ("--budget or --rounds", "not both"),
    CACHE + " --sampler topk --rounds 5": ("topk takes", "--k or --budget"),
    CACHE + " --sampler threshold --tau 0.1 --budget 5": ("--tau", "not both"),
    CACHE + " --sampler topp --budget 5": ("topp takes", "--p and --max-entries"),
    CACHE + " --sampler gumbel": ("gumbel", "'systematic'"),
    CACHE + " --executor ray --device cpu:0": ("--device is cpu:0", "give cuda or cpu"),
    CACHE + " --windows x": ("--windows is 'x'", "give a:b"),
    CACHE + "000000": ("window", "use more text or a shorter window"),
    CACHE + " --rounds 0": ("rounds is 0", "at least 1, at most 1,048,576"),
    CACHE + " --sampler topk --k 0": ("k is 0", "of at least 1"),
    CACHE + " --temperature 0": ("the temperature is 0", "from 1e-06 to 1e+06 (--temperature)"),
    CACHE + " --batch 0": ("--batch", "greater than or equal to 1"),
    CACHE + " --threads 0": ("--threads", "greater than or equal to 1"),
    CACHE + " --executor ray --workers 0": ("--workers", "greater than or equal to 1"),
    CACHE + " --executor ray --gpus -1": ("--gpus", "greater than or equal to 0"),
    CACHE + " --windows-per-shard 0": ("--windows-per-shard", "greater than or equal to 1"),
    CACHE + " --window 0": ("window_length is 0", "of at least 2"),
    CACHE + " --holdout 1.5": ("is 1.5", "from 0 to below 1"),
    CACHE + " --dtype int4": ("unknown dtype 'int4'", "available: auto"),
    CACHE + " --device tpu": ("the device tpu", "choose auto or cpu (--device)"),
    CACHE + " --text-field body": ("has no field `body`", "--text-field"),
    "cache --teacher {text} --data {text} --out {new}": ("a file that is not a gguf", "hub name"),
    "cache --teacher ./no --data {text} --out {new}": ("no model folder", "check the path"),
    "cache --teacher {small} --data {text} --out {new}": ("no tokenizer", "give a folder"),
    GIVEN + "http://x/y.txt": ("is a url", "download the files"),
    GIVEN + "/nowhere.txt": ("/nowhere.txt does not exist", "check the path"),
    GIVEN + "{bytes}": ("bytes.txt", "utf-8"),
    GIVEN + "{void}": ("empty", "give other text"),
    GIVEN + "{blank}": ("contains no text", "give other text"),
    GIVEN + "{packed}": ("it contains 1 .gz", "decompress the files first"),
    "cache --teacher {teacher} --data {text} --out /proc/x --window 32": (
        "cannot write /proc/x",
        "check",
    ),
    "cache --teacher {teacher} --data {text} --out gs://bucket/x": ("gcsfs", "install"),
    "eval nope --cache {cache}": ("there is no folder 'nope'", "check the path"),
    "eval {cache} --cache {cache}": ("contains no model", "give the folder"),
    "cache --teacher nope --data {text} --out {new}": ("there is no folder 'nope'", "a hub name"),
    "cache --teacher no/model --data {text} --out {new}": (
        "there is no folder 'no/model'",
        "check the path",
    ),
    "eval /no/student --cache {cache}": ("no model folder", "check the path"),
    "shrink {other} --layers 1 --cache {cache} --out {new}": (
        "the tokenizer of the model",
        "use the tokenizer of the cache",
    ),
    "shrink {teacher} --drop-layers 1 --data {text} --window 64 --out {new}": (
        "--data and --window cannot be used with --drop-layers",
        "leave it out",
    ),
    "shrink {teacher} --drop-layers 1 --layer-score loss --out {new}": (
        "--layer-score selects the blocks",
        "give --layers",
    ),
    "eval {teacher} --cache {cache} --draft 3": ("--draft needs --teacher", "verifies"),
    "eval {teacher} --cache {cache} --limit 0": ("--limit", "greater than or equal to 1"),
    "export {cache} --out {teacher}": ("is not empty", "new or empty folder"),
    "export {cache} --out {new} --format csv": ("'csv'", "choose one of lists"),
    "merge {cache} /nowhere --out {new}": ("no cache at /nowhere", "check the path"),
    "trian": ("no such command 'trian'", "did you mean 'train'"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, teacher_folder, text, cache) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mistakes")
    for name, before, after in (
        ("newer", '"format_version":1', '"format_version":9'),
        ("torn", "{", ""),
    ):
        shutil.copytree(cache, root / name)
        file = root / name / "cache.json"
        file.write_text(file.read_text().replace(before, after, 1))
    tiny_llama(vocab_size=400).save_pretrained(root / "small")
    tiny_llama(vocab_size=VOCABULARY).save_pretrained(root / "other")
    bert_tokenizer().save_pretrained(root / "other")
    (root / "packed").mkdir()
    (root / "packed" / "notes.txt.gz").write_bytes(gzip.compress(b"some text"))
    (root / "void.txt").write_text("")
    (root / "blank.txt").write_text(" \n\n ")
    (root / "bytes.txt").write_bytes(b"\xff\xfe\x00\x80" * 50)
    return {
        **{name: root / name for name in ("newer", "torn", "small", "other", "packed")},
        **{name: root / f"{name}.txt" for name in ("void", "blank", "bytes")},
        **{"teacher": teacher_folder, "text": text, "cache": cache},
    }


def words(pattern: str, places: dict[str, Path], folder: Path) -> list[str]:
    command, _, recipe = pattern.partition(" {recipe:")
    for name, path in {**places, "new": folder / "new"}.items():
        command, recipe = (s.replace(f"{{{name}}}", str(path)) for s in (command, recipe))
    if not recipe:
        return command.split()
    file = folder / "recipe.yaml"
    file.write_text(recipe[:-1].replace("{{", "{").replace("}}", "}"))
    return [*command.split(), str(file)]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.replace("\n", ", "))
def test_a_mistake_is_told_with_its_next_step(mistake, line, places, tmp_path):
    code, _, said = line(*words(mistake, places, tmp_path))
    assert code == 2, said
    cause, step = MISTAKES[mistake]
    assert cause in said.lower(), said
    assert step in said.lower(), said
    assert "Traceback" not in said
    assert not any(c in said for c in "\r\x1b"), "control characters where there is no terminal"


def test_a_folder_without_permission(line, places, tmp_path):
    """Root may write everywhere, so the mount's own refusal stands in: /proc takes no folder."""
    code, _, said = line(
        *("train", "--student-config", "tiny", "--cache", places["cache"], "--out", "/proc/run")
    )
    assert (code, "/proc/run" in said) == (2, True)
    assert "Check the path" in said


@pytest.mark.parametrize("where", ["first", "last"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(line, where):
    given = ["--debug", "info", "/nowhere"] if where == "first" else ["info", "/nowhere", "--debug"]
    code, _, said = line(*given)
    assert code == 2
    assert "Traceback" in said
    assert "error: there is no cache at /nowhere" in said


def test_a_pipe_gets_lines_without_control_characters(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI services set it
    monkeypatch.setattr("sparselogits.console.LOG_SECONDS", 0.0)
    with stage("reading", "pages") as update:
        for done in range(3):
            update(done + 1, 3)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "\x1b" not in said
    assert said.splitlines()[-1].startswith("reading: 3/3 pages")
    assert len(said.splitlines()) == 4


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb") as screen:
        monkeypatch.setattr(messages, "_file", terminal)
        with stage("reading", "pages") as update:
            update(3, 3)
        terminal.flush()
        shown = ""
        while "reading" not in shown:  # a terminal hands over what it has, in pieces
            shown += os.read(screen.fileno(), 1 << 16).decode()
    assert "reading" in shown
    assert "\x1b" in shown


def test_a_notebook_gets_one_line_written_over(capsys, monkeypatch):
    """Seen in an executed notebook as well; a front end shows what follows the last return."""
    monkeypatch.setattr(messages, "is_jupyter", True)
    monkeypatch.setattr("sparselogits.console.NOTEBOOK_SECONDS", 0.0)
    with stage("reading", "pages") as update:
        update(2, 3, "a note that makes the line longer")
        update(3, 3)
    said = capsys.readouterr().err
    first, *written, last = said.split("\r")
    assert first == ""
    assert len(written) == 2
    assert last.startswith("reading: 3/3 pages")
    assert last.endswith("\n")
    assert len(last.rstrip("\n")) >= max(map(len, written)), "a rest of the longer line is seen"


def test_a_dumb_terminal_gets_lines(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with stage("reading", "pages") as update:
        update(3, 3)
    assert capsys.readouterr().err.startswith("reading: 3/3 pages")
