"""Sum blocks of weights on CUDA with a Triton kernel that reads the logits once.

The kernel is the counterpart of block_sums.c. The exponents of a block are relative to the block's
largest logit, not to the row's, so one pass suffices and a block's sum depends on its 64 logits
alone: batches and rows do not matter. PyTorch scales the sums to the row's largest logit in
float64.

The kernel's bits do not depend on the order in which Triton adds, which changes with the layout of
threads, nor on the device: float32 operations are rounded one by one (no fused multiply-add, no
hardware exponential), and the summands are multiples of 2**-45, which float64 adds exactly.

A sum differs from a float64 sum by at most `TOLERANCE`. Nearly all of the difference is the
rounding of float32 exponents and powers, which are exact for the largest logit of a block.

The kernel has not been run on a GPU: the tests run the kernel in Triton's interpreter on a CPU
(TRITON_INTERPRET=1) and compile it for GPUs. `compiled.kernel_on` compares it with PyTorch on every
device before its use.
"""

# Triton parses the source of the kernel's functions: arguments cannot be annotated, constants are
# upper case, and only names known to Triton may be used.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparselogits.samplers.compiled import Sums
from sparselogits.samplers.distribution import BLOCK, LOG2_E, NOTHING, PEAK, Blocks

TOLERANCE = 2.0**-21
"""Largest relative error of a block sum, if all errors of its 64 weights have the same sign.

The error of a moment is relative to the sum of w * (1 + abs(log2 w)). Blocks that are not summed
again in float64 have only tokens with p <= 2**-7 (see `distribution._HEAVY`), so the error of a
block changes the marginals of its tokens by less than 4e-9. The tests find less than 1e-9.
"""

_AT_ONCE = 32  # blocks per program, whatever the device: nothing is tuned


def block_sums(logits: Tensor, exponent: float, with_moment: bool) -> Sums:
    """Sum weights by block; see `distribution.sum_by_block`, which sums heavy blocks again.

    Args:
        logits: float32, bfloat16 or float16 [P, V], contiguous, with V a multiple of 64.
        exponent: exponent of the teacher's probability in the proposal, not 0.
        with_moment: whether to compute the moments.
    """
    slope = exponent * LOG2_E
    tops, sums, moments = relative_sums(logits, slope, with_moment)
    peaks = tops.amax(-1, keepdim=True)
    shifts = slope * peaks.double() - PEAK
    powers = torch.add(-shifts, tops.double(), alpha=slope)
    scales = powers.exp2()
    if moments is not None:
        moments.addcmul_(sums, powers.clamp_min_(NOTHING)).mul_(scales)
    return peaks, shifts, sums.mul_(scales), moments


def relative_sums(
    logits: Tensor, slope: float, with_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the largest logit of each block, and sums and moments of the weights relative to it.

    `block_sums_kernel` defines these weights.

    Args:
        logits: as for `block_sums`.
        slope: factor of the logits in the exponents of the weights.
        with_moment: whether to compute the moments.

    Returns:
        Largest logits, float32 [P, B]; sums, float64 [P, B]; moments, float64 [P, B], or None.
    """
    tops = logits.new_empty(logits.shape[0], logits.shape[1] // BLOCK, dtype=torch.float32)
    sums = torch.empty_like(tops, dtype=torch.float64)
    moments = torch.empty_like(sums) if with_moment else None
    if count := tops.numel():
        # Triton launches on the current device, which may be another one than that of the logits.
        with torch.cuda.device_of(logits):
            block_sums_kernel[(triton.cdiv(count, _AT_ONCE),)](
                logits,
                tops,
                sums,
                sums if moments is None else moments,
                count,
                slope,
                WITH_MOMENT=with_moment,
                BLOCK=BLOCK,
                AT_ONCE=_AT_ONCE,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return tops, sums, moments


@triton.jit
def block_sums_kernel(
    logits_ptr,
    tops_ptr,
    sums_ptr,
    moments_ptr,
    count,
    slope,
    WITH_MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Compute the largest logit (infinity if one is NaN), sum and moment of a few blocks.

    With w = 2 ** (slope * (logit - largest)), the sum adds w and the moment adds w * log2(w), in
    float64. Weights below 2**-64 count as 2**-64, which is rounded to 0.
    """
    infinity = float("inf")
    block = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = block < count
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logit = tl.load(logits_ptr + index, mask=inside[:, None], other=0.0).to(tl.float32)
    logit = tl.where(logit == logit, logit, infinity)  # tl.max ignores NaN
    top = tl.max(logit, 1)
    base = tl.where(tl.abs(top) < infinity, top, 0.0)  # avoids inf - inf
    power = (logit - base[:, None]) * slope
    power = tl.minimum(tl.maximum(power, -64.0), 0.0)
    whole = tl.floor(power + 0.5)
    x = power - whole
    weight = 0.1535920892e-3  # 2 ** x for |x| <= 0.5, as in block_sums.c
    weight = weight * x + 0.1339262701e-2
    weight = weight * x + 0.9618384764e-2
    weight = weight * x + 0.5550347269e-1
    weight = weight * x + 0.2402264476e0
    weight = weight * x + 0.6931471825e0
    weight = weight * x + 1.0
    weight *= ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(tops_ptr + block, top, mask=inside)
    tl.store(sums_ptr + block, tl.sum(_on_grid(weight), 1), mask=inside)
    if WITH_MOMENT:
        tl.store(moments_ptr + block, tl.sum(_on_grid(weight * power), 1), mask=inside)


@triton.jit
def _on_grid(x):
    """Round float32 numbers to multiples of 2**-45, and convert them to float64."""
    shift = 1.5 * 2.0**-21  # numbers of this size are multiples of 2**-44
    return tl.where(tl.abs(x) < 2.0**-22, (x + shift) - shift, x).to(tl.float64)


def is_accurate(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether sums and moments of random logits are within `TOLERANCE` of float64."""
    single = torch.float32
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 4096, generator=generator, dtype=single, device="cpu")
    logits *= torch.logspace(-3, 2, 64, dtype=single, device="cpu")[:, None]
    logits[1::2, 2048:2100] = -torch.inf
    logits = logits.to(device, dtype)
    every = torch.arange(logits.numel() // BLOCK, device=device)
    for exponent, with_moment in ((0.7, False), (1.0, True)):
        peaks, shifts, sums, moments = block_sums(logits, exponent, with_moment)
        exact = Blocks(logits, shifts, sums, exponent).weights_in(every).view(*sums.shape, BLOCK)
        powers = exact.log2().clamp_min(NOTHING)
        errors = (sums - exact.sum(-1)).abs() - TOLERANCE * exact.sum(-1)
        if moments is not None:
            allowed = TOLERANCE * (exact * (1 + powers.abs())).sum(-1)
            errors = errors.maximum((moments - (exact * powers).sum(-1)).abs() - allowed)
        # NaN fails
        if not (peaks.equal(logits.float().amax(-1, keepdim=True)) and bool((errors <= 0).all())):
            return False
    return True
