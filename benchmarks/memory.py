"""Measure the peak memory of the loss beyond inputs and gradients: about one chunk of logits.

    python benchmarks/memory.py --d 512 --v 49152 --k 12 --rows 2048 --out memory.json

Each method runs forward and backward in a separate process. On a CPU, every allocation of torch is
counted by the profiler's memory events; on CUDA, the allocator's peak is read. The output also has
the bytes of the gradients, of one chunk of `chunk_rows` rows of logits, and of all logits;
`beyond_in_chunks` is (peak - gradients) / chunk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from measuring import machine
from sparselogits.losses import linear_sparse_cross_entropy
from sparselogits.losses.chunked import default_chunk_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHODS = ["ours", "ours_softcap", "ours_two_temperatures", "cross_entropy", "sparse_autograd"]


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """Return the peak of allocated bytes during `run`, minus those allocated before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(name: str, args: argparse.Namespace) -> dict[str, float | str]:
    """Measure one method in this process."""
    torch.set_num_threads(1)
    dtype, device = DTYPES[args.dtype], args.device
    x = torch.randn(args.rows, args.d, device=device).to(dtype).requires_grad_()
    W = torch.randn(args.v, args.d, device=device).mul_(args.d**-0.5).to(dtype).requires_grad_()
    ids = torch.randint(args.v, (args.rows, args.k), device=device).sort(1).values
    weights = torch.full((args.rows, args.k), 1 / args.k, device=device)
    labels = ids[:, 0].clone()
    chunk_rows = args.chunk_rows or default_chunk_rows(args.rows, args.v, x.device, x.dtype)

    def ours(**options: object) -> torch.Tensor:
        return linear_sparse_cross_entropy(
            x, W, ids, weights, labels=labels, alpha=0.1, chunk_rows=chunk_rows, **options
        )

    def sparse_autograd() -> torch.Tensor:
        return -(weights * F.linear(x, W).float().log_softmax(1).gather(1, ids)).sum(1).mean()

    losses: dict[str, Callable[[], torch.Tensor]] = {
        "ours": ours,
        "ours_softcap": lambda: ours(logit_softcap=30.0),
        "ours_two_temperatures": lambda: ours(temperature=2.0),
        "cross_entropy": lambda: F.cross_entropy(F.linear(x, W), labels),
        "sparse_autograd": sparse_autograd,
    }
    peak = peak_bytes(lambda: losses[name]().backward(), device)
    gradients = sum(t.numel() * t.element_size() for t in (x, W))
    logits = args.v * x.element_size()
    return {
        "method": name,
        "peak_bytes": peak,
        "gradient_bytes": gradients,
        "chunk_bytes": chunk_rows * logits,
        "logits_bytes": args.rows * logits,
        "beyond_in_chunks": round((peak - gradients) / (chunk_rows * logits), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--v", type=int, default=49152)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--chunk-rows", type=int, help="default: chosen by the loss")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="JSON file; the results are also printed")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results = []
    for name in METHODS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        results.append(json.loads(subprocess.check_output(command, text=True)))
        print(json.dumps(results[-1]), flush=True)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
        report = {"machine": machine(), "settings": settings, "results": results}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
