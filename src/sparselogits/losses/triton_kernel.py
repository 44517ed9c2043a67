"""The kernel of `triton_rows.py`.

A program owns a row. It reads the stored ids' logits, runs once over the row for maximum and sums
(online), once more to write the gradient, and last writes the stored ids' entries, whose sparse
corrections it holds in registers: no atomics, one rounding, the same bits every time.
"""

# Triton reads the source of these functions: its arguments cannot be annotated, its constants are
# upper case, and only what it knows may be named.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _transform(a, scale, cap, HAS_CAP: tl.constexpr):
    z = a * scale
    if HAS_CAP:
        shrunk = tl.exp(-2.0 * tl.abs(z / cap))
        bounded = (1.0 - shrunk) / (1.0 + shrunk)
        z = cap * tl.where(z < 0, -bounded, bounded)
    return z


@triton.jit
def _slope(z, scale, cap, HAS_CAP: tl.constexpr):
    """dz/da at the transformed logit z."""
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
    """Losses of one row, and its gradient in place of (or beside) its logits.

    Names as in `rows.py`; `1` marks what belongs to the label's softmax at temperature 1 where the
    target's has another.
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
    if HAS_GHOST:  # take the stored ids out of the row
        tl.debug_barrier()
        tl.store(logits_ptr + ids, tl.full((BLOCK_E,), -infinity, tl.float32), mask=stored)
        tl.debug_barrier()

    # one run over the row: maximum and sums, rescaled whenever the maximum grows
    pivot = -infinity
    rest = 0.0
    rest1 = 0.0
    total = 0.0
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        a = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, _transform(a, scale, cap, HAS_CAP), -infinity)
        if HAS_GHOST:  # what was taken out stays out, though the cap would make it -cap
            z = tl.where(a == -infinity, -infinity, z)
        higher = tl.maximum(pivot, tl.max(z, 0))
        base = tl.where(higher == -infinity, 0.0, higher)  # all -inf so far: avoid inf - inf
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
        kd_weight = (1.0 - alpha) * cold * weight
        ce_weight = alpha * weight
        push = kd_weight * mass  # of s at the target's temperature
        push1 = 0.0  # of s at temperature 1, where that is another
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

        # entries at stored ids, and at the label where it is not stored
        at_stored = push * tl.exp(values * cold) / whole_sum - kd_weight * spread
        for other in range(0, E):
            other_id = tl.load(ids_ptr + row * E + other)
            other_weight = tl.load(weights_ptr + row * E + other)
            at_stored -= tl.where(ids == other_id, kd_weight * other_weight, 0.0)
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
            # (the stored ids of a ghost class are written below, whatever is written here)
            g = share * tl.exp((z - pivot) * cold) - kd_weight * spread
            if TWO_TEMPERATURES:
                g += share1 * tl.exp(z - pivot)
            if WITH_CE:
                g -= tl.where(column == label, ce_weight, 0.0)
            g *= _slope(z, scale, cap, HAS_CAP)
            tl.store(gradient_ptr + column, g, mask=inside)
        tl.debug_barrier()  # the row is written by all threads: the last word has the stored ids
        tl.store(gradient_ptr + ids, at_stored, mask=stored)
