"""Test the Triton kernel that sums blocks: its numbers in the interpreter, its code for GPUs.

No GPU is needed. The interpreter has to be enabled before triton is imported, so the tests of
numbers, and those of the samplers, run in a separate process.
"""

import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselogits.errors import SparseLogitsWarning
from sparselogits.samplers import compiled
from sparselogits.samplers.distribution import BLOCK, Blocks
from tests.conftest import run_python
from tests.losses.test_triton import TYPES, Launches
from tests.samplers.distributions import KINDS, logits_of

pytest.importorskip("triton")

from sparselogits.samplers import triton_sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with the interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_kernel_and_samplers_in_the_interpreter():
    here = Path(__file__).parent
    files = [
        here / f"test_{name}.py" for name in ("triton", "systematic", "contract", "statistics")
    ]
    done = run_python(
        *("-m", "pytest", *files, "-p", "tests.samplers.by_kernel", "-p", "no:cacheprovider"),
        env={"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=here.parents[1],
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def extreme(dtype: torch.dtype, vocabulary: int = 1024) -> Tensor:
    """Rows of every kind, times 30 as well, and rows with far offsets and blocks of -inf."""
    rows = torch.stack([logits_of(kind, vocabulary, 5) for kind in KINDS])
    shifted = rows[:2] + (1000 if dtype == torch.float16 else 2.0**22)
    hidden = rows[:2].clone()
    hidden[:, BLOCK : 3 * BLOCK] = -torch.inf
    return torch.cat([rows, rows * 30, shifted, -shifted, hidden]).to(dtype)


def exact_weights(logits: Tensor, exponent: float, shifts: Tensor, sums: Tensor) -> Tensor:
    blocks = Blocks(logits, shifts, sums, exponent)
    return blocks.weights_in(torch.arange(sums.numel())).view(*sums.shape, BLOCK)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [1.0, 0.6, 2.0])
def test_sums_are_those_of_float64(dtype, exponent):
    given = extreme(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the interpreter warns of inf - inf
        peaks, shifts, sums, moments = triton_sums.block_sums(given, exponent, True)
    assert torch.equal(peaks, given.float().amax(-1, keepdim=True))
    weights = exact_weights(given, exponent, shifts, sums)
    powers = weights.log2().clamp_min(-1e3)
    allowed = triton_sums.TOLERANCE * weights.sum(-1) + 1e-300
    assert bool(((sums - weights.sum(-1)).abs() <= allowed).all())
    allowed = triton_sums.TOLERANCE * (weights * (1 + powers.abs())).sum(-1) + 1e-300
    assert bool(((moments - (weights * powers).sum(-1)).abs() <= allowed).all())
    without = triton_sums.block_sums(given, exponent, False)
    assert torch.equal(without[2], sums)
    assert without[3] is None


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_marginals_within_1e_9(dtype):
    """Mass on both sides of the limit above which a block is summed in float64."""
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn(8, 16_384, generator=generator) * 2).to(dtype)
    given[:, ::331] += torch.linspace(2, 7, 8)[:, None].to(dtype)
    blocks = Blocks.of(given)
    p = given.double().softmax(-1).view(8, -1, BLOCK)
    drift = (blocks.sums / blocks.total / p.sum(-1) - 1).abs()
    assert float((p.amax(-1) * drift).max()) < 1e-9
    entropy = torch.special.entr(p).flatten(1).sum(-1)
    found = Blocks.of(given, with_moment=True).entropy
    torch.testing.assert_close(found, entropy, rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_pytorch_or_next_to_a_boundary(dtype, monkeypatch):
    given = extreme(dtype, 1000)[: 2 * len(KINDS)]  # no multiple of 64
    cumulative = given.double().softmax(-1).cumsum(-1)
    cumulative /= cumulative[:, -1:].clone()
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(len(given), 200, generator=generator, dtype=torch.float64)
    # rounding decides on which side of a boundary the second half of the points is
    points = torch.cat([1 - uniforms, cumulative[:, ::5]], 1).sort(-1).values

    def tokens() -> Tensor:
        blocks = Blocks.of(given)
        edges, _ = blocks.edges()
        top = edges[:, -1:]
        levels = (points * top).ceil().long().clamp_min(1).minimum(top)
        return blocks.tokens_at(edges, levels)

    ours = tokens()
    monkeypatch.setattr(compiled, "fastest_for", lambda _: None)
    torchs = tokens()
    differ = ours != torchs
    for after in (ours.minimum(torchs), ours.maximum(torchs) - 1):
        away = (cumulative.gather(1, after.clamp_min(0)) - points).abs()
        assert float(away[differ].max() if bool(differ.any()) else 0) < 1e-8


@interpreted
def test_bits_depend_on_the_logits_of_a_block_alone(monkeypatch):
    given = extreme(torch.float32, 192)

    def bits(logits: Tensor) -> list[Tensor]:
        tops, *sums = triton_sums.relative_sums(logits, 0.7, True)
        return [tops.view(torch.int32), *(part.view(torch.int64) for part in sums)]

    whole = bits(given)
    unaligned = torch.empty(given.numel() + 1)[1:].view(given.shape).copy_(given)
    one_by_one = [bits(row[None]) for row in given]
    alone = [torch.cat(parts) for parts in zip(*one_by_one, strict=True)]
    monkeypatch.setattr(triton_sums, "_AT_ONCE", 8)
    small = bits(given)
    upwards = [part.flip(0) for part in bits(given.flip(0))]
    # Triton adds the weights of a block in an order that depends on the layout of threads
    order = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(0))
    shuffled = bits(given.view(len(given), -1, BLOCK)[..., order].flatten(1))
    for other in (bits(unaligned), alone, small, upwards, shuffled):
        assert all(map(torch.equal, whole, other))
    assert [part.shape for part in bits(given[:0])] == [(0, 3)] * 3
    strided = torch.stack([given, given], 2)[:, :, 0]
    assert torch.equal(Blocks.of(strided).sums, Blocks.of(given).sums)


@interpreted
def test_offsets_beyond_2_31(monkeypatch):
    """The last program of a launch over more than 2**31 logits; no other memory is used."""
    import triton.language as tl
    from triton.runtime import interpreter

    at_once, few = 128, torch.randn(2**13, generator=torch.Generator().manual_seed(0)).half()

    def launch(logits: Tensor) -> list[Tensor]:
        count = len(logits) // BLOCK
        tops, sums = torch.empty(count), torch.empty(count, dtype=torch.float64)
        constants = {"WITH_MOMENT": False, "BLOCK": BLOCK, "AT_ONCE": at_once}
        triton_sums.block_sums_kernel[(1,)](logits, tops, sums, sums, count, 1.4, **constants)
        return [tops[-at_once:], sums[-at_once:]]

    expected = launch(few)
    many = torch.empty(2**31 + len(few), dtype=torch.float16)
    many[2**31 :] = few
    last = np.array([len(many) // BLOCK // at_once - 1], np.int32)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_get_program_id",
        lambda *_: interpreter.TensorHandle(last, tl.int32),
    )
    # would copy the tensors onto themselves
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    assert all(map(torch.equal, launch(many), expected))


@interpreted
@pytest.mark.parametrize("wrong", [0, 2, 3])
@pytest.mark.parametrize("factor", [1.0, 1 + 2.0**-19, torch.nan])
def test_an_inaccurate_kernel_is_refused(wrong, factor, monkeypatch):
    own = triton_sums.block_sums

    def changed(logits: Tensor, exponent: float, with_moment: bool) -> compiled.Sums:
        found = own(logits, exponent, with_moment)
        return tuple(
            part * factor if i == wrong and part is not None else part
            for i, part in enumerate(found)
        )

    monkeypatch.setattr(triton_sums, "block_sums", changed)
    compiled.kernel_on.cache_clear()
    cpu = torch.device("cpu")
    if factor == 1:
        assert compiled.kernel_on(cpu, torch.bfloat16) is changed
    else:
        with pytest.warns(SparseLogitsWarning, match="its results differ from those of PyTorch"):
            assert compiled.kernel_on(cpu, torch.bfloat16) is None
        assert compiled.kernel_on(cpu, torch.bfloat16) is None  # warns once
    compiled.kernel_on.cache_clear()


def test_pytorch_is_used_where_the_kernel_fails_or_triton_is_missing(monkeypatch):
    absent = torch.device("cuda", 99)
    with pytest.warns(SparseLogitsWarning, match="cannot be used on cuda:99: .*PyTorch's"):
        assert compiled.kernel_on(absent, torch.float32) is None
    monkeypatch.setitem(sys.modules, "sparselogits.samplers.triton_sums", None)
    monkeypatch.delattr("sparselogits.samplers.triton_sums")
    assert compiled.kernel_on(absent, torch.float16) is None
    compiled.kernel_on.cache_clear()
    double = SimpleNamespace(is_cuda=True, dtype=torch.float64, device=absent)
    assert compiled.fastest_for(double) is None


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "with_moment"), [*zip(DTYPES, (True, False, True), strict=True)])
def test_compiles_to_exactly_rounded_operations(capability, dtype, with_moment, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, launches = triton_sums.block_sums_kernel, Launches()
    monkeypatch.setattr(triton_sums, "block_sums_kernel", launches)
    triton_sums.block_sums(torch.zeros(2, 2048, dtype=dtype), 1.0, with_moment)
    options = dict(launches.options)
    chosen = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    types = TYPES | {torch.float64: "*fp64"}
    kinds = [getattr(a, "dtype", type(a)) for a in launches.arguments]
    signature = dict(zip(kernel.arg_names, map(types.__getitem__, kinds), strict=False))
    signature |= dict.fromkeys(options, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = triton.compiler.ASTSource(kernel, signature, options, aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=chosen)
    assert len(made.asm["cubin"]) > 1000
    operations = set(re.findall(r"\b(\w+(?:\.\w+)*\.f(?:32|64)\w*)", made.asm["ptx"]))
    arithmetic = {o for o in operations if re.match(r"add|sub|mul|fma|mad|div|ex2|lg2|rcp", o)}
    assert arithmetic
    assert all(re.fullmatch(r"(add|sub|mul)\.rn\.f(32|32x2|64)", o) for o in arithmetic)
    assert "ld.global.v4.b32" in made.asm["ptx"]  # 16 bytes per load
    assert not re.search(r"^\s+(atom|red)\.", made.asm["ptx"], re.MULTILINE)
