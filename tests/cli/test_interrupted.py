"""Test Ctrl-C during a command: exit code 130, no traceback, and advice on how to continue."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.cli.interruptible import Case
from tests.conftest import run_python, tiny_llama
from tests.pages import ROOT

Interrupt = Callable[[list[str], str], "Ended"]


class Ended(NamedTuple):
    """How a command ended, and all it said."""

    code: int
    said: str


@pytest.fixture(scope="module")
def desk(tmp_path_factory, teacher_folder, cache, short) -> Path:
    """A folder with what the commands take."""
    folder = tmp_path_factory.mktemp("interrupted")
    for name, place in {"MODEL": teacher_folder, "CACHE": cache}.items():
        (folder / name).symlink_to(place)
    (folder / "TEXT").mkdir()
    shutil.copy(short, folder / "TEXT" / "pages.jsonl")
    tiny_llama(seed=3).save_pretrained(folder / "STUDENT")
    recipe = {
        "window": 32,
        "holdout": 0.25,
        "students": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2}},
        "training": {"per_device_train_batch_size": 8},
        "methods": ["ce", {"sampler": "systematic", "budget": 6}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def interrupt(desk) -> Iterator[Interrupt]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.interruptible"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def asked(words: list[str], moment: str) -> Ended:
        said = desk / "said"
        case = Case(words=words, folder=str(desk), moment=moment, said=str(said))
        stdin.write(json.dumps(case) + "\n")
        stdin.flush()
        return Ended(int(stdout.readline()), said.read_text())

    yield asked
    stdin.close()
    assert process.wait(timeout=60) == 0


CACHE = (
    "cache --teacher MODEL --data TEXT --window 32 --windows-per-shard 16 --rounds 8 --out {out}"
)
COMPARE = "compare recipe.yaml --teacher MODEL --data TEXT --out {out}"
TRAIN = "train --cache CACHE --student-config tiny --num-train-epochs 50 --out {out}"
GOES_ON = "the same command continues"
MOMENTS = {
    # command: {moment: what is said of going on}
    CACHE: {
        "sparselogits.teacher.loading:load_teacher:1": GOES_ON,
        "sparselogits.corpus.packer:pack:1": GOES_ON,
        "sparselogits.caching.work:compute_range:1": GOES_ON,
        "sparselogits.caching.work:_finish:100": GOES_ON,
    },
    TRAIN: {
        "sparselogits.train.student:make_student:1": "continues from the last checkpoint",
        "sparselogits.train.trainer:_prepare_inputs:3": "continues from the last checkpoint",
    },
    COMPARE: {
        "sparselogits.lab.compare.caches:prepare:1": GOES_ON,
        "sparselogits.caching.work:compute_range:1": GOES_ON,
        "sparselogits.train.trainer:_prepare_inputs:3": GOES_ON,
    },
    "eval STUDENT --cache CACHE --teacher MODEL --draft 2": {
        "sparselogits.cli.models:load_student:1": "starts again",
        "sparselogits.evaluate.heldout:_measure_window:5": "starts again",
        "sparselogits.evaluate.drafting:_draft_once:3": "starts again",
    },
    "view CACHE --window 3 --teacher MODEL --student STUDENT --out {out}": {
        "sparselogits.cli.models:load_student:1": "starts again",
        "sparselogits.lab.report.view:view_page:1": "starts again",
    },
    "gradients STUDENT --teacher MODEL --data TEXT --window 32 --out {out}": {
        "sparselogits.corpus.packer:pack:1": "starts again"
    },
    "retokenize CACHE --tokenizer MODEL --out {out}": {
        "sparselogits.caching.retokenized:_write_shards:1": GOES_ON
    },
    "demo --out {out}": {"sparselogits.teacher.demo_model:demo_model:1": GOES_ON},
    "verify CACHE": {"sparselogits.store.tools.verify:verify:1": "starts again"},
}


@pytest.mark.parametrize(
    ("command", "moment"), [(command, moment) for command in MOMENTS for moment in MOMENTS[command]]
)
def test_ctrl_c_ends_with_how_to_go_on(command, moment, interrupt, desk, tmp_path):
    ended = interrupt(command.format(out=tmp_path / "out").split(), moment)
    assert ended.code == 130, ended.said
    lines = [line for line in ended.said.splitlines() if "interrupted" in line]
    assert len(lines) == 1, ended.said
    assert MOMENTS[command][moment] in lines[0], ended.said
    assert "Traceback" not in ended.said
    assert "ignored" not in ended.said


WHILE_LOADING = """
import signal, sys

module = sys.argv.pop(1)

def interrupt(event, arguments):
    if event == "import" and arguments[0] == module:
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(interrupt)
from sparselogits.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "torch", "transformers"])
def test_ctrl_c_while_loading(module, tmp_path):
    """At the moment a module is about to be imported, in a process of its own to its very end."""
    words = ["train", "--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    words += ["--student-config", "tiny"]
    done = run_python("-c", WHILE_LOADING, module, *words)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
