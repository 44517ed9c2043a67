"""Measure the share of the teacher's forward pass in a build's elapsed time (target: 95 %).

    python benchmarks/forward_share.py [--teacher DIR --text FILE] --out forward_share.json

The elapsed time is that of a whole build of several shards, from reading windows to the last fsync.
`forward` is the time in which the engine computes logits, head included. During the rest the device
does not run the teacher: `sampling` is the time in the samplers and the window's metrics, `rest` is
reading windows, waiting until the previous shard is written, and all other work in the build's main
thread. Encoding and writing run in another thread and count only if they delay the build.
The cache's budget and identity exist already, as in any resumed build.

Each precision and thread count runs once per repetition, in random order. Without options the
teacher is the demo's, SmolLM2-135M (V = 49 152), and the text is CPython's language reference.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from material import corpus as packed
from material import teacher as loaded
from measuring import machine, publish, spread
from sparselogits.caching import CacheRequest, begin_job, build_caches
from sparselogits.corpus import PackedCorpus, tokenizer_fingerprint
from sparselogits.samplers import Systematic
from sparselogits.teacher import LogitsSlice, TransformersTeacher


class Watched:
    """Teacher that measures the seconds of its forward pass and of the consumer of its logits."""

    def __init__(self, teacher: TransformersTeacher) -> None:
        self._teacher = teacher
        self.vocab_size, self.token_mask = teacher.vocab_size, teacher.token_mask
        self.identity, self.device = teacher.identity, teacher.device
        self.forward = self.sampling = 0.0

    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        """Yield the logits of the wrapped teacher, as `Engine.logits`."""
        slices = self._teacher.logits(tokens, document_starts)
        asked = time.perf_counter()
        for piece in slices:
            given = time.perf_counter()
            self.forward += given - asked
            yield piece
            asked = time.perf_counter()
            self.sampling += asked - given
        self.forward += time.perf_counter() - asked


def build(
    engine: Watched, corpus: PackedCorpus, request: CacheRequest, **how: Any
) -> dict[str, float]:
    """Build a cache and return the seconds of each part."""
    engine.forward = engine.sampling = 0.0
    started = time.perf_counter()
    build_caches(engine, corpus, [request], **how)
    wall = time.perf_counter() - started
    rest = wall - engine.forward - engine.sampling
    return {"wall": wall, "forward": engine.forward, "sampling": engine.sampling, "rest": rest}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--windows-per-shard", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    teachers = {}
    for dtype in args.dtypes:
        teacher, tokenizer = loaded(args.teacher, dtype)
        teachers[dtype] = Watched(teacher)
    vocabulary = next(iter(teachers.values())).vocab_size
    corpus = packed(tokenizer, vocabulary, args.text, args.windows, args.length)
    cells = list(itertools.product(args.dtypes, args.threads))
    found: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    order, sampler = random.Random(0), Systematic(args.rounds)
    how: dict[str, Any] = {
        "tokenizer_hash": tokenizer_fingerprint(tokenizer),
        "batch": args.batch,
        "windows_per_shard": args.windows_per_shard,
    }
    only = (0, args.windows)
    with tempfile.TemporaryDirectory() as scratch:
        for repetition in range(1 + args.repeats):  # the first warms up
            for dtype, threads in order.sample(cells, len(cells)):
                torch.set_num_threads(threads)
                root = Path(scratch) / f"{dtype}-{threads}-{repetition}"
                request = CacheRequest(root, sampler)
                begin_job(teachers[dtype], corpus, [request], **how)
                seconds = build(teachers[dtype], corpus, request, only=only, **how)
                if repetition:
                    found[dtype, threads].append(seconds)
    tokens = args.windows * args.length
    report = {
        "machine": {k: v for k, v in machine().items() if k != "threads"},
        "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "vocabulary": vocabulary,
        "results": [
            {
                "dtype": dtype,
                "threads": threads,
                "tokens_per_second": round(tokens / spread([r["wall"] for r in runs])["median"]),
                **{
                    f"{part}_share": spread([r[part] / r["wall"] for r in runs])
                    for part in ("forward", "sampling", "rest")
                },
            }
            for (dtype, threads), runs in found.items()
        ],
    }
    publish(report, args.out)


if __name__ == "__main__":
    main()
