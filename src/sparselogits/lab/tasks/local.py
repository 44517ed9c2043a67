"""The data of the local tasks: FOLDER/NAME.jsonl, the same bytes for the same text and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparselogits.corpus import PackedCorpus
from sparselogits.errors import TaskError
from sparselogits.files import write_whole
from sparselogits.lab.tasks.pairs import minimal_pairs
from sparselogits.lab.tasks.texts import continuations, last_words, passages

LOCAL_TASKS = ("continuation", "last_word", "agreement")
LIMIT = 200
"""Items of a task, unless another number is asked for: some seconds of one core for a student."""


def write_tasks(
    folder: Path,
    names: Sequence[str],
    *,
    corpus: PackedCorpus | None = None,
    tokenizer: Any = None,
    count: int = LIMIT,
    seed: int = 0,
) -> dict[str, str]:
    """Make the data of local tasks.

    Args:
        folder: where `NAME.jsonl` is written for each.
        names: of `LOCAL_TASKS`.
        corpus: for `continuation` and `last_word`: its held-out windows are asked about.
        tokenizer: that it was packed with, a transformers tokenizer.
        count: items a task, fewer where the held-out text has fewer passages.
        seed: of what is drawn.

    Returns:
        sha256, in hex, of each file by the task's name.

    Raises:
        TaskError: for another name, no corpus, or text that is too short.
    """
    found = {}
    for name in names:
        rows = _rows(name, corpus, tokenizer, count, seed)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder / f"{name}.jsonl", text)
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def read_rows(*, data: str, file: str, **_: Any) -> dict[str, Any]:
    """The rows of a local task, as its YAML file has lm-eval read them.

    Held in memory: what `datasets` does with a path to JSON lines is to copy it, and to tell a
    counter on the network that it did.

    Args:
        data: folder that `write_tasks` filled; comes with the `TaskManager`'s metadata.
        file: in it.

    Raises:
        TaskError: it is not there.
    """
    from datasets import Dataset

    path = Path(data) / file
    if not path.exists():
        raise TaskError(f"there are no data at {path}; write_tasks makes them")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def _rows(
    name: str, corpus: PackedCorpus | None, tokenizer: Any, count: int, seed: int
) -> list[dict[str, Any]]:
    if name == "agreement":
        return [asdict(pair) for pair in minimal_pairs(count, seed=seed)]
    if name not in LOCAL_TASKS:
        raise TaskError(f"there is no local task {name!r}; there are {', '.join(LOCAL_TASKS)}")
    if corpus is None or tokenizer is None:
        raise TaskError(f"the task {name!r} asks about held-out text: give a corpus and tokenizer")
    found = passages(corpus, tokenizer, count)
    return continuations(found, seed=seed) if name == "continuation" else last_words(found)
