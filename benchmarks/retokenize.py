"""Measure how many tokens per second of one core `retokenize` rewrites.

    python benchmarks/retokenize.py --out benchmarks/retokenize.json

The cache has SmolLM2's tokenizer (V = 49 152) and the demo's text, and 12 systematic rounds per
position of a teacher that consists of the bigrams of this text: a fifth of the probability is that
of single tokens. The student has a byte-level BPE of 4 096 ids, trained on more of the text. Times
are processor seconds in one thread. What comes before the second window (reading the tokenizers,
choosing the length of windows, rewriting the packed text, mapping the first drawn tokens) is
measured separately. `--profile` prints where the time is spent instead.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from material import SEPARATOR_ID
from measuring import machine, publish, spread
from sparselogits.caching import CacheRequest, build_caches, retokenize
from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.lab.demo.material import demo_text
from sparselogits.samplers import Systematic
from sparselogits.store import Cache
from sparselogits.teacher import ModuleTeacher
from sparselogits.teacher.demo_model import demo_model
from sparselogits.teacher.loading import keep_tokenizer, load_tokenizer

ROUNDS, STUDENT, CHARACTERS = 12, 4096, 400_000
FOLLOWED = (4, 0)


class Tokens(nn.Module):
    """Trunk whose state is the token itself."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens as states of one number."""
        return tokens[..., None]


class Bigrams(nn.Module):
    """Head with the logarithms of a text's bigram frequencies, mixed with those of tokens."""

    def __init__(self, text: Tensor, size: int) -> None:
        super().__init__()
        single = torch.bincount(text, minlength=size) + 1e-4
        self.single = nn.Parameter(single / single.sum(), requires_grad=False)
        order = text[:-1].argsort(stable=True)
        self.following = text[1:][order]
        self.last = torch.bincount(text[:-1], minlength=size).cumsum(0)

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits that follow each state."""
        logits = self.single.mul(0.2).repeat(len(states), 1)
        for row, token in zip(logits, states[:, 0].tolist(), strict=True):
            after = self.following[self.last[token - 1] if token else 0 : self.last[token]]
            row.index_add_(0, after, torch.full((len(after),), 0.8 / max(1, len(after))))
        return logits.log_()


def build(folder: Path, windows: int, length: int) -> tuple[Path, Any]:
    """Build the cache; return its folder and the student's tokenizer."""
    tokenizer = load_tokenizer(str(demo_model()))
    text = demo_text(folder / "text", 4 * windows * length).path
    packing = packing_for(tokenizer, window_length=length, separator_id=SEPARATOR_ID)
    size = len(tokenizer)
    corpus = pack(
        open_source(str(text)), tokenizer, packing, folder / "cache/corpus", vocab_size=size
    )
    tokens = torch.cat([torch.from_numpy(w.tokens).long() for w in corpus.read(0, corpus.windows)])
    teacher = ModuleTeacher(
        Tokens(), Bigrams(tokens, size), token_mask=torch.ones(size, dtype=torch.bool),
        name="bigrams", architecture="table",
    )  # fmt: skip
    build_caches(
        teacher, corpus, [CacheRequest(folder / "cache", Systematic(ROUNDS))],
        tokenizer_hash=tokenizer_fingerprint(tokenizer), windows_per_shard=2,
    )  # fmt: skip
    keep_tokenizer(tokenizer, folder / "cache")
    more = demo_text(folder / "more", CHARACTERS).path
    documents = [json.loads(line)["text"] for line in more.open()]
    student = tokenizer.train_new_from_iterator(documents, STUDENT, show_progress=False)
    return folder / "cache", student


class Rewrite:
    """Rewrite of the cache, timed from window to window.

    Args:
        cache: folder of the cache.
        student: tokenizer of the student.
        followed: see `retokenize`.
    """

    def __init__(self, cache: Path, student: Any, followed: int) -> None:
        begun, done = time.process_time(), list[float]()
        with tempfile.TemporaryDirectory() as out:
            self.report = retokenize(
                cache, student, Path(out) / "made", followed=followed,
                progress=lambda *_: done.append(time.process_time()),
            )  # fmt: skip
        self.start_up = done[0] - begun
        self.seconds_per_window = (time.process_time() - done[0]) / (len(done) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        cache, student = build(Path(scratch), args.windows, args.length)
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(Rewrite, cache, student, FOLLOWED[0])
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
            return
        runs = {n: list[Rewrite]() for n in FOLLOWED}
        for _ in range(args.repeats):
            for followed, own in runs.items():
                own.append(Rewrite(cache, student, followed))
        opened = Cache.open(cache)
        tokens, entries = len(opened) * args.length, opened.entries_per_position()
    last = {f"followed {n}": own[-1].report for n, own in runs.items()}
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "profile")},
        "tokens": tokens,
        "entries_per_position": entries,
        "student_tokens": runs[FOLLOWED[0]][0].report.tokens,
        "share_with_target": {
            name: own.with_target / (own.with_target + own.without_target)
            for name, own in last.items()
        },
        "tokens_per_processor_second": {
            f"followed {n}": spread([args.length / run.seconds_per_window for run in own], 0)
            for n, own in runs.items()
        },
        "processor_seconds_before_the_second_window": spread(
            [run.start_up for own in runs.values() for run in own], 2
        ),
    }
    publish(report, args.out)


if __name__ == "__main__":
    main()
