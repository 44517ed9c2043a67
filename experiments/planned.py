"""Judge and collect experiments that were planned before their first run.

`deciding.py` and the scripts in `claims/` use this module. Each of them trains its arms per seed,
writes one `seed-N.json` per seed with the per-window sums of every arm, and defines the rule of its
verdict.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselogits.evaluate import t_interval
from sparselogits.evaluate.intervals import two_sided_p
from sparselogits.files import write_whole
from sparselogits.lab.demo.material import demo_dtype
from sparselogits.locks import Held, lock_file
from sparselogits.samplers import Sampler
from sparselogits.samplers.uniforms import window_uniforms
from sparselogits.store.codec import TargetCodec, TargetWindow, codec_for
from sparselogits.targets import SparseTargets

Means = Mapping[str, Mapping[str, Sequence[float]]]
"""Mean `loss` and `kl` per arm, with one value per seed."""

Judge = Callable[[Means], dict[str, Any]]
"""Function that returns verdict, reason, endpoints and secondary tests from the means."""


PRECISION = demo_dtype()
"""Number format of products: bfloat16, or float32 on a processor that emulates bfloat16."""


def autocast() -> torch.autocast:
    """Return the context in which the products of a student are computed in `PRECISION`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bfloat16")


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return an AdamW optimizer with weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate)


def bytes_per_token(sampler: Sampler, logits: Sequence[Tensor], tokens: Sequence[Tensor]) -> float:
    """Measure the bytes per token of a sampler's coded targets, without a shard's coding tables."""
    codec = TargetCodec.from_identity(codec_for(sampler), logits[0].shape[1])
    stored = []
    for index, own in enumerate(logits):
        uniforms = window_uniforms(0, index, len(own), sampler.uniforms_per_position)
        stored.append(codec.rounded(sampler(own, uniforms), 0, index))
    return coded_bytes(stored, codec, tokens) / sum(len(ids) for ids in tokens)


def coded_bytes(
    stored: Sequence[SparseTargets], codec: TargetCodec, tokens: Iterable[Tensor]
) -> int:
    """Return the bytes of the coded targets of windows, without coding tables.

    A shard shares its tables among hundreds of windows.
    """
    windows = [
        TargetWindow(targets, ids.numpy().astype(np.int32), np.ones(len(ids), np.bool_))
        for targets, ids in zip(stored, tokens, strict=True)
    ]
    _, blocks = codec.encode(windows)
    return sum(len(block) for block in blocks)


def each_seed(work: Path, seeds: int, run: Callable[[int], None]) -> None:
    """Call `run` for every seed that is not finished and not run by another process."""
    for seed in range(seeds):
        with lock_file(work / f"seed-{seed}.lock") as lock:
            if lock.held is Held.ALONE and not (work / f"seed-{seed}.json").exists():
                run(seed)


def less(values: Mapping[str, Sequence[float]], one: str, other: str) -> list[float]:
    """Return the difference of two arms per seed."""
    return [x - y for x, y in zip(values[one], values[other], strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple comparisons (Holm 1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[at]))
        corrected[at] = largest
    return corrected


def secondary(
    values: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Test paired differences, with Holm's correction over all of them; empty for one seed."""
    found = [(f"{one} - {other}", less(values, one, other)) for one, other in pairs]
    if len(found[0][1]) < 2:
        return []
    plain = [two_sided_p(own) for _, own in found]
    return [
        {"difference": title, **t_interval(own).to_json(), "p": p, "p_holm": corrected}
        for (title, own), p, corrected in zip(found, plain, holm(plain), strict=True)
    ]


def collect(
    work: Path, out: Path, size: Any, planned: Any, titles: Sequence[str], judge: Judge
) -> dict[str, Any]:
    """Combine all seeds and write the result, with the verdict once every seed is done.

    Per-window sums go to `OUT_windows.npz`: `loss` and `kl` float32 [arms, seeds, windows], and
    `positions` int32 [windows].

    Args:
        work: folder of the experiment.
        out: file of the result.
        size: sizes of the experiment, a dataclass with `seeds`.
        planned: sizes of the plan.
        titles: names of the arms.
        judge: function that applies the rule of the verdict.
    """
    files = [work / f"seed-{seed}.json" for seed in range(size.seeds)]
    seeds = [json.loads(file.read_text()) for file in files if file.exists()]
    if not seeds:
        raise SystemExit(f"no seed is done in {work}; start the command `run` first")
    if len(formats := {own["precision"] for own in seeds}) > 1:
        raise SystemExit(
            f"seeds in {work} were computed in {' and '.join(sorted(formats))}; run all of them in "
            "one number format"
        )
    positions = np.array(seeds[0]["positions"], np.int32)
    sums = {
        name: np.array([[own[name][title] for own in seeds] for title in titles], np.float32)
        for name in ("loss", "kl")
    }
    means = {
        name: {
            title: [float(f"{x:.6g}") for x in own.sum(1, dtype=np.float64) / positions.sum()]
            for title, own in zip(titles, table, strict=True)
        }
        for name, table in sums.items()
    }
    shared = {
        name: value for name, value in seeds[0].items() if name not in ("positions", "loss", "kl")
    }
    result = {
        "seeds": len(seeds),
        "size": asdict(size),
        "as_planned": size == planned,
        **shared,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **means,
    }
    if len(seeds) == size.seeds:
        result |= judge(means)
    else:
        reason = f"{len(seeds)} of {size.seeds} seeds are done; the rule is applied to all of them."
        result |= {"verdict": "none yet", "reason": reason, "endpoints": {}, "secondary": []}
    write_whole(out, json.dumps(result, indent=1) + "\n")
    np.savez_compressed(
        out.with_name(f"{out.stem}_windows.npz"), positions=positions, arms=list(titles), **sums
    )
    return result
