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
        p = problem(dtype)
        found, expected = (run(p, alpha=0.3, impl=i) for i in ("triton", "chunked"))
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
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
