"""What sampling costs, as a ratio to one softmax over the same logits in the same process.

    python benchmarks/sampling.py [--vocabulary 128256] [--positions 2048] --out sampling.json

Prints JSON. Runs are interleaved (softmax, then each sampler, and again), and the ratio is that of
the fastest runs, so that a busy machine disturbs both sides alike. `marginal_error` is the largest
difference between the block-wise distribution the sampler draws from and a float64 softmax.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from measuring import machine, publish
from sparselogits.samplers import Multinomial, Systematic, Threshold, TopK, window_uniforms
from sparselogits.samplers.distribution import Blocks


def fastest(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def teacher_like(positions: int, vocabulary: int) -> Tensor:
    """Gaussian logits with a peaked head: about 3 nats at V = 128 256."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(positions, vocabulary, generator=generator).mul_(2.5)
    logits[:, :64] += torch.randn(positions, 64, generator=generator).mul_(4).add_(6)
    return logits


def marginal_error(logits: Tensor) -> float:
    blocks = Blocks.of(logits)
    exact = logits.double().softmax(-1)
    exact = torch.nn.functional.pad(exact, (0, -exact.shape[1] % 64)).view(len(logits), -1, 64)
    in_block = exact.sum(-1)
    drift = (blocks.sums / blocks.total / in_block.clamp_min(1e-300) - 1).abs()
    return float((exact.amax(-1) * drift).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logits = teacher_like(arguments.positions, arguments.vocabulary)
    entropy = torch.special.entr(logits[:64].softmax(-1)).sum(-1).mean()
    logits = logits.to(getattr(torch, arguments.dtype))

    samplers = [Systematic(50), Systematic(12), Multinomial(50), Threshold(0.02), TopK(12)]
    runs: dict[str, Callable[[], object]] = {"softmax": lambda: torch.softmax(logits, -1)}
    for sampler in samplers:
        uniforms = window_uniforms(0, 0, len(logits), sampler.uniforms_per_position)
        runs[str(sampler)] = lambda sampler=sampler, uniforms=uniforms: sampler(logits, uniforms)
    seconds = fastest(runs, arguments.repeats)
    report = {
        "machine": machine(),
        "settings": {k: v for k, v in vars(arguments).items() if k != "out"},
        "entropy_nats": float(entropy),
        "softmax_seconds": seconds["softmax"],
        "ratio_to_softmax": {
            name: value / seconds["softmax"] for name, value in seconds.items() if name != "softmax"
        },
        "marginal_error": marginal_error(logits[:64]),
    }
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
