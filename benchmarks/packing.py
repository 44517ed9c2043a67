"""Measure tokenising and packing with threads and with processes, and reading packed text.

    python benchmarks/packing.py [--teacher DIR --text FILE] --out benchmarks/packing.json

    threads N     one process whose tokenizer uses N threads
    processes N   N processes with one thread each, as `--processes N`

Every run is a separate process that packs the same text into an empty folder. Its time excludes
loading the tokenizer and includes starting the worker processes. `read again` is the check of a
finished shard by a resumed build: reading its windows and computing their fingerprint, in one
thread. `own thread` is the share of processor time spent in the process's main thread, which more
threads of the tokenizer do not reduce. Other work on the machine changes elapsed time but not
processor time: `--processor` omits elapsed time.

Without options the tokenizer is that of the demo's teacher, and the text is CPython's language
reference, repeated with a different number in each copy.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from measuring import machine, publish, spread
from sparselogits.corpus import PackedCorpus, fingerprint, open_source, pack, packing_for
from sparselogits.lab.demo.material import SEPARATOR_ID
from sparselogits.teacher.demo_model import demo_model
from sparselogits.teacher.loading import load_tokenizer

LENGTH, SHARD = 1024, 512
WAYS = {
    "threads 1": {"threads": 1, "processes": 1},
    "threads 2": {"threads": 2, "processes": 1},
    "processes 2": {"threads": 1, "processes": 2},
}


def write_text(path: Path, size: int) -> None:
    """Write JSON lines of at least `size` bytes from the language reference."""
    with path.open("w", encoding="utf-8") as file:
        for turn in range(1 << 30):
            for name in sorted(topics):
                file.write(json.dumps({"text": f"{turn} {topics[name]}"}) + "\n")
                if file.tell() >= size:
                    return


def packed(teacher: str, text: Path, out: Path, processes: int, part_bytes: int) -> dict[str, Any]:
    """Measure packing in this process, and reading the windows again."""
    tokenizer = load_tokenizer(teacher)
    packing = packing_for(tokenizer, window_length=LENGTH, separator_id=SEPARATOR_ID)
    started, processor, own = time.perf_counter(), time.process_time(), time.thread_time()
    corpus = pack(
        open_source(str(text)), tokenizer, packing, out,
        vocab_size=len(tokenizer), processes=processes, part_bytes=part_bytes,
    )  # fmt: skip
    seconds, own = time.perf_counter() - started, time.thread_time() - own
    processor = time.process_time() - processor
    corpus, started = PackedCorpus.open(out), time.process_time()
    for first in range(0, corpus.windows, SHARD):
        fingerprint(corpus.read(first, min(first + SHARD, corpus.windows)))
    again = time.process_time() - started
    tokens = corpus.windows * LENGTH
    return {
        "tokens": tokens,
        "packing": tokens / seconds,
        "processor": tokens / processor,
        "own thread": own / processor,
        "read again": tokens / again,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor", action="store_true", help="omit elapsed time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        teacher, text, out, processes, part_bytes = args.one
        found = packed(teacher, Path(text), Path(out), int(processes), int(part_bytes))
        print(json.dumps(found))
        return

    teacher = str(args.teacher or demo_model())
    order, runs = random.Random(0), {way: list[dict[str, float]]() for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        text = args.text or Path(scratch) / "text.jsonl"
        if args.text is None:
            write_text(text, args.megabytes << 20)
        part = str(text.stat().st_size // args.parts + 1)
        for repetition in range(args.repeats):
            for way in order.sample(list(WAYS), len(WAYS)):
                out = Path(scratch) / f"{way}-{repetition}"
                how = WAYS[way]
                environment = {**os.environ, "RAYON_NUM_THREADS": str(how["threads"])}
                environment["TOKENIZERS_PARALLELISM"] = "true"
                asked = (teacher, str(text), str(out), str(how["processes"]), part)
                done = subprocess.run(
                    [sys.executable, __file__, "--one", *asked],
                    check=True, capture_output=True, text=True, env=environment,
                )  # fmt: skip
                runs[way].append(json.loads(done.stdout))
        size = text.stat().st_size
    alone = runs["threads 1"]
    in_one_process = [way for way in WAYS if WAYS[way]["processes"] == 1]
    report: dict[str, Any] = {
        "machine": {k: v for k, v in machine().items() if k != "threads"}
        | {"cores": len(os.sched_getaffinity(0))},
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "one")},
        "text_bytes": size,
        "tokens": alone[0]["tokens"],
        "tokens_per_processor_second": {
            way: spread([run["processor"] for run in runs[way]], 0) for way in in_one_process
        },
        "own_thread_share_of_processor_time": {
            way: spread([run["own thread"] for run in runs[way]]) for way in in_one_process
        },
        "read_again_tokens_per_processor_second": spread(
            [run["read again"] for found in runs.values() for run in found], 0
        ),
    }
    if not args.processor:
        report["tokens_per_second"] = {
            way: spread([run["packing"] for run in found], 0) for way, found in runs.items()
        }
        report["over_one_thread"] = {
            way: spread([a["packing"] / b["packing"] for a, b in zip(found, alone, strict=True)])
            for way, found in runs.items()
            if way != "threads 1"
        }
    publish(report, args.out)


if __name__ == "__main__":
    main()
