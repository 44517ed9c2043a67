"""Measure the cost of sampling relative to one softmax over the same logits.

    python benchmarks/sampling.py [--vocabulary 128256] [--positions 1024] --out sampling.json

Prints JSON for three conditions, each in a separate process:

- "warm": the allocator keeps its pages (glibc's MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_), and
  softmax writes into a buffer given by `out=`. This compares the computations.
- "warm_without_compiler": the same with CC=false, so that PyTorch sums the blocks.
- "default": the system's allocator. glibc maps every large tensor anew, and the first access to its
  pages costs more than a softmax; softmax's result is such a tensor, the samplers' are small. A
  ratio below one here means that sampling allocates little, not that it computes little.

Runs are interleaved, and a ratio compares runs of the same repetition, as median with the 20th and
80th percentile. `marginal_error` is the largest difference between the block-wise distribution that
the sampler draws from and a float64 softmax.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measuring import HEAP_KEPT, environment, interleaved, machine, publish, ratios, spread
from sparselogits.samplers import (
    Multinomial,
    Systematic,
    Threshold,
    TopK,
    compiled,
    window_uniforms,
)
from sparselogits.samplers.distribution import Blocks

CONDITIONS = {
    "warm": HEAP_KEPT,
    "warm_without_compiler": HEAP_KEPT | {"CC": "false"},
    "default": {},
}


def teacher_like(positions: int, vocabulary: int, device: str = "cpu") -> Tensor:
    """Draw Gaussian logits with a peaked head: about 3 nats at V = 128 256."""
    how: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    logits = torch.randn(positions, vocabulary, **how).mul_(2.5)
    logits[:, :64] += torch.randn(positions, 64, **how).mul_(4).add_(6)
    return logits


def marginal_error(logits: Tensor) -> float:
    """Return the largest error of the sampler's distribution against a float64 softmax."""
    blocks = Blocks.of(logits)
    exact = logits.double().softmax(-1)
    exact = torch.nn.functional.pad(exact, (0, -exact.shape[1] % 64)).view(len(logits), -1, 64)
    in_block = exact.sum(-1)
    drift = (blocks.sums / blocks.total / in_block.clamp_min(1e-300) - 1).abs()
    return float((exact.amax(-1) * drift).max())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every sampler relative to softmax, under the memory condition of this process."""
    torch.set_num_threads(arguments.threads)
    logits = teacher_like(arguments.positions, arguments.vocabulary)
    entropy = torch.special.entr(logits[:64].softmax(-1)).sum(-1).mean()
    logits = logits.to(getattr(torch, arguments.dtype))
    buffer = torch.empty_like(logits) if arguments.condition != "default" else None
    return {
        "machine": machine(),
        "compiled": compiled.library() is not None,
        "entropy_nats": float(entropy),
        **over_softmax(logits, buffer, arguments.repeats, arguments.clock),
        "marginal_error": marginal_error(logits[:64]),
    }


def by_pytorch(run: Callable[[], object]) -> object:
    """Run with block sums by PyTorch's operations instead of a compiled function."""
    fastest, compiled.fastest_for = compiled.fastest_for, lambda _: None
    try:
        return run()
    finally:
        compiled.fastest_for = fastest


def over_softmax(
    logits: Tensor,
    buffer: Tensor | None,
    repeats: int,
    clock: str,
    change: Callable[[Callable[[], object]], object] = lambda run: run(),
) -> dict[str, Any]:
    """Measure a softmax (into a buffer if given), and the samplers' times relative to it.

    `change` calls each sampler, such as `by_pytorch`.
    """
    samplers = [Systematic(50), Systematic(12), Multinomial(50), Threshold(0.02), TopK(12)]
    runs: dict[str, Callable[[], object]] = {
        "softmax": lambda: torch.softmax(logits, -1, out=buffer)
    }
    for sampler in samplers:
        uniforms = window_uniforms(0, 0, len(logits), sampler.uniforms_per_position)
        uniforms = uniforms.to(logits.device)
        runs[str(sampler)] = partial(change, partial(sampler, logits, uniforms))
    seconds = interleaved(runs, repeats, clock=clock)
    return {
        "softmax_seconds": spread(seconds["softmax"], 7),
        "ratio_to_softmax": {
            name: ratios(seconds, name, "softmax") for name in runs if name != "softmax"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", default="cpu", choices=["wall", "cpu"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--condition", choices=CONDITIONS, help="measure in this process only")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.condition:
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for condition, changes in CONDITIONS.items():
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--condition", condition],
            env=environment(changes),
            stdout=subprocess.PIPE,
            check=True,
        )
        found[condition] = json.loads(done.stdout)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "condition")}
    report = {"machine": found["warm"].pop("machine"), "settings": settings}
    for others in ("warm_without_compiler", "default"):
        del found[others]["machine"]
    publish(report | found, arguments.out)


if __name__ == "__main__":
    main()
