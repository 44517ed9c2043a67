"""Measure the size and the error of rounded real-valued weights.

    python benchmarks/rounded_weights.py --out benchmarks/rounded_weights.json

Builds a cache with exact and one with rounded weights for each sampler, from one forward pass per
window of a real teacher. Prints JSON, per sampler:

    exact, rounded      bits per entry: all bytes of the shard except those of the text's tokens
    exact_weight        bits per float32 weight, pages only
    kl                  mean KL divergence of rounded from exact targets, both normalised, nats
    relative_error      largest relative error of a weight
    rest_error          largest error of the mass that is not stored, divided by 1 - largest weight;
                        biased samplers only
    per_octave          bits per weight and mean KL at 16 to 128 levels per octave, pages only
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import material
from measuring import machine
from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import tokenizer_fingerprint
from sparselogits.samplers import Sampler, Systematic, Threshold, TopK, TopP
from sparselogits.store import Cache
from sparselogits.store.codec import levels
from sparselogits.store.codec.columns import encode_column
from sparselogits.targets import SparseTargets

SAMPLERS: dict[str, Sampler] = {
    "top-12": TopK(12),
    "top-50": TopK(50),
    "top-p 0.95, at most 100": TopP(0.95, 100),
    "threshold, tau 0.05": Threshold(0.05),
    "systematic N=21, exponent 0.8": Systematic(21, proposal_exponent=0.8),
}


def read(cache: Cache) -> SparseTargets:
    """Read all targets of a cache."""
    return SparseTargets.cat([cache.read(i).targets for i in range(len(cache))])


def mean_kl(exact: np.ndarray, rounded: np.ndarray, starts: np.ndarray) -> float:
    """Return the mean over positions of KL(exact || rounded), weights normalised."""
    lengths = np.diff(np.append(starts, len(exact)))
    p, q = (w / np.repeat(np.add.reduceat(w, starts), lengths) for w in (exact, rounded))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), 0.0)
    return float(np.add.reduceat(terms, starts).mean())


def at_resolution(per_octave: int, weights: np.ndarray, starts: np.ndarray) -> dict[str, float]:
    """Return the bits per weight and the error at another number of levels per octave."""
    usual = levels.PER_OCTAVE
    levels.PER_OCTAVE = per_octave
    levels.levels.cache_clear()
    made = levels.rounded(weights, None)
    (page,) = encode_column([levels.indices_of(made)]).pages
    levels.PER_OCTAVE = usual
    levels.levels.cache_clear()
    kl = mean_kl(weights.astype(np.float64), made.astype(np.float64), starts)
    return {"bits_per_weight": round(8 * len(page) / len(weights), 2), "kl": float(f"{kl:.2g}")}


def compared(sampler: Sampler, exact: Cache, rounded: Cache) -> dict[str, object]:
    """Return sizes and errors of a cache with rounded weights, compared with exact weights."""
    a, b = read(exact), read(rounded)
    starts = a.offsets.numpy()[:-1][a.entries_per_position.numpy() > 0]
    w, v = (t.weights.numpy().astype(np.float64) for t in (a, b))
    pages = encode_column([w.astype(np.float32)]).pages
    found: dict[str, object] = {
        "entries_per_token": round(exact.statistics().entries_per_position, 2),
        "exact": round(exact.statistics().bits_per_entry, 2),
        "rounded": round(rounded.statistics().bits_per_entry, 2),
        "exact_weight": round(8 * len(pages[0]) / len(w), 2),
        "kl": float(f"{mean_kl(w, v, starts):.2g}"),
        "relative_error": round(float(np.abs(v[w > 0] / w[w > 0] - 1).max()), 5),
        "per_octave": {n: at_resolution(n, a.weights.numpy(), starts) for n in (16, 32, 64, 128)},
    }
    if not sampler.unbiased:
        error = np.abs(np.add.reduceat(v - w, starts))
        room = 1 - np.maximum.reduceat(w, starts)
        kept = room > 2.0**-16
        found["rest_error"] = round(float((error[kept] / room[kept]).max()), 4)
        found["mean_rest"] = round(float(1 - np.add.reduceat(w, starts).mean()), 4)
        found["mean_rest_error"] = float(f"{error.mean():.2g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    teacher, tokenizer = material.teacher(options.teacher, "float32")
    corpus = material.corpus(
        tokenizer, teacher.vocab_size, options.text, options.windows, options.length
    )
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            CacheRequest(f"{folder}/{name}-{exact}", sampler, exact_weights=exact)
            for name, sampler in SAMPLERS.items()
            for exact in (True, False)
        ]
        built = build_caches(
            teacher,
            corpus,
            requests,
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            batch=1,
            windows_per_shard=options.windows,
            only=(0, options.windows),
        ).caches
        pairs = zip(SAMPLERS.items(), built[::2], built[1::2], strict=True)
        methods = {name: compared(sampler, a, b) for (name, sampler), a, b in pairs}
    settings = {"windows": options.windows, "length": options.length, "V": teacher.vocab_size}
    output = json.dumps({"machine": machine(), "settings": settings, "methods": methods}, indent=2)
    if options.out:
        options.out.write_text(output + "\n")
    print(output)


if __name__ == "__main__":
    main()
