"""Run commands in forked children of a process that has imported all modules, in a second each.

A child runs the whole command, from its arguments to its exit code, with its output in a file.
Teacher, texts and caches are tiny.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import sparselogits.caching
import sparselogits.lab.compare
import sparselogits.lab.report
import sparselogits.train
from tests.conftest import make_tokenizer, tiny_llama
from tests.forks import fork_command, wait_for

SECONDS = 120
CACHE = ("--window", "16", "--rounds", "4", "--windows-per-shard", "4", "--batch", "4")
TRAIN = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "save_steps": 2,
    "student": {"layers": 1, "hidden_size": 16, "heads": 2},
}


@dataclass
class Child:
    """Started command."""

    words: tuple[str, ...]
    pid: int
    log: Path
    code: int | None = None

    def wait(self) -> int:
        """Return the exit code; kill the command after two minutes, and return -9."""
        if self.code is None:
            self.code = wait_for(self.pid, SECONDS)
        return self.code

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


def start(words: tuple[str, ...], log: Path, at: float = 0.0) -> Child:
    """Start a command at a time of the monotonic clock."""
    pid = fork_command(words, log, lambda: time.sleep(max(0.0, at - time.monotonic())))
    return Child(words, pid, log)


def run(words: tuple[str, ...], log: Path) -> Child:
    """Run a command and wait for its end."""
    child = start(words, log)
    child.wait()
    return child


@dataclass(frozen=True)
class Bench:
    """Teacher and three texts, of which the first two have equal lengths."""

    folder: Path
    teacher: Path
    texts: tuple[Path, Path, Path]

    @classmethod
    def make(cls, folder: Path) -> Bench:
        for package in (sparselogits.caching, sparselogits.lab.compare, sparselogits.lab.report):
            assert package
        torch.set_num_threads(1)
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        os.environ["XDG_CACHE_HOME"] = str(folder / "home")
        teacher = folder / "teacher"
        make_tokenizer().save_pretrained(teacher)
        tiny_llama(hidden_size=16, num_hidden_layers=1).save_pretrained(teacher)
        texts = []
        for name in "abc":
            path = folder / f"{name}.txt"
            path.write_text("".join(f"{name} is line {i} of it.\n" for i in range(24)))
            texts.append(path)
        return cls(folder, teacher, (texts[0], texts[1], texts[2]))

    def cache(self, text: int, out: Path, *more: str) -> tuple[str, ...]:
        """Return the arguments of the command that caches a text."""
        data = str(self.texts[text])
        given = ("--teacher", str(self.teacher), "--data", data, "--device", "cpu")
        return ("cache", *given, *CACHE, "--out", str(out), *more)

    def train(self, cache: Path, out: Path, *more: str) -> tuple[str, ...]:
        """Return the arguments of the command that trains a student."""
        recipe = self.folder / "train.yaml"
        recipe.write_text(json.dumps(TRAIN | {"cache": str(cache), "out": str(out)}))
        return ("train", str(recipe), "--device", "cpu", *more)

    def built(self, name: str = "built") -> Path:
        """Return a cache of the first text, which is built once."""
        path = self.folder / name
        if not path.exists():
            child = run(self.cache(0, path), self.folder / "log")
            assert child.code == 0, child.said
        return path

    def copy(self, cache: Path, to: Path) -> Path:
        shutil.copytree(cache, to, symlinks=True)
        return to
