"""A random part of a text, as JSON lines: a comparison's training and held-out text.

    python experiments/compare/documents.py --data FILE [FILE ...] --out PART.jsonl --characters N

Plain text is cut into documents of about 4 000 characters at blank lines; of JSON lines the field
`text` of each is a document. The part is a random one of all documents, in random order, so that
what is trained on and what is kept aside are of the same mixture. Which documents are kept aside
depends on their content alone: those that a teacher made by `small_teacher.py` from the same
documents never saw are held out here too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

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
    parser.add_argument("--characters", required=True, type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = list(texts(arguments.data))
    random.Random(arguments.seed).shuffle(found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with arguments.out.open("w", encoding="utf-8") as out:
        for text in found:
            if written >= arguments.characters:
                break
            out.write(json.dumps({"text": text}) + "\n")
            written += len(text)
    print(f"{written:,} of {sum(map(len, found)):,} characters")


if __name__ == "__main__":
    main()
