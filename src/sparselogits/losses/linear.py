"""The sparse loss of a linear head, or of logits, as one call in eager mode and one compiled.

Under `torch.compile` the work is one opaque operator, so that its memory and its order of
additions are those of eager mode, and the number of chunks does not enter the graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparselogits.losses.chunked import (
    ChunkLosses,
    LossAndGradients,
    SparseLosses,
    kept_dtype,
    logits_loss_and_gradients,
    loss_and_gradients,
)
from sparselogits.losses.criterion import Criterion
from sparselogits.losses.targets import RowTargets


class Plan(NamedTuple):
    """What a call is to do besides its tensors: plain values, which an operator's schema can hold.

    Attributes:
        alpha, logit_scale, logit_softcap, temperature: of the criterion; its missing-mass rule has
            been applied to the targets.
        with_ce: compute the label's part too.
        needs_input, needs_weight, needs_bias: gradients to form.
        chunk_rows: rows whose logits exist at a time; None chooses.
        impl: "chunked" or "triton".
    """

    alpha: float
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    with_ce: bool
    needs_input: bool
    needs_weight: bool
    needs_bias: bool
    chunk_rows: int | None
    impl: str


def sparse_loss(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    targets: RowTargets,
    plan: Plan,
) -> LossAndGradients:
    """Loss sums and gradients, without autograd.

    Args:
        input: [N, D], or logits [N, V] if `weight` is None.
        weight: [V, D] or None.
        bias: [V] or None.
        targets: of the N rows.
        plan: what to compute.
    """
    with torch.no_grad():
        if not torch.compiler.is_compiling():
            return _run(input, weight, bias, targets, plan)
        kd, ce, *gradients = _operator(input, weight, bias, *targets, *plan)
        wanted = (plan.needs_input, plan.needs_weight, plan.needs_bias)
        return LossAndGradients(
            kd, ce, *(g if wants else None for g, wants in zip(gradients, wanted, strict=True))
        )


def _run(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    targets: RowTargets,
    plan: Plan,
) -> LossAndGradients:
    criterion = Criterion(
        alpha=plan.alpha,
        logit_scale=plan.logit_scale,
        logit_softcap=plan.logit_softcap,
        temperature=plan.temperature,
    )
    losses_of: ChunkLosses = SparseLosses(targets, criterion, plan.with_ce)
    if plan.impl == "triton":
        from sparselogits.losses.triton_rows import TritonLosses

        losses_of = TritonLosses(targets, criterion, plan.with_ce)
    with torch.autocast(input.device.type, enabled=False):
        if weight is None:
            return logits_loss_and_gradients(
                input,
                targets.row_weight,
                losses_of,
                needs_grad=plan.needs_input,
                chunk_rows=plan.chunk_rows,
            )
        return loss_and_gradients(
            input,
            weight,
            bias,
            targets.row_weight,
            losses_of,
            needs=(plan.needs_input, plan.needs_weight, plan.needs_bias),
            chunk_rows=plan.chunk_rows,
        )


@torch.library.custom_op("sparselogits::linear_sparse_loss", mutates_args=())
def _operator(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    row_weight: Tensor,
    mass: Tensor,
    label: Tensor | None,
    ghost: Tensor | None,
    spread: Tensor | None,
    alpha: float,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
    with_ce: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    chunk_rows: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (needs_input, needs_weight, needs_bias)
    transform = (alpha, logit_scale, logit_softcap, temperature)
    targets = RowTargets(ids, weights, row_weight, mass, label, ghost, spread)
    result = _run(input, weight, bias, targets, Plan(*transform, with_ce, *needs, chunk_rows, impl))
    d_input, d_weight, d_bias = (
        input.new_empty(0) if g is None else g for g in (result.input, result.weight, result.bias)
    )
    return result.kd, result.ce, d_input, d_weight, d_bias


@_operator.register_fake
def _shapes(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, row_weight, plan = arguments[:3], arguments[5], Plan(*arguments[-len(Plan._fields) :])
    input = tensors[0]  # noqa: A001
    wanted = (plan.needs_input, plan.needs_weight, plan.needs_bias)
    gradients = (
        torch.empty_like(t, dtype=kept_dtype(input.dtype)) if wants else input.new_empty(0)
        for t, wants in zip(tensors, wanted, strict=True)
    )
    return row_weight.new_empty(()), row_weight.new_empty(()), *gradients
