"""Create windows with targets drawn by numpy, for tests that need records without a teacher."""

from typing import Any

import numpy as np
import torch

from sparselogits.identity import Identity
from sparselogits.objectives import Masked
from sparselogits.store import WindowRecord
from sparselogits.store.codec import TargetCodec
from sparselogits.targets import SparseTargets

LENGTH = 64
KINDS: dict[str, dict[str, Any]] = {
    "counts": {"weights": "counts", "rounds": 21},
    "counts+float32": {"weights": "counts+float32", "rounds": 21},
    "float32": {"weights": "float32"},
    "threshold": {"weights": "threshold", "tau": 0.05},
}
ROUNDED: dict[str, dict[str, Any]] = {
    f"{kind}-rounded": {"version": 2, "rounding": rounding, **KINDS[kind]}
    for kind, rounding in (
        ("counts+float32", "stochastic"),
        ("float32", "nearest"),
        ("threshold", "stochastic"),
    )
}
KINDS |= ROUNDED
MASKED = {f"masked-{kind}": KINDS[kind] for kind in ("counts", "threshold-rounded")}
KINDS |= MASKED
OBJECTIVE = Masked(mask_id=3, rate=None, units="words", seed=5)


def identity(kind: str = "counts", *, vocab_size: int = 1000, **changes: Any) -> Identity:
    settings: dict[str, Any] = {
        "teacher": {"name": "none", "weights": "0" * 64},
        "tokenizer": "1" * 64,
        "vocab_size": vocab_size,
        "token_mask": "all",
        "window_length": LENGTH,
        "windows_per_shard": 20,
        "packing": {"separator": 0},
        "sampler": {"name": kind},
        "seed": 0,
        "temperature": 1.0,
        "codec": {"name": "inverted-lists", "version": 1, **KINDS[kind]},
    }
    if kind in MASKED:
        settings["objective"] = OBJECTIVE.to_json()
    return Identity(**settings | changes)


def distribution(rng: np.random.Generator, positions: int, vocab_size: int) -> np.ndarray:
    """Return float64 [positions, vocab_size] with a few likely ids and a Zipf-like tail."""
    logits = rng.gumbel(size=(positions, vocab_size)) * 1.5 - np.log(np.arange(vocab_size) + 3.0)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def targets(
    kind: str, rng: np.random.Generator, mask: np.ndarray | None, vocab_size: int
) -> SparseTargets:
    kind = KINDS[kind]["weights"]
    p = distribution(rng, LENGTH, 1000)
    tau = KINDS["threshold"]["tau"]
    counts = None
    if kind in ("counts", "counts+float32"):
        counts = rng.multinomial(21, p)
        kept = counts > 0
        weights = (counts.astype(np.float32) / np.float32(21)).astype(np.float32)
        if kind == "counts+float32":
            weights = weights * (p**0.2).astype(np.float32)
    elif kind == "float32":
        kept = p >= np.sort(p, 1)[:, [-8]]
        weights = p.astype(np.float32)
    else:
        kept = (p >= tau) | (rng.random(p.shape) < p / tau)
        weights = np.where(p >= tau, p, tau).astype(np.float32)
    if mask is not None:
        kept &= mask[:, None]
    lengths = kept.sum(1)
    return SparseTargets(
        torch.from_numpy(np.nonzero(kept)[1].astype(np.int64) * (vocab_size // 1000)),
        torch.from_numpy(weights[kept]),
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
        vocab_size,
        counts=None if counts is None else torch.from_numpy(counts[kept].astype(np.int32)),
        rounds=None if counts is None else 21,
    )


def record(kind: str, window: int, *, vocab_size: int = 1000) -> WindowRecord:
    """Return the record of a window, equal for equal arguments; every third window has a mask.

    Weights are already rounded if the codec rounds them, so that a cache returns the same record.
    """
    rng = np.random.default_rng([window, vocab_size])
    mask = rng.random(LENGTH) < 0.7 if window % 3 == 2 or kind in MASKED else None
    codec = TargetCodec.of(identity(kind, vocab_size=vocab_size))
    tokens = rng.integers(0, vocab_size, LENGTH).astype(np.int32)
    starts = np.flatnonzero(rng.random(LENGTH) < 0.05).astype(np.int32)
    drawn = targets(kind, rng, mask, vocab_size)
    corruption: dict[str, Any] = {}
    if kind in MASKED:
        random = rng.integers(0, 1000, LENGTH)
        hidden = np.where(rng.random(LENGTH) < 0.8, OBJECTIVE.mask_id, random)
        inputs = np.where(mask, hidden, tokens).astype(np.int32)
        corruption = {"inputs": inputs, "rate": float(np.float32(0.7))}
        if drawn.entries:  # predict the original token in places, which is coded separately
            owner = drawn.positions.numpy()
            first = np.unique(owner, return_index=True)[1][::2]
            tokens[owner[first]] = drawn.ids.numpy()[first]
    return WindowRecord(
        window,
        tokens,
        starts,
        mask,
        codec.rounded(drawn, 0, window),
        float(np.float32(rng.random())),
        float(np.float32(rng.random())),
        **corruption,
    )


def records(kind: str, start: int, stop: int, *, vocab_size: int = 1000) -> list[WindowRecord]:
    return [record(kind, window, vocab_size=vocab_size) for window in range(start, stop)]
