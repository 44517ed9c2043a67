"""The Triton kernel: its numbers under the interpreter, its compilation for real GPUs.

No GPU is needed: the interpreter has to be switched on before triton is imported, so the numbers
are checked in a process of their own (this file, run as a script).

pytest tests/losses/test_triton.py
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

FLAGS = ["WITH_GRAD", "WITH_CE", "HAS_GHOST", "HAS_SPREAD", "HAS_CAP", "TWO_TEMPERATURES"]


@pytest.mark.slow
def test_matches_reference_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "gradient", "flags"),
    [
        ("fp32", "bf16", "WITH_GRAD WITH_CE"),
        ("fp32", "fp32", "WITH_GRAD WITH_CE HAS_GHOST HAS_CAP TWO_TEMPERATURES"),
        ("bf16", "bf16", "HAS_SPREAD"),
    ],
)
def test_compiles_ahead_of_time(capability, dtype, gradient, flags):
    import triton
    from triton.backends.compiler import GPUTarget

    from sparselogits.losses.triton_kernel import row_loss_kernel

    scalars = {"logits_stride": "i64", "gradient_stride": "i64", "V": "i32", "E": "i32"}
    pointers = {"logits_ptr": f"*{dtype}", "gradient_ptr": f"*{gradient}"}
    pointers |= {"ids_ptr": "*i64", "label_ptr": "*i64"}
    constants = {flag: flag in flags.split() for flag in FLAGS} | {"BLOCK_V": 8192, "BLOCK_E": 16}
    signature = {}
    for name in row_loss_kernel.arg_names:
        default = "constexpr" if name in constants else "*fp32" if name.endswith("_ptr") else "fp32"
        signature[name] = (scalars | pointers).get(name, default)
    source = triton.compiler.ASTSource(row_loss_kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000


def check_error_of_low_precision(dtype: torch.dtype) -> None:
    """Against float64 on the same rounded numbers, at most twice the error of torch's own loss."""
    from sparselogits.losses import linear_sparse_cross_entropy

    torch.manual_seed(0)
    rows, width, vocabulary = 24, 32, 300
    x, head = torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) / 6).to(dtype)
    labels = torch.randint(vocabulary, (rows,))
    targets = (labels[:, None], torch.ones(rows, 1))

    def gradients(dtype, loss):
        a, b = (t.to(dtype).requires_grad_() for t in (x, head))
        value = loss(a, b)
        return [value.detach(), *torch.autograd.grad(value, (a, b))]

    def dense(a, b):
        return F.cross_entropy(F.linear(a, b), labels)

    def ours(a, b):
        return linear_sparse_cross_entropy(a, b, *targets, impl="triton", chunk_rows=8)

    exact, torchs, found = (
        gradients(torch.float64, dense),
        gradients(dtype, dense),
        gradients(dtype, ours),
    )
    for mine, theirs, truth in zip(found, torchs, exact, strict=True):
        assert (mine.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


def check_huge_logits(rule: str) -> None:
    """Logits to +-1e4, against the oracle in float64."""
    from sparselogits.losses import sparse_cross_entropy

    generator = torch.Generator().manual_seed(0)
    z = torch.rand(4, 32, generator=generator) * 2e4 - 1e4
    ids = torch.stack([torch.randperm(32, generator=generator)[:3] for _ in range(4)])
    options = {"labels": ids[:, 2], "alpha": 0.25, "missing_mass": rule}
    results = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "reference")):
        logits = z.to(dtype).requires_grad_()
        weights = torch.full((4, 3), 0.25)
        loss = sparse_cross_entropy(logits, ids, weights, **options, impl=impl)
        results.append([loss.detach().double(), torch.autograd.grad(loss, logits)[0].double()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def check_everything() -> int:
    from problems import RULES, problem

    from sparselogits.errors import InvalidArgumentError
    from sparselogits.losses import linear_sparse_cross_entropy

    names = ("input", "linear_weight", "linear_bias")

    def run(p, **options):
        parts = linear_sparse_cross_entropy(**p, **options, return_parts=True)
        return [*parts, *torch.autograd.grad(parts.loss, [p[n] for n in names])]

    cases = 0
    mixes = [(0.0, 1.0, None), (0.3, 1.0, 5.0), (0.0, 2.5, 5.0), (0.3, 2.5, None)]
    for rule, (alpha, temperature, cap) in itertools.product(RULES, mixes):
        options = {"missing_mass": rule, "alpha": alpha, "temperature": temperature}
        options |= {"logit_softcap": cap, "logit_scale": 1.3}
        p = problem(torch.float32)
        found, expected = (run(p, **options, impl=i) for i in ("triton", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        cases += 1
    for dtype in (torch.bfloat16, torch.float16):
        check_error_of_low_precision(dtype)
        cases += 1
    for rule in RULES:
        check_huge_logits(rule)
        cases += 1
    p = problem(torch.float32)
    with torch.no_grad():
        p["linear_weight"][0, 0] = torch.nan
    assert linear_sparse_cross_entropy(**p, impl="triton").isnan()
    try:
        linear_sparse_cross_entropy(**problem(torch.float64), impl="triton")
    except InvalidArgumentError:
        return cases + 2
    raise AssertionError("float64 was not refused")


if __name__ == "__main__":
    print(check_everything(), "cases agree")
