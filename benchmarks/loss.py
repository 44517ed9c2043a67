"""Compare the speed of the sparse loss with its matrix products and with other losses.

    python benchmarks/loss.py --d 512 --v 49152 --k 12 --rows 512 --repeats 7 --out loss.json
    python benchmarks/loss.py --threads 1 --clock cpu --anew --out loss.json

All methods of a setting run interleaved in one process, forward and backward, in a new random order
per repetition. Each time is divided by that of the three matrix products alone in the same
repetition, and the median is printed with the 20th and 80th percentile. The products (x W^T, g W,
g^T x) write their logits into an existing buffer and allocate both gradients, as any backward must.

    ours_K          linear_sparse_cross_entropy with K entries per row, chunks of torch operations
    triton_K        the same with the Triton kernels (on a GPU)
    ours_alpha      the same with the first K, alpha = 0.1 and labels
    cross_entropy   F.cross_entropy(F.linear(x, W), y): training without a teacher
    torch_chunked   torch.nn.functional.linear_cross_entropy with its default chunks
    torch_tuned     the same with the fastest of some batch_chunk_size values, tried first
    cut_torch       Cut Cross-Entropy's torch_compile path, if the package is installed
    distillkit      DistillKit's sparse KL in plain torch: logits, float32 log_softmax, gather
    full_kd         linear_dense_kd, full KD in chunks, from the teacher's hidden states of the same
                    width; includes a fourth product, with the teacher's head

The other losses run only with the first K, because their cost does not depend on K. Liger's kernels
are not included: they need a GPU, or Triton's interpreter, whose times are meaningless.

By default glibc returns large tensors to the system when they are freed, so every allocation maps
pages again; with `--memory kept` it keeps them. Each condition runs in a process of its own.

A long grid may be run in pieces: settings are added to those in `--out` if machine and options are
the same. `--anew` removes the earlier settings first, so that all results come from one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from measuring import HEAP_KEPT, environment, interleaved, processor, ratios, spread
from sparselogits.losses import TeacherHead, linear_dense_kd, linear_sparse_cross_entropy

MEMORY = {"default": {}, "kept": HEAP_KEPT}
CHUNK_ROWS = (64, 128, 256, 512)
"""Values of `batch_chunk_size` that are tried for torch's chunked loss."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], object]


def sparse_targets(rows: int, vocabulary: int, entries: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw ids [rows, entries], distinct within a row, and weights that sum to one."""
    stride = vocabulary // (4 * entries)
    ids = torch.rand(rows, 4 * entries, device=device).argsort(1)[:, :entries] * stride
    weights = torch.rand(rows, entries, device=device)
    return ids, weights / weights.sum(1, keepdim=True)


def sparse_autograd(x: Tensor, head: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Compute DistillKit's sparse forward KL from gathered student log probabilities."""
    log_s = torch.log_softmax(F.linear(x, head).float(), 1).gather(1, ids)
    return (weights * (weights.log() - log_s)).sum(1).mean()


def full_kd(x: Tensor, head: Tensor, teacher: TeacherHead) -> Tensor:
    """Compute full KD in chunks, with both heads."""
    return linear_dense_kd(x, head, teacher).loss


def methods(
    rows: int, width: int, vocabulary: int, entries: list[int], dtype: torch.dtype, device: str
) -> dict[str, Step]:
    """Return one function per method that runs forward and backward on shared inputs.

    "torch_chunked_SIZE" are the candidates for `torch_tuned`.
    """
    D, V = width, vocabulary
    torch.manual_seed(0)
    x = torch.randn(rows, D, device=device).to(dtype).requires_grad_()
    W = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    y = torch.randint(V, (rows,), device=device)
    targets = {K: sparse_targets(rows, V, K, device) for K in entries}
    first = targets[entries[0]]
    teacher = TeacherHead(torch.randn_like(x.detach()), torch.randn_like(W.detach()) / D**0.5)
    kernels = {"ours": "chunked"} | ({"triton": "triton"} if device == "cuda" else {})
    losses: dict[str, Callable[[], Tensor]] = {
        f"{name}_{K}": partial(linear_sparse_cross_entropy, x, W, *targets[K], impl=kernel)
        for name, kernel in kernels.items()
        for K in entries
    }
    losses |= {
        "ours_alpha": partial(linear_sparse_cross_entropy, x, W, *first, labels=y, alpha=0.1),
        "cross_entropy": lambda: F.cross_entropy(F.linear(x, W), y),
        "distillkit": partial(sparse_autograd, x, W, *first),
        "full_kd": partial(full_kd, x, W, teacher),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions
        chunked = {"torch_chunked": options()} | {
            f"torch_chunked_{size}": options(batch_chunk_size=size) for size in CHUNK_ROWS
        }
        losses |= {
            name: partial(F.linear_cross_entropy, x, W, y, options=own)
            for name, own in chunked.items()
        }
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        losses["cut_torch"] = partial(cut, x, W, y, impl="torch_compile")
    except ImportError:
        print("cut_cross_entropy is not installed; cut_torch is not measured", file=sys.stderr)

    def step(loss: Callable[[], Tensor]) -> None:
        x.grad = W.grad = None
        loss().backward()

    steps: dict[str, Step] = {name: partial(step, loss) for name, loss in losses.items()}
    return {"products": partial(products, x.detach(), W.detach())} | steps


def products(x: Tensor, head: Tensor, buffer: dict[str, Tensor] = {}) -> tuple[Tensor, Tensor]:  # noqa: B006
    """Compute the three matrix products that every loss of a linear head needs."""
    z = buffer.get("logits")
    if z is None or z.shape != (len(x), len(head)) or z.dtype != x.dtype or z.device != x.device:
        z = buffer["logits"] = x.new_empty(len(x), len(head))
    torch.mm(x, head.t(), out=z)
    return z @ head, z.t() @ x


def method_of(name: str) -> str:
    """Return the method that a function of `methods` measures."""
    return "torch_tuned" if name.startswith("torch_chunked_") else name


def tuned(runs: dict[str, Step], clock: str) -> tuple[dict[str, Step], dict[str, int]]:
    """Replace the candidates for `torch_tuned` by the fastest of them, and return its chunk."""
    tried = {name: run for name, run in runs.items() if method_of(name) != name}
    if not tried:
        return runs, {}
    seconds = interleaved(tried, 2, clock=clock)
    best = min(tried, key=lambda name: min(seconds[name]))
    others = {name: run for name, run in runs.items() if name not in tried}
    chosen = int(best.removeprefix("torch_chunked_"))
    return others | {"torch_tuned": tried[best]}, {"torch_tuned_rows": chosen}


def measure(runs: dict[str, Step], repeats: int, clock: str) -> dict[str, object]:
    runs, chosen = tuned(runs, clock)
    seconds = interleaved(runs, repeats, clock=clock)
    summary = {name: ratios(seconds, name, "products") for name in runs if name != "products"}
    return chosen | {
        "products_seconds": spread(seconds["products"]),
        "ratio_to_products": summary,
    }


def add_to(out: Path, machine: dict[str, object], results: list[dict[str, object]]) -> None:
    """Write the results, keeping earlier ones of other settings on the same machine."""

    def setting(row: dict[str, object]) -> tuple[object, ...]:
        shape = (row[name] for name in ("dtype", "D", "V", "rows"))
        return (*shape, row.get("memory", "default"))

    if out.exists():
        before = json.loads(out.read_text())
        if before["machine"] != machine:
            raise SystemExit(f"{out} is of another machine or options: {before['machine']}")
        new = {setting(row) for row in results}
        results = [row for row in before["results"] if setting(row) not in new] + results
    results.sort(key=lambda row: tuple(map(str, setting(row))))
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """Return medians (20th to 80th percentile) in Markdown, one line per setting."""
    found_names = dict.fromkeys(name for row in results for name in row["ratio_to_products"])
    entries = sorted((n for n in found_names if n[5:].isdigit()), key=lambda n: int(n[5:]))
    names = [*entries, *(n for n in found_names if n not in entries)]
    both = any("memory" in row for row in results)
    head = ["dtype", "D", "V", *["memory"] * both, *names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(results, key=lambda row: (row["dtype"] != "float32", row["D"], row["V"])):
        found = row["ratio_to_products"]
        cells = [
            f"{q['median']:.2f} ({q['p20']:.2f}-{q['p80']:.2f})" if q else ""
            for q in (found.get(name) for name in names)
        ]
        shape = [str(row[name]) for name in ("dtype", "D", "V", *["memory"] * both)]
        lines.append(f"| {' | '.join([*shape, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--v", type=int, nargs="+", default=[32000, 49152, 128256, 151936])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 12, 50])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", help="methods to run; default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor seconds, more stable on a shared machine; valid with one thread",
    )
    parser.add_argument("--memory", nargs="+", default=["default"], choices=MEMORY)
    parser.add_argument("--out", type=Path, help="JSON file to add results to")
    parser.add_argument("--anew", action="store_true", help="remove earlier results from --out")
    parser.add_argument(
        "--show", action="store_true", help="print --out as a table without measuring"
    )
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.out.read_text())["results"]))
        return
    if args.out and args.anew:
        args.out.unlink(missing_ok=True)
    for memory in args.memory:
        wanted = environment(MEMORY[memory])
        if dict(os.environ) == wanted:
            run_grid(args, memory)
            continue
        again = [own for own in sys.argv[1:] if own != "--anew"]
        command = [sys.executable, __file__, *again, "--memory", memory]
        subprocess.run(command, env=wanted, check=True)


def run_grid(args: argparse.Namespace, memory: str) -> None:
    """Measure all settings under the memory condition of this process."""
    torch.set_num_threads(args.threads)
    clock = "cuda" if args.device == "cuda" else args.clock
    machine = {
        "processor": processor(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "clock": clock,
        "torch": torch.__version__,
    }
    for dtype, D, V in itertools.product(args.dtype, args.d, args.v):
        runs = methods(args.rows, D, V, args.k, DTYPES[dtype], args.device)
        if args.only:
            wanted = {"products", *args.only}
            runs = {name: run for name, run in runs.items() if method_of(name) in wanted}
        row = {"dtype": dtype, "D": D, "V": V, "rows": args.rows, "repeats": args.repeats}
        row["memory"] = memory
        row |= measure(runs, args.repeats, clock)
        print(json.dumps(row), flush=True)
        if args.out:
            add_to(args.out, machine, [row])


if __name__ == "__main__":
    main()
