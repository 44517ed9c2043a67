"""Write a random part of a text as JSON lines: training and held-out text of a comparison.

    python experiments/compare/documents.py --data FILE [FILE ...] --out PART.jsonl --characters N

Plain text is cut into documents of about 4 000 characters at blank lines; in JSON lines the field
`text` of each line is a document. The output has a random part of the training documents and all
held-out documents, in random order. Whether a document is held out depends only on its content, so
with the hold-out of `small_teacher.py` the teacher has not seen the held-out documents.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from sparselogits.corpus.pieces import document_key

sys.path.insert(0, str(Path(__file__).parent.parent))
from small_teacher import documents


def texts(files: list[Path]) -> Iterator[str]:
    """Yield the documents of text files and JSON lines."""
    for file in files:
        if file.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in file.open(encoding="utf-8"))
        else:
            yield from documents([file])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path, nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--characters", required=True, type=int, help="characters of training text")
    parser.add_argument("--holdout", type=float, default=0.05, help="hold-out of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = list(texts(arguments.data))
    random.Random(arguments.seed).shuffle(found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    training = heldout = 0
    with arguments.out.open("w", encoding="utf-8") as out:
        for text in found:
            if document_key(text.encode()) < int(arguments.holdout * 2**64):
                heldout += len(text)
            elif training < arguments.characters:
                training += len(text)
            else:
                continue
            out.write(json.dumps({"text": text}) + "\n")
    print(f"{training:,} characters to train on, {heldout:,} held out")


if __name__ == "__main__":
    main()
