"""Compute the loss of a chunk of rows in one Triton kernel on CUDA; `rows.py` uses PyTorch.

One program computes one row: the program reads the logits of the stored ids, passes over the row
once for maximum and sums (online softmax) and once more to write the gradient, and writes the
entries at the stored ids last, with sparse corrections. Results are bitwise reproducible on one
device, because the kernel uses no atomics.

The kernel computes in float32; for float64 use the implementation "chunked". On a CPU the kernel
runs, slowly, in Triton's interpreter (TRITON_INTERPRET=1).
"""

# Triton parses the source of the kernel's functions: arguments cannot be annotated, constants are
# upper case, and only names known to Triton may be used.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError, MissingDependencyError
from sparselogits.losses.criterion import Criterion
from sparselogits.losses.targets import RowTargets

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingDependencyError(
        "impl='triton' requires the package triton, which is not installed: pip install "
        "'sparselogits[triton]', or use impl='chunked'"
    ) from error


@dataclass(frozen=True)
class TritonLosses:
    """Implementation of `chunked.ChunkLosses` for sparse targets, with one kernel launch per chunk.

    Raises:
        InvalidArgumentError: the input is float64.
    """

    targets: RowTargets
    criterion: Criterion
    with_ce: bool

    def __post_init__(self) -> None:
        if self.targets.row_weight.dtype != torch.float32:
            raise InvalidArgumentError(
                "impl='triton' computes in float32, and the input is float64: use impl='chunked'"
            )

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted loss sums of some rows; see `chunked.ChunkLosses`."""
        t, c = self.targets.rows(rows), self.criterion
        kd, ce = torch.empty_like(t.row_weight), torch.zeros_like(t.row_weight)
        ids, weights = t.ids.contiguous(), t.weights.contiguous()
        unused = t.row_weight
        block = min(8192, triton.next_power_of_2(logits.shape[1]))
        row_loss_kernel[(logits.shape[0],)](
            logits,
            logits if gradient is None else gradient,
            ids,
            weights,
            t.row_weight,
            t.mass,
            unused if t.label is None else t.label,
            unused if t.ghost is None else t.ghost,
            unused if t.spread is None else t.spread,
            kd,
            ce,
            logits.stride(0),
            logits.stride(0) if gradient is None else gradient.stride(0),
            logits.shape[1],
            ids.shape[1],
            float(c.alpha),
            float(c.logit_scale),
            float(c.logit_softcap or 1.0),
            float(c.temperature),
            WITH_GRAD=gradient is not None,
            WITH_CE=self.with_ce,
            HAS_GHOST=t.ghost is not None,
            HAS_SPREAD=t.spread is not None,
            HAS_CAP=c.logit_softcap is not None,
            TWO_TEMPERATURES=c.temperature != 1.0 and self.with_ce,
            BLOCK_V=block,
            BLOCK_E=max(16, triton.next_power_of_2(ids.shape[1])),
            num_warps=max(1, min(16, block // 512)),
        )
        weight = t.row_weight
        return weight.dot(kd), weight.dot(ce)


@triton.jit
def _transform(a, scale, cap, HAS_CAP: tl.constexpr):
    """Apply scale and softcap to the raw logit a, and return the result z."""
    z = a * scale
    if HAS_CAP:
        shrunk = tl.exp(-2.0 * tl.abs(z / cap))
        bounded = (1.0 - shrunk) / (1.0 + shrunk)
        z = cap * tl.where(z < 0, -bounded, bounded)
    return z


@triton.jit
def _slope(z, scale, cap, HAS_CAP: tl.constexpr):
    """Return the derivative dz/da at the transformed logit z."""
    slope = scale
    if HAS_CAP:
        slope = scale * (1.0 - (z / cap) * (z / cap))
    return slope


@triton.jit
def row_loss_kernel(
    logits_ptr,
    gradient_ptr,
    ids_ptr,
    weights_ptr,
    row_weight_ptr,
    mass_ptr,
    label_ptr,
    ghost_ptr,
    spread_ptr,
    kd_ptr,
    ce_ptr,
    logits_stride,
    gradient_stride,
    V,
    E,
    alpha,
    scale,
    cap,
    temperature,
    WITH_GRAD: tl.constexpr,
    WITH_CE: tl.constexpr,
    HAS_GHOST: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute the losses of one row, and write its gradient over its logits or to a buffer.

    Most names are those of `rows.py`. Names that end in 1 belong to the label's softmax at
    temperature 1 if the target's softmax has another temperature.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    infinity = float("inf")
    cold = 1.0 / temperature

    # the stored ids, before anything is overwritten
    entry = tl.arange(0, BLOCK_E)
    ids = tl.load(ids_ptr + row * E + entry, mask=entry < E, other=0)
    weights = tl.load(weights_ptr + row * E + entry, mask=entry < E, other=0.0)
    stored = weights != 0
    raw = tl.load(logits_ptr + ids, mask=stored, other=0.0).to(tl.float32)
    values = _transform(raw, scale, cap, HAS_CAP)
    label = row
    label_value = 0.0
    if WITH_CE:
        label = tl.load(label_ptr + row)
        raw_label = tl.load(logits_ptr + label).to(tl.float32)
        label_value = _transform(raw_label, scale, cap, HAS_CAP)
    if HAS_GHOST:  # exclude the stored ids from the pass over the row
        tl.debug_barrier()
        tl.store(logits_ptr + ids, tl.full((BLOCK_E,), -infinity, tl.float32), mask=stored)
        tl.debug_barrier()

    # one pass over the row: maximum and sums, which are rescaled when the maximum increases
    pivot = -infinity
    rest = 0.0
    rest1 = 0.0
    total = 0.0
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        a = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, _transform(a, scale, cap, HAS_CAP), -infinity)
        if HAS_GHOST:  # ids stay excluded, although the softcap maps -inf to -cap
            z = tl.where(a == -infinity, -infinity, z)
        higher = tl.maximum(pivot, tl.max(z, 0))
        base = tl.where(higher == -infinity, 0.0, higher)  # avoids inf - inf
        drop = tl.where(pivot == -infinity, 0.0, pivot - base)
        rest = rest * tl.exp(drop * cold) + tl.sum(tl.exp((z - base) * cold), 0)
        if TWO_TEMPERATURES:
            rest1 = rest1 * tl.exp(drop) + tl.sum(tl.exp(z - base), 0)
        if HAS_SPREAD:
            total += start * drop + tl.sum(tl.where(inside, z - base, 0.0), 0)
        pivot = higher

    top = pivot
    if HAS_GHOST:
        top = tl.maximum(pivot, tl.max(tl.where(stored, values, -infinity), 0))
        pivot = tl.where(pivot == -infinity, top, pivot)
    values = tl.where(stored, values - top, 0.0)
    whole_sum = rest * tl.exp((pivot - top) * cold)
    whole_sum1 = rest1 * tl.exp(pivot - top)
    if HAS_GHOST:
        whole_sum += tl.sum(tl.where(stored, tl.exp(values * cold), 0.0), 0)
        whole_sum1 += tl.sum(tl.where(stored, tl.exp(values), 0.0), 0)
    log_sum = tl.log(whole_sum)
    log_sum1 = log_sum
    if TWO_TEMPERATURES:
        log_sum1 = tl.log(whole_sum1)

    mass = tl.load(mass_ptr + row)
    kd = -tl.sum(tl.where(stored, weights * values * cold, 0.0), 0)
    spread = 0.0
    ghost = 0.0
    if HAS_SPREAD:
        spread = tl.load(spread_ptr + row)
        kd -= spread * total * cold
    if HAS_GHOST:
        missing = tl.load(ghost_ptr + row)
        ghost = tl.where(rest == 0, 0.0, missing)
        mass -= missing - ghost
        log_rest = tl.log(rest) + (pivot - top) * cold
        kd -= tl.where(ghost == 0, 0.0, ghost * log_rest)
    kd += mass * log_sum
    tl.store(kd_ptr + row, kd)
    if WITH_CE:
        tl.store(ce_ptr + row, log_sum1 - (label_value - top))

    if WITH_GRAD:
        weight = tl.load(row_weight_ptr + row)
        distils = alpha != 1.0  # otherwise the target may be NaN
        mass = tl.where(distils, mass, 0.0)
        if HAS_SPREAD:
            spread = tl.where(distils, spread, 0.0)
        if HAS_GHOST:
            ghost = tl.where(distils, ghost, 0.0)
        kd_weight = (1.0 - alpha) * cold * weight
        ce_weight = alpha * weight
        push = kd_weight * mass  # factor of s at the target's temperature
        push1 = 0.0  # factor of s at temperature 1, if the target's is another
        if WITH_CE:
            if TWO_TEMPERATURES:
                push1 = ce_weight
            else:
                push += ce_weight
        share = push * tl.exp((pivot - top) * cold) / whole_sum
        if HAS_GHOST:
            share -= tl.where(ghost == 0, 0.0, kd_weight * ghost / rest)
        share1 = 0.0
        if TWO_TEMPERATURES:
            share1 = push1 * tl.exp(pivot - top) / whole_sum1

        # gradient at the stored ids
        at_stored = push * tl.exp(values * cold) / whole_sum - kd_weight * spread
        for other in range(0, E):
            other_id = tl.load(ids_ptr + row * E + other)
            other_weight = tl.load(weights_ptr + row * E + other)
            repeats = (ids == other_id) & distils
            at_stored -= tl.where(repeats, kd_weight * other_weight, 0.0)
        if TWO_TEMPERATURES:
            at_stored += push1 * tl.exp(values) / whole_sum1
        if WITH_CE:
            at_stored -= tl.where(ids == label, ce_weight, 0.0)
        at_stored *= _slope(values + top, scale, cap, HAS_CAP)

        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            inside = column < V
            a = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
            z = _transform(a, scale, cap, HAS_CAP)
            # with a ghost class, wrong at the stored ids, which are overwritten below
            g = share * tl.exp((z - pivot) * cold) - kd_weight * spread
            if TWO_TEMPERATURES:
                g += share1 * tl.exp(z - pivot)
            if WITH_CE:
                g -= tl.where(column == label, ce_weight, 0.0)
            g *= _slope(z, scale, cap, HAS_CAP)
            tl.store(gradient_ptr + column, g, mask=inside)
        tl.debug_barrier()  # all threads write the row: the stored ids must be written last
        tl.store(gradient_ptr + ids, at_stored, mask=stored)
