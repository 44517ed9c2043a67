"""Write the data of local tasks to FOLDER/NAME.jsonl, and read these files for lm-eval."""

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
"""Names of the tasks that need no download."""
LIMIT = 200
"""Default largest number of items per task."""


def write_tasks(
    folder: Path,
    names: Sequence[str],
    *,
    corpus: PackedCorpus | None = None,
    tokenizer: Any = None,
    count: int = LIMIT,
    seed: int = 0,
) -> dict[str, str]:
    """Write the data of local tasks; equal arguments give equal bytes.

    Args:
        folder: folder in which `NAME.jsonl` is written for each task.
        names: names from `LOCAL_TASKS`.
        corpus: corpus with the held-out windows from which `continuation` and `last_word` are made;
            not needed for `agreement`.
        tokenizer: transformers tokenizer that the corpus was packed with.
        count: number of items of `agreement`, and largest number of items of the other tasks, which
            have fewer if the held-out text has fewer suitable passages.
        seed: random seed.

    Returns:
        SHA-256 of each file as hexadecimal text, by the task's name.

    Raises:
        TaskError: If a name is unknown, a task lacks corpus or tokenizer, the corpus has too little
            suitable held-out text, or `count` is out of range.
        StorageError: If a file cannot be written.
    """
    found = {}
    for name in names:
        rows = _rows(name, corpus, tokenizer, count, seed)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder / f"{name}.jsonl", text)
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def read_rows(*, data: str, file: str, **_: Any) -> dict[str, Any]:
    """Read the rows of a local task; lm-eval calls this function, which a YAML file names.

    The rows are read into memory, because `datasets` would copy the file and count its use online.

    Args:
        data: folder that `write_tasks` filled.
        file: name of the file in the folder.

    Returns:
        A `datasets.Dataset` of the rows, by the name of the split, "test".

    Raises:
        TaskError: If the file does not exist.
    """
    from datasets import Dataset

    path = Path(data) / file
    if not path.exists():
        raise TaskError(f"the file {path} does not exist; create it with write_tasks")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def _rows(
    name: str, corpus: PackedCorpus | None, tokenizer: Any, count: int, seed: int
) -> list[dict[str, Any]]:
    if name == "agreement":
        return [asdict(pair) for pair in minimal_pairs(count, seed=seed)]
    if name not in LOCAL_TASKS:
        raise TaskError(f"unknown local task {name!r}; available: {', '.join(LOCAL_TASKS)}")
    if corpus is None or tokenizer is None:
        raise TaskError(
            f"the task {name!r} is made from held-out text: give a corpus and its tokenizer"
        )
    found = passages(corpus, tokenizer, count)
    return continuations(found, seed=seed) if name == "continuation" else last_words(found)
