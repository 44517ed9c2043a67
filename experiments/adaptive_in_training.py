"""Measure the gain of adaptive rounds for the student that guides them, at equal bytes.

    python experiments/adaptive_in_training.py --teacher MODEL --data TEXT --work FOLDER \
        --out RESULT.json

A first student is trained for one pass on systematic targets. It then guides `Adaptive` samplers,
whose nominal rounds are chosen so that a token takes as many bytes as the systematic target of the
same windows. Starting from the first student, a second pass over new text is trained from each
cache, with several seeds of draws and order. The resulting students are compared on held-out text
by loss and KL to the teacher. Finished work under --work is reused, so an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import (
    PackedCorpus,
    open_source,
    pack,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.data import TextDataset
from sparselogits.evaluate import evaluate
from sparselogits.samplers import (
    Adaptive,
    Multinomial,
    NamedSignal,
    Sampler,
    StudentSignal,
    Systematic,
    fit_budget,
)
from sparselogits.samplers.uniforms import window_uniforms
from sparselogits.store import Cache, codec_for
from sparselogits.store.codec import TargetCodec, TargetWindow
from sparselogits.targets import SparseTargets
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.engine import LogitsSlice
from sparselogits.teacher.loading import load_language_model, load_tokenizer
from sparselogits.train import run
from sparselogits.train.recipe import Recipe, Student

ADAPTIVE = {  # name: signal, position power, token power
    "adaptive, rounds by variance": ("variance", 0.5, 0.0),
    "adaptive, rounds by distance": ("distance", 0.5, 0.0),
    "adaptive, tokens by norm": ("variance", 0.0, 1.0),
    "adaptive, rounds and tokens": ("variance", 0.5, 1.0),
}
SHARD = 16
"""Windows per shard."""


@dataclass(frozen=True)
class PilotWindow:
    """Window with the teacher's logits.

    Args:
        index: number of the window.
        tokens: token ids, int64 [L].
        slices: logits of the teacher for consecutive runs of positions.
    """

    index: int
    tokens: Tensor
    slices: list[LogitsSlice]

    def draw(self, sampler: Sampler) -> SparseTargets:
        """Draw the targets of the window, with the uniforms of a cache with seed 0."""
        uniforms = window_uniforms(0, self.index, len(self.tokens), sampler.uniforms_per_position)
        return SparseTargets.cat(
            [
                sampler.at(self.tokens, part.positions)(part.logits, uniforms[part.positions])
                for part in self.slices
            ]
        )


def pilot_windows(
    engine: TransformersTeacher, corpus: PackedCorpus, indices: Sequence[int]
) -> list[PilotWindow]:
    """Run the teacher on some windows."""
    pilot = []
    for index in indices:
        tokens = torch.from_numpy(corpus.read(index, index + 1)[0].tokens.astype(np.int64))
        pilot.append(PilotWindow(index, tokens, list(engine.logits(tokens[None]))))
    return pilot


def bits_per_position(sampler: Sampler, pilot: Sequence[PilotWindow], vocabulary: int) -> float:
    """Return the bits per position of the coded targets of windows, without coding tables."""
    coded = [
        TargetWindow(
            window.draw(sampler),
            window.tokens.numpy().astype(np.int32),
            np.ones(len(window.tokens), np.bool_),
        )
        for window in pilot
    ]
    _, blocks = TargetCodec.from_identity(
        codec_for(sampler, exact_weights=True), vocabulary
    ).encode(coded)
    return 8 * sum(len(block) for block in blocks) / sum(len(w.tokens) for w in pilot)


def of_equal_bytes(
    guide: Path,
    settings: tuple[str, float, float],
    bits: float,
    pilot: Sequence[PilotWindow],
    vocabulary: int,
) -> Adaptive:
    """Return the adaptive sampler with the most rounds that fits in `bits` per position."""
    signal, position_power, token_power = settings
    base = Adaptive(
        StudentSignal.load(NamedSignal(str(guide), signal)),
        position_power=position_power,
        token_power=token_power,
    )
    signals = [
        base.at(window.tokens, part.positions).signals(part.logits)
        for window in pilot
        for part in window.slices
    ]
    reference = float(torch.cat(signals).mean())
    low, high = 1, 64
    while high - low > 1:
        middle = (low + high) // 2
        trial = replace(base, nominal_rounds=middle, reference=reference)
        fits = bits_per_position(trial, pilot, vocabulary) <= bits
        low, high = (middle, high) if fits else (low, middle)
    return replace(base, nominal_rounds=low, reference=reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--budget", type=float, default=12)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--first", type=int, default=128, help="windows of the first pass")
    parser.add_argument("--second", type=int, default=128, help="windows of the second pass")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=24, help="held-out windows")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work

    tokenizer = load_tokenizer(arguments.teacher)
    engine = load_teacher(arguments.teacher, tokenizer=tokenizer, dtype=arguments.dtype)
    corpus = pack(
        open_source(arguments.data),
        tokenizer,
        packing_for(tokenizer, window_length=arguments.window, holdout=0.05),
        work / "corpus",
        vocab_size=engine.vocab_size,
    )
    first, second = arguments.first // SHARD * SHARD, arguments.second // SHARD * SHARD
    common = {
        "tokenizer_hash": tokenizer_fingerprint(tokenizer),
        "batch": 4,
        "windows_per_shard": SHARD,
    }

    def train(cache: Path, out: Path, seed: int, student: Student, rate: float) -> Path:
        recipe = Recipe(
            cache=cache,
            out=out,
            student=student,
            per_device_train_batch_size=4,
            learning_rate=rate,
            seed=seed,
        )
        result = run(recipe, device="cpu")
        print(out.name, round(result.seconds), "s", flush=True)
        return result.model_path

    guide_cache = CacheRequest(work / "first", Systematic(), budget=arguments.budget)
    build_caches(engine, corpus, [guide_cache], only=(0, first), **common)
    shape = Student(hidden_size=arguments.hidden_size, layers=arguments.layers, heads=4)
    guide = train(work / "first", work / "guide", 100, shape, arguments.learning_rate)

    pilot = pilot_windows(engine, corpus, [first + i * second // 4 for i in range(4)])
    logits = [part.logits for window in pilot for part in window.slices]
    systematic = fit_budget(Systematic(), logits, arguments.budget)
    bits = bits_per_position(systematic, pilot, engine.vocab_size)
    samplers: dict[str, Sampler] = {
        "systematic": systematic,
        "independent rounds": fit_budget(Multinomial(), logits, arguments.budget * 0.95),
        "systematic, half the rounds": Systematic(max(1, systematic.rounds // 2)),
    }
    for name, settings in ADAPTIVE.items():
        samplers[name] = of_equal_bytes(guide, settings, bits, pilot, engine.vocab_size)
        print(name, samplers[name].parameters()["nominal_rounds"], flush=True)

    rows = []
    heldout = TextDataset(corpus, limit=arguments.heldout)
    folders = {
        (name, seed): work / f"second-{index}-{seed}"
        for index, name in enumerate(samplers)
        for seed in range(arguments.seeds)
    }
    requests = [
        CacheRequest(folder, samplers[name], seed=1000 + seed)
        for (name, seed), folder in folders.items()
    ]
    build_caches(engine, corpus, requests, only=(first, first + second), **common)
    students = {}
    start = Student(path=str(guide))
    for (name, seed), folder in folders.items():
        out = work / f"run-{folder.name}"
        path = train(folder, out, seed, start, arguments.learning_rate / 2)
        students[f"{name}/{seed}"] = load_language_model(str(path), dtype="float32")
    students["guide"] = load_language_model(str(guide), dtype="float32")
    found = evaluate(students, heldout, engine)
    for (name, seed), folder in folders.items():
        facts = Cache.open(folder).statistics()
        measured = found[f"{name}/{seed}"]
        rows.append(
            {
                "targets": name,
                "seed": seed,
                "parameters": {
                    k: v for k, v in samplers[name].parameters().items() if k != "student"
                },
                "entries": facts.entries_per_position,
                "bits": bits_per_position(samplers[name], pilot, engine.vocab_size),
                "loss": measured.loss,
                "kl": measured.kl,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    data = Path(arguments.data)
    result = {
        "conditions": {
            "teacher": engine.identity["weights"],
            "data": data.name,
            "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else "",
            "options": {
                k: v
                for k, v in vars(arguments).items()
                if k not in ("teacher", "data", "work", "out")
            },
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "teacher": {"loss": found["teacher"].loss},
        "guide": {"loss": found["guide"].loss, "kl": found["guide"].kl},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
