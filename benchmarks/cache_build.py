"""Compare the time of building a cache with the time of the teacher's forward pass.

    python benchmarks/cache_build.py [--teacher DIR --text FILE] --out benchmarks/cache_build.json

    forward   the teacher's pass over the windows, head included, one slice of logits at a time, as
              in a build; the logits are discarded
    compute   forward, sampling, and the window's metrics (teacher's loss, entropy)
    build     compute, encoding, reading back, writing and fsync: all work of
              `sparselogits cache` for one shard

Runs are interleaved in one process, in random order; ratios compare runs of the same repetition,
as median with 20th and 80th percentile. Without options the teacher is the demo's,
SmolLM2-135M (V = 49 152), and the text is CPython's language reference.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from material import corpus as packed
from material import teacher as loaded
from measuring import interleaved, machine, publish, ratios, spread
from sparselogits.caching import CacheRequest, build_caches
from sparselogits.caching.work import DrawSettings, compute_range
from sparselogits.corpus import PackedCorpus, tokenizer_fingerprint
from sparselogits.samplers import Sampler, Systematic
from sparselogits.teacher import TransformersTeacher


def forward(teacher: TransformersTeacher, corpus: PackedCorpus, windows: int, batch: int) -> None:
    """Run the teacher over windows and discard the logits."""
    rows = corpus.read(0, windows)
    for first in range(0, windows, batch):
        tokens = np.stack([w.tokens for w in rows[first : first + batch]]).astype(np.int64)
        for _ in teacher.logits(torch.from_numpy(tokens)):
            pass


def over_forward(
    teacher: TransformersTeacher,
    corpus: PackedCorpus,
    hashed: str,
    scratch: Path,
    sampler: Sampler,
    *,
    windows: int,
    batch: int,
    repeats: int,
    clock: str,
) -> dict[str, Any]:
    """Measure the forward pass, and the time of sampling and of a whole build relative to it.

    The cache at `scratch / "ready"` is complete afterwards.
    """
    ready, only = scratch / "ready", (0, windows)
    how: dict[str, Any] = {
        "tokenizer_hash": hashed,
        "windows_per_shard": windows,
        "only": only,
        "batch": batch,
    }
    built = 0

    def build() -> None:
        nonlocal built
        built += 1
        root = scratch / str(built)
        root.mkdir()
        for name in ("cache.json", "README.md"):  # the build must not include the pilot pass
            (root / name).write_bytes((ready / name).read_bytes())
        build_caches(teacher, corpus, [CacheRequest(root, sampler)], **how)

    build_caches(teacher, corpus, [CacheRequest(ready, sampler)], **how)
    rows = corpus.read(*only)
    draws = [DrawSettings(sampler, 0, 1.0)]
    seconds = interleaved(
        {
            "forward": lambda: forward(teacher, corpus, windows, batch),
            "compute": lambda: compute_range(
                teacher, rows, draws, reset_attention=False, batch=batch
            ),
            "build": build,
        },
        repeats,
        clock=clock,
    )
    tokens = windows * len(rows[0].tokens)
    return {
        "forward_tokens_per_second": round(tokens / spread(seconds["forward"], 7)["median"]),
        "compute_over_forward": ratios(seconds, "compute", "forward"),
        "build_over_forward": ratios(seconds, "build", "forward"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    teacher, tokenizer = loaded(args.teacher, args.dtype)
    corpus = packed(tokenizer, teacher.vocab_size, args.text, args.windows, args.length)
    sampler = Systematic(args.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        found = over_forward(
            teacher,
            corpus,
            tokenizer_fingerprint(tokenizer),
            Path(scratch),
            sampler,
            windows=args.windows,
            batch=args.batch,
            repeats=args.repeats,
            clock=args.clock,
        )
    report = {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "vocabulary": teacher.vocab_size,
        **found,
    }
    publish(report, args.out)


if __name__ == "__main__":
    main()
