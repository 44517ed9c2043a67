"""A random part of a text, as JSON lines: a comparison's training and held-out text.

    python experiments/compare/documents.py --data FILE [FILE ...] --out PART.jsonl --characters N

Plain text is cut into documents of about 4 000 characters at blank lines; of JSON lines the field
`text` of each is a document. The part is a random one of the documents to train on, with all
that `holdout` keeps aside, in random order. Which are kept aside depends on their content alone, so
with the hold-out of `small_teacher.py` they are the ones that teacher never saw.
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
    for file in files:
        if file.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in file.open(encoding="utf-8"))
        else:
            yield from documents([file])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path, nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--characters", required=True, type=int, help="to train on")
    parser.add_argument("--holdout", type=float, default=0.05, help="the recipe's own")
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
