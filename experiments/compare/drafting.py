"""Measure drafting with students of a finished comparison, from more prefixes.

A comparison drafts from few prefixes, and all students of a seed share these prefixes and their
random numbers. With more of both, this tests whether the accepted share differs from the expected
one. Rows are appended to those of OUT.

python experiments/compare/drafting.py --comparison FOLDER --teacher TEACHER --seed 1 \
    --out experiments/results/drafting_small_teacher.json systematic-12 uniform-12
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sparselogits.corpus import PackedCorpus
from sparselogits.data import TextDataset
from sparselogits.evaluate import draft_from_prefixes
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comparison", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--prefixes", type=int, default=16)
    parser.add_argument("--draft", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("methods", nargs="+", help="prefixes of folder names under runs/")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    tokenizer = load_tokenizer(given.teacher)
    teacher = load_teacher(given.teacher, tokenizer=tokenizer, dtype="float32")
    corpus = PackedCorpus.open(given.comparison / "corpus")
    windows = TextDataset(corpus, limit=given.windows)
    rows = json.loads(given.out.read_text()) if given.out.exists() else []
    for method in given.methods:
        (run,) = sorted((given.comparison / "runs").glob(f"{method}--*--0--*"))
        student = load_language_model(str(run / "model"), dtype="float32")
        found = draft_from_prefixes(
            student,
            windows,
            teacher,
            draft=given.draft,
            prefixes=given.prefixes,
            seed=given.seed,
        )
        settings = {"windows": given.windows, "prefixes": given.prefixes, "seed": given.seed}
        away = (found.acceptance - found.expected) / found.error
        rows.append({"method": method, **settings, **found.to_json(), "standard_errors": away})
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
