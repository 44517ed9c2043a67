"""Score the healed students on zero-shot tasks and as draft models for the teacher.

    python experiments/healing/in_use.py --grid FOLDER/layers24 --out RESULT.json [--methods ...]

The students are those of the grid's first seed, whose weights healing.py stores. Each student is
scored on the local tasks `agreement` and `last_word`, and drafts four tokens at a time for the
teacher from prefixes of held-out windows. Existing rows of RESULT are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparselogits.corpus import PackedCorpus
from sparselogits.data import TextDataset
from sparselogits.evaluate import draft_from_prefixes
from sparselogits.files import write_whole
from sparselogits.lab.compare.results import read_results
from sparselogits.lab.tasks import run_tasks, write_tasks
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer

TASKS = ("agreement", "last_word")
SEPARATOR = 0
DRAFT, WINDOWS, PREFIXES = 4, 16, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--methods", nargs="+", help="methods to score; default: all with stored weights"
    )
    parser.add_argument("--limit", type=int, default=200, help="samples per task")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    tokenizer = load_tokenizer("demo")
    teacher = load_teacher("demo", tokenizer=tokenizer, dtype="bfloat16")
    corpus = PackedCorpus.open(arguments.grid / "corpus")
    models: dict[str, Path | None] = {"teacher": None}
    for run in read_results(arguments.grid).runs:
        folder = arguments.grid / str(run.folder) / "model"
        wanted = arguments.methods is None or run.method in arguments.methods
        if wanted and run.folder and (folder / "config.json").exists():
            models.setdefault(run.method, folder)
    kept: dict[str, Any] = {}
    if arguments.out.exists():
        kept = json.loads(arguments.out.read_text())
    with tempfile.TemporaryDirectory() as data:
        write_tasks(Path(data), TASKS, corpus=corpus, tokenizer=tokenizer, count=arguments.limit)
        for name, folder in models.items():
            if name in kept:
                continue
            path, dtype = ("demo", "bfloat16") if folder is None else (str(folder), "float32")
            model = load_language_model(path, dtype=dtype)
            scores = run_tasks(
                model,
                tokenizer,
                TASKS,
                limit=arguments.limit,
                data=Path(data),
                prefix_token_id=SEPARATOR,
            )
            row: dict[str, Any] = {
                "tasks": {
                    score.name: {
                        "value": score.value,
                        "stderr": score.stderr,
                        "samples": score.samples,
                    }
                    for score in scores
                }
            }
            if folder is not None:
                windows = TextDataset(corpus, limit=WINDOWS)
                row["drafting"] = draft_from_prefixes(
                    model, windows, teacher, draft=DRAFT, prefixes=PREFIXES
                ).to_json()
            kept[name] = row
            write_whole(arguments.out, json.dumps(kept, indent=1) + "\n")
            print(name, row, flush=True)


if __name__ == "__main__":
    main()
