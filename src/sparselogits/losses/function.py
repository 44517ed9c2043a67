"""Autograd for gradients that exist already: forward has formed them, backward scales them.

Backward scales in place, so no second set of gradients is ever allocated; a second backward over
the same graph finds the saved tensors changed, and autograd raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselogits.losses.chunked import LossAndGradients


class LossParts(NamedTuple):
    """A loss and what it is made of, for logging; nothing here waits for the device.

    Attributes:
        loss: (1 - alpha) * kd + alpha * ce, with its gradient; 0-dimensional.
        kd: cross-entropy to the target, reduced like the loss; detached.
        ce: cross-entropy to the label, likewise, whatever alpha; None without labels.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor | None


def needed(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[bool, bool, bool]:
    """Which of the three a gradient will be asked for."""

    def wants(tensor: Tensor | None) -> bool:
        return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad

    return wants(input), wants(weight), wants(bias)


def finish(
    result: LossAndGradients,
    alpha: float,
    factor: Tensor,
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    with_ce: bool,
) -> LossParts:
    """The loss, tied to the tensors that its gradients belong to.

    Args:
        result: sums over rows, and gradients of (1 - alpha) kd + alpha ce.
        alpha: share of ce.
        factor: 0-dimensional, what all of it is multiplied by (one over the sum of weights).
        input: tensor of `result.input`.
        weight: tensor of `result.weight`.
        bias: tensor of `result.bias`.
        with_ce: whether `result.ce` means anything.

    Returns:
        loss, with a gradient where one was formed; kd and ce, without.
    """
    kd, ce = result.kd * factor, result.ce * factor
    # at alpha = 0 the label's part, computed for logging only, must not bring in its inf
    loss = kd.clone() if alpha == 0.0 else (1.0 - alpha) * kd + alpha * ce
    if any(g is not None for g in (result.input, result.weight, result.bias)):
        loss = _Attach.apply(  # type: ignore[no-untyped-call]
            loss, factor, input, weight, bias, result.input, result.weight, result.bias
        )
    return LossParts(loss, kd, ce if with_ce else None)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        factor: Tensor,
        input: Tensor,  # noqa: A002
        weight: Tensor | None,
        bias: Tensor | None,
        *gradients: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(factor, *gradients)
        ctx.dtype = input.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        factor = factor * d_loss
        # a compiler plans memory itself, and does not let saved tensors change
        in_place = not torch.compiler.is_compiling()
        scaled = (
            None if g is None else (g.mul_(factor) if in_place else g * factor).to(ctx.dtype)
            for g in gradients
        )
        return None, None, *scaled, None, None, None
