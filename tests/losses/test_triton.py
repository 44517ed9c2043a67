"""Test the Triton kernel: its numbers under the interpreter, its compilation for GPUs.

No GPU is needed. The interpreter has to be enabled before triton is imported, so the numbers are
checked in a separate process (this file, run as a script).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from tests.conftest import run_python

pytest.importorskip("triton")


@pytest.mark.slow
def test_matches_reference_under_the_interpreter():
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = run_python(__file__, env={"TRITON_INTERPRET": "1", "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout


class Launches:
    """Stands in for the kernel: keeps what it would be launched with."""

    def __init__(self) -> None:
        self.arguments: list[object] = []
        self.options: dict[str, int | bool] = {}

    def __getitem__(self, grid: tuple[int]) -> Launches:
        return self

    def __call__(self, *arguments: object, **options: int | bool) -> None:
        self.arguments, self.options = list(arguments), options


TYPES = {
    **{torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"},
    **{torch.int64: "*i64", int: "i32", float: "fp32"},
}


def launched(monkeypatch, logits, gradient, entries, vocabulary, options):
    """The signature, constants, alignments and warps with which the launcher calls the kernel."""
    from sparselogits.losses import triton_rows
    from sparselogits.losses.criterion import Criterion
    from sparselogits.losses.targets import place_missing_mass

    launches, rows = Launches(), 2
    monkeypatch.setattr(triton_rows, "row_loss_kernel", launches)
    criterion = Criterion(**options)
    ids, weights = torch.zeros(rows, entries, dtype=torch.int64), torch.zeros(rows, entries)
    label = torch.zeros(rows, dtype=torch.int64)
    rule = criterion.missing_mass
    targets = place_missing_mass(ids, weights, torch.ones(rows), label, rule, vocabulary)
    losses_of = triton_rows.TritonLosses(targets, criterion, with_ce=criterion.alpha > 0)
    z = torch.empty(rows, vocabulary, dtype=logits)
    losses_of(z, None if gradient is None else z.to(gradient), slice(0, rows))
    return launches


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("logits", "gradient", "entries", "vocabulary", "options"),
    [  # a head in bfloat16, float16 and float32 on CUDA has float32 logits
        (torch.float32, torch.bfloat16, 12, 128_256, {"alpha": 0.1}),
        (torch.float32, torch.bfloat16, 50, 32_000, {"missing_mass": "ground_truth"}),
        (torch.float32, torch.float16, 50, 32_000, {"alpha": 0.1, "temperature": 2.0}),
        (
            *(torch.float32, torch.float32, 50, 151_936),
            {"alpha": 0.1, "missing_mass": "ghost", "temperature": 2.0, "logit_softcap": 30.0},
        ),
        (torch.float32, torch.float32, 12, 1000, {"missing_mass": "ghost"}),
        (torch.bfloat16, torch.bfloat16, 50, 32_000, {"missing_mass": "smooth"}),  # of logits
        (torch.float32, None, 12, 32_000, {"alpha": 0.1}),  # without gradients
        (torch.float32, torch.float32, 1, 1, {}),
        (torch.float32, torch.float32, 0, 32_000, {"alpha": 1.0}),
    ],
)
def test_compiles_what_is_launched(
    capability, logits, gradient, entries, vocabulary, options, monkeypatch
):
    """Ahead of time: the launcher's sizes, warps and types, specialised as Triton would."""
    import triton
    from triton.backends.compiler import GPUTarget

    from sparselogits.losses.triton_rows import row_loss_kernel

    launches = launched(monkeypatch, logits, gradient, entries, vocabulary, options)
    constants = dict(launches.options)
    warps = constants.pop("num_warps")
    assert constants["BLOCK_E"] >= max(16, entries)
    assert 1 <= warps <= 16
    names = row_loss_kernel.arg_names
    signature, aligned = {}, {}
    for at, (name, value) in enumerate(zip(names, launches.arguments, strict=False)):
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
        signature[name] = TYPES[kind]
        if kind is int and value == 1:  # Triton makes a constant of it
            signature[name], constants[name] = "constexpr", 1
        elif isinstance(value, torch.Tensor) or (kind is int and value % 16 == 0):
            aligned[at,] = [["tt.divisibility", 16]]
    for name in names[len(launches.arguments) :]:
        signature[name] = "constexpr"
    assert set(names) == set(signature)
    source = triton.compiler.ASTSource(row_loss_kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    assert compiled.metadata.num_warps == warps
    assert len(compiled.asm["cubin"]) > 1000


def check_error_of_low_precision(dtype: torch.dtype, targets: str, alpha: float) -> None:
    from problems import errors_in_low_precision

    from sparselogits.losses import linear_sparse_cross_entropy

    def loss_of(*tensors, **options):
        return linear_sparse_cross_entropy(*tensors, **options, impl="triton", chunk_rows=32)

    for ours, torchs in errors_in_low_precision(dtype, targets, alpha, loss_of):
        assert ours <= 2 * torchs


def degenerate(p: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """A problem with nothing in it, in one way or another."""
    if case == "all rows ignored":
        return {**p, "labels": torch.full_like(p["labels"], -100)}
    if case == "no entries":
        rows = p["input"].shape[0]
        ids, weights = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, 0)
        return {**p, "target_ids": ids, "target_weights": weights}
    if case == "one id":
        whole = {k: p[k][:1].detach().requires_grad_() for k in ("linear_weight", "linear_bias")}
        labels = p["labels"].clamp(max=0)
        ids, weights = p["target_ids"][:, :1] * 0, p["target_weights"][:, :1]
        return {**p, **whole, "labels": labels, "target_ids": ids, "target_weights": weights}
    assert case == "no rows"
    of_rows = {k: v[:0].detach() for k, v in p.items() if not k.startswith("linear")}
    of_rows["input"].requires_grad_()
    return {**p, **of_rows}


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
    from problems import RULES, TARGETS, problem

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
    empty = ("no rows", "no entries", "one id", "all rows ignored")
    for case, rule in itertools.product(empty, RULES):
        results = []
        for impl in ("triton", "reference"):
            p = degenerate(problem(torch.float32), case)
            results.append(run(p, missing_mass=rule, alpha=0.3, impl=impl))
        assert all(value.isfinite().all() for value in results[0]), (case, rule)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5, msg=f"{case}, {rule}")
        cases += 1
    for dtype, targets in itertools.product((torch.bfloat16, torch.float16), TARGETS):
        check_error_of_low_precision(dtype, targets, alpha=0.3)
        cases += 1
    for rule in RULES:
        check_huge_logits(rule)
        cases += 1
    for rule, temperature in itertools.product(RULES, (1.0, 2.0)):
        p = problem(torch.float32)  # alpha=1 leaves the target out, NaN or not
        options = {"missing_mass": rule, "temperature": temperature, "alpha": 1.0}
        _, _, *expected = run(p, **options, impl="reference")
        weights = p["target_weights"]
        p["target_weights"] = weights.masked_fill(weights != 0, torch.nan)
        _, _, *found = run(p, **options, impl="triton")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
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
