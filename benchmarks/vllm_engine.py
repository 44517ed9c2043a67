"""Compare vLLM with transformers as the engine of a teacher: time, logits and targets.

    python benchmarks/vllm_engine.py [--teacher DIR --text FILE] --out benchmarks/vllm_engine.json

Needs an environment with vLLM (docs/teachers.md). Both engines read the same windows in float32 and
apply the same head; the runs are interleaved in one process, in random order. `ratio` is vLLM's
time divided by that of transformers in the same repetition. `moved` is the mean number of rounds
per position, of 50 systematic ones, that drew another id: both engines use the same uniforms, so a
count differs only where rounding moves a boundary. Without options the teacher is the demo's,
SmolLM2-135M, and the text is CPython's language reference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import vllm

from material import corpus as packed
from material import teacher as loaded
from measuring import interleaved, machine, publish, ratios, spread
from sparselogits.samplers import Systematic, window_uniforms
from sparselogits.teacher import Engine, load_vllm_teacher
from sparselogits.teacher.demo_model import demo_model

ROUNDS = 50


def run(engine: Engine, tokens: torch.Tensor, batch: int) -> None:
    """Compute the logits of all windows, and discard them."""
    for first in range(0, len(tokens), batch):
        for _ in engine.logits(tokens[first : first + batch]):
            pass


def compared(one: Engine, other: Engine, tokens: torch.Tensor) -> dict[str, float]:
    """Return the largest difference of log-probabilities, and the rounds that drew another id."""
    sampler, largest, moved, positions = Systematic(ROUNDS), 0.0, 0.0, 0
    for index, window in enumerate(tokens):
        uniforms = window_uniforms(0, index, len(window), 1)
        pieces = zip(one.logits(window[None]), other.logits(window[None]), strict=True)
        for here, there in pieces:
            logs = [piece.logits.log_softmax(1) for piece in (here, there)]
            apart = (logs[0] - logs[1]).nan_to_num(0.0)
            largest = max(largest, float(apart.abs().max()))
            drawn = [sampler(each, uniforms[here.positions]).dense() for each in logs]
            moved += float((drawn[0] - drawn[1]).abs().sum()) / 2 * ROUNDS
            positions += len(logs[0])
    return {"largest_log_probability": largest, "moved": moved / positions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    reference, tokenizer = loaded(options.teacher, "float32")
    text = packed(
        tokenizer, reference.vocab_size, options.text, options.windows, options.window
    ).read(0, options.windows)
    tokens = torch.from_numpy(np.stack([w.tokens for w in text]).astype(np.int64))
    teacher = load_vllm_teacher(
        str(options.teacher or demo_model()),
        tokenizer=tokenizer,
        dtype="float32",
        window_length=options.window,
        enforce_eager=not options.compile,
        disable_log_stats=True,
    )
    seconds = interleaved(
        {
            "vllm": lambda: run(teacher, tokens, options.batch),
            "transformers": lambda: run(reference, tokens, options.batch),
        },
        options.repeats,
    )
    publish(
        {
            "machine": machine() | {"vllm": vllm.__version__},
            "teacher": reference.identity["name"],
            "dtype": "float32",
            "windows": options.windows,
            "window": options.window,
            "batch": options.batch,
            "compiled": options.compile,
            "tokens_per_second": {
                name: spread([tokens.numel() / each for each in taken], 1)
                for name, taken in seconds.items()
            },
            "ratio": ratios(seconds, "vllm", "transformers"),
            "difference": compared(teacher, reference, tokens),
        },
        options.out,
    )


if __name__ == "__main__":
    main()
