"""Check the tensors of one call of a loss, and attach the finished gradients to them.

Every loss begins with `prepare` and ends with `Call.finish`. Sums and gradients are computed in
between, without autograd. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselogits.errors import InvalidArgumentError, InvalidTargetsError
from sparselogits.losses.criterion import Criterion, Reduction
from sparselogits.losses.targets import RowTargets, accumulation_dtype, place_missing_mass


class LossParts(NamedTuple):
    """Hold a loss and its two parts, for logging.

    Attributes:
        loss: (1 - alpha) * kd + alpha * ce, 0-dimensional, with its gradient.
        kd: cross-entropy to the target (for dense losses the divergence), reduced like the loss;
            0-dimensional, detached.
        ce: cross-entropy to the label, likewise, whatever alpha is; None without labels.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor | None


class Operands(NamedTuple):
    """Hold the tensors that logits are computed from, which are those that receive gradients.

    Attributes:
        input: hidden states [..., D], or logits [..., V] if there is no weight.
        weight: the head [V, D], or a slice of it; None if `input` holds logits.
        bias: [V] or None.
    """

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class LossAndGradients(NamedTuple):
    """Hold sums over rows, weighted but not divided, and gradients of (1 - alpha) kd + alpha ce.

    Attributes:
        kd: 0-dimensional sum.
        ce: 0-dimensional sum.
        gradients: with respect to each of the `Operands`; None where none was asked for.
    """

    kd: Tensor
    ce: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Call:
    """Hold the checked tensors of one call, with N rows.

    Args:
        operands: input with N rows; all three are cast as autocast would cast them.
        ids: int64 [N, K].
        weights: [N, K], as given.
        row_weight: [N], in the dtype to accumulate in; 0 where a row adds nothing.
        label: int64 [N], 0 where ignored; None without labels.
        factor: 0-dimensional factor of the sums over rows.
        criterion: the options.
    """

    operands: Operands
    ids: Tensor
    weights: Tensor
    row_weight: Tensor
    label: Tensor | None
    factor: Tensor
    criterion: Criterion

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Whether input, weight and bias need a gradient; read it while gradients are recorded."""
        input, weight, bias = self.operands  # noqa: A001
        return _needs(input), _needs(weight), _needs(bias)

    def targets(self, vocab_size: int) -> RowTargets:
        """Return the targets, with the missing mass placed among `vocab_size` ids."""
        return place_missing_mass(
            self.ids,
            self.weights,
            self.row_weight,
            self.label,
            self.criterion.missing_mass,
            vocab_size,
        )

    def finish(self, sums: LossAndGradients, *, with_ce: bool) -> LossParts:
        """Return the loss, attached to the operands that its gradients belong to.

        Args:
            sums: sums over rows and their gradients.
            with_ce: whether `sums.ce` was computed.
        """
        alpha = self.criterion.alpha
        kd, ce = sums.kd * self.factor, sums.ce * self.factor
        # with alpha = 0 the label's part serves logging only: an infinite one must not reach loss
        loss = kd.clone() if alpha == 0.0 else (1.0 - alpha) * kd + alpha * ce
        if any(gradient is not None for gradient in sums.gradients):
            loss = _Attach.apply(  # type: ignore[no-untyped-call]
                loss, self.factor, *self.operands, *sums.gradients
            )
        return LossParts(loss, kd, ce if with_ce else None)


def prepare(
    operands: Operands,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    position_weights: Tensor | None,
    criterion: Criterion,
) -> Call:
    """Check the tensors of a call and convert them; shapes as in `linear_sparse_cross_entropy`.

    Raises:
        InvalidArgumentError: If shapes or dtypes do not fit, or labels are needed and missing.
        InvalidTargetsError: If targets have the wrong shape or dtype.
    """
    criterion.require_labels(labels is not None)
    if operands.weight is not None:
        _check_linear(operands.input, operands.weight, operands.bias)
    _check_targets(operands.input, ids, weights, labels, position_weights)
    x, weight, bias = _as_autocast_would(operands)
    x = x.flatten(0, -2)
    dtype = accumulation_dtype(x.dtype)
    if position_weights is None:
        row_weight = torch.ones(x.shape[0], dtype=dtype, device=x.device)
    else:
        row_weight = position_weights.flatten().to(dtype)
    label = None
    if labels is not None:
        label = labels.flatten()
        counted = label != criterion.ignore_index
        row_weight, label = torch.where(counted, row_weight, 0.0), torch.where(counted, label, 0)
    return Call(
        Operands(x, weight, bias),
        ids.flatten(0, -2),
        weights.flatten(0, -2),
        row_weight,
        label,
        reduction_factor(row_weight, criterion.reduction),
        criterion,
    )


def reduction_factor(row_weight: Tensor, reduction: Reduction) -> Tensor:
    """Return the factor of sums over rows: one over the sum of weights, or 1 if no row counts."""
    if reduction == "sum":
        return row_weight.new_ones(())
    total = row_weight.sum()
    return torch.where(total == 0, 1.0, total).reciprocal()


def _needs(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def _as_autocast_would(operands: Operands) -> Operands:
    """Cast as autocast would for `F.linear`; logits, given without a weight, are not cast."""
    input, weight, bias = operands  # noqa: A001
    device = input.device.type
    if weight is None or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return Operands(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:  # noqa: A002
    """Check that input [..., D], weight [V, D] and bias [V] fit in shape and dtype."""
    if hasattr(weight, "placements"):
        raise InvalidArgumentError(
            "linear_weight is a sharded DTensor, and the loss needs a whole tensor: compute the "
            "loss inside the wrapped module's forward, where FSDP has gathered it (or use "
            "register_fsdp_forward_method), or pass this rank's slice to "
            "vocabulary_parallel_sparse_cross_entropy"
        )
    if input.dim() < 2 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise InvalidArgumentError(
            "input [..., D] and linear_weight [V, D] do not fit: found "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidArgumentError(
            f"linear_bias must have shape {tuple(weight.shape[:1])}, found {tuple(bias.shape)}"
        )
    autocast = torch.is_autocast_enabled(input.device.type)
    others = (weight,) if bias is None else (weight, bias)
    if not autocast and any(t.dtype != input.dtype for t in others):
        raise InvalidArgumentError(
            f"input is {input.dtype}, linear_weight {weight.dtype}"
            + ("" if bias is None else f", linear_bias {bias.dtype}")
            + ": convert them to one dtype, or use torch.autocast"
        )


def _check_targets(
    input: Tensor,  # noqa: A002
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    position_weights: Tensor | None,
) -> None:
    """Check for targets [..., K] and one label and weight per row of input [..., D]."""
    lead = tuple(input.shape[:-1])
    if not lead:
        raise InvalidArgumentError(f"expected rows [..., D], found {tuple(input.shape)}")
    if tuple(ids.shape[:-1]) != lead or ids.shape != weights.shape:
        raise InvalidTargetsError(
            f"target_ids and target_weights must both have shape {(*lead, 'K')}, found "
            f"{tuple(ids.shape)} and {tuple(weights.shape)}"
        )
    if ids.dtype != torch.int64 or not weights.is_floating_point():
        raise InvalidTargetsError(
            "target_ids must be int64 and target_weights floating-point, found "
            f"{ids.dtype} and {weights.dtype}"
        )
    for name, tensor in (("labels", labels), ("position_weights", position_weights)):
        if tensor is not None and tuple(tensor.shape) != lead:
            raise InvalidArgumentError(
                f"{name} must have shape {lead}, one per row, found {tuple(tensor.shape)}"
            )


class _Attach(torch.autograd.Function):
    """Give a loss the gradients that exist already; backward scales them.

    Backward scales in place, so that no second set of gradients is allocated. A second backward
    over the same graph finds the saved tensors changed, and autograd raises.
    """

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
