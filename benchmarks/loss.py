"""Speed of the sparse loss against the matrix products it cannot avoid, and against its rivals.

    python benchmarks/loss.py --d 512 --v 49152 --k 12 --rows 1024 --repeats 7 --out loss.json

All methods of a setting run interleaved in one process, forward and backward; each repetition's
time is divided by that of the three bare products (x W^T, g W, g^T x) of the same repetition, and
the median is printed with the 20th and 80th percentile. The order is shuffled each time.

    ours            linear_sparse_cross_entropy
    ours_alpha      the same with alpha = 0.1 and labels
    cross_entropy   F.cross_entropy(F.linear(x, W), y): training without a teacher
    torch_linear    torch.nn.functional.linear_cross_entropy, where torch has it
    sparse_autograd log_softmax and gather by plain autograd, as sparse losses are usually written
    dense           forward KL with the teacher's logits already there: the softmax work of full KD
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from sparselogits.losses import linear_sparse_cross_entropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def methods(
    rows: int, width: int, vocabulary: int, entries: int, dtype: torch.dtype, device: str
) -> dict:
    D, V, K = width, vocabulary, entries
    torch.manual_seed(0)
    x = torch.randn(rows, D, device=device).to(dtype).requires_grad_()
    W = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    ids = torch.rand(rows, min(V, 4 * K), device=device).argsort(1)[:, :K] * (V // (4 * K))
    weights = torch.rand(rows, K, device=device)
    weights /= weights.sum(1, keepdim=True)
    labels = torch.randint(V, (rows,), device=device)

    def products() -> None:
        with torch.no_grad():
            z = x @ W.t()
            z @ W, z.t() @ x

    def sparse_autograd() -> torch.Tensor:
        log_s = torch.log_softmax(F.linear(x, W).float(), 1)
        return -(weights * log_s.gather(1, ids)).sum(1).mean()

    def dense() -> torch.Tensor:
        log_s = torch.log_softmax(F.linear(x, W).float(), 1)
        return F.kl_div(log_s, log_s.detach(), log_target=True, reduction="batchmean")

    losses: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: linear_sparse_cross_entropy(x, W, ids, weights),
        "ours_alpha": lambda: linear_sparse_cross_entropy(
            x, W, ids, weights, labels=labels, alpha=0.1
        ),
        "cross_entropy": lambda: F.cross_entropy(F.linear(x, W), labels),
        "sparse_autograd": sparse_autograd,
        "dense": dense,
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["torch_linear"] = lambda: F.linear_cross_entropy(x, W, labels)

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = W.grad = None
            loss().backward()

        return run

    return {"products": products} | {name: step(loss) for name, loss in losses.items()}


def seconds(run: Callable[[], None], device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(runs: dict, repeats: int, device: str, clock: Callable[[], float]) -> dict:
    for run in runs.values():
        run()
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    times = []
    for _ in range(repeats):
        order = random.sample(list(runs), len(runs))
        taken = {name: seconds(runs[name], device, clock) for name in order}
        times.append(taken["products"])
        for name in runs:
            ratios[name].append(taken[name] / taken["products"])
    summary = {name: quantiles(values) for name, values in ratios.items() if name != "products"}
    return {"products_seconds": quantiles(times), "ratio_to_products": summary}


def quantiles(values: list[float]) -> dict[str, float]:
    q = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {
        "p20": round(q[0].item(), 4),
        "median": round(q[1].item(), 4),
        "p80": round(q[2].item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--v", type=int, nargs="+", default=[32000, 49152, 128256, 151936])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 12, 50])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", help="methods to run; all when left out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor seconds, steadier on a shared machine; meaningful with one thread",
    )
    parser.add_argument("--out", type=Path, help="JSON file; printed in any case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    results = []
    for dtype, D, V, K in itertools.product(args.dtype, args.d, args.v, args.k):
        runs = methods(args.rows, D, V, K, DTYPES[dtype], args.device)
        if args.only:
            runs = {name: run for name, run in runs.items() if name in {"products", *args.only}}
        row = {"dtype": dtype, "D": D, "V": V, "K": K, "rows": args.rows}
        row |= measure(runs, args.repeats, args.device, clock)
        results.append(row)
        print(json.dumps(row), flush=True)
    report = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "threads": args.threads,
            "clock": args.clock,
            "torch": torch.__version__,
        },
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
