"""Validate the tensors of one call of a loss, and attach the computed gradients to the loss.

Every loss in this package starts with `prepare`. All but the reference compute sums and gradients
without autograd, and end with `Call.finish`. No function here synchronises with the device.
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
    """A loss and its two parts, for logging.

    All are 0-dimensional, in float32, or in float64 for float64 input.

    Attributes:
        loss: (1 - alpha) * kd + alpha * ce, differentiable.
        kd: cross-entropy to the target, or for a dense loss the divergence; reduced like the loss,
            detached.
        ce: cross-entropy to the label for any alpha; reduced like the loss, detached. None without
            labels, or if alpha is 0 and ce is not requested.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor | None


class Operands(NamedTuple):
    """Tensors from which logits are computed and to which gradients flow.

    Attributes:
        input: hidden states [..., D], or logits [..., V] if `weight` is None.
        weight: head [V, D], or a slice of it; None if `input` contains logits.
        bias: bias [V] of the head; None for no bias.
    """

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class LossAndGradients(NamedTuple):
    """Weighted loss sums over rows, before the reduction, and gradients of the mixed loss.

    Attributes:
        kd: sum of row_weight * kd, 0-dimensional.
        ce: sum of row_weight * ce, 0-dimensional; 0 if ce is not computed.
        gradients: gradients of the sum of row_weight * ((1 - alpha) kd + alpha ce) with respect to
            the `Operands`; None for those not requested.
    """

    kd: Tensor
    ce: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Call:
    """Validated tensors of one call, with N rows.

    Args:
        operands: operands after the casts of autocast; the input has N rows.
        ids: target ids, int64 [N, K].
        weights: target weights [N, K], in the dtype given.
        row_weight: [N], in the accumulation dtype; 0 for rows excluded from the loss.
        label: int64 or int32 [N], 0 for ignored rows; None without labels.
        factor: 0-dimensional; the reduction multiplies sums over rows by this factor.
        criterion: options of the loss.
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
        """Whether input, weight and bias require a gradient in the current grad mode."""
        input, weight, bias = self.operands  # noqa: A001
        return _needs(input), _needs(weight), _needs(bias)

    def targets(self, vocab_size: int) -> RowTargets:
        """Return the targets after the missing-mass rule is applied, for a student's vocabulary."""
        rule = self.criterion.missing_mass
        return place_missing_mass(
            self.ids, self.weights, self.row_weight, self.label, rule, vocab_size
        )

    def finish(self, sums: LossAndGradients, *, with_ce: bool) -> LossParts:
        """Return the reduced loss with gradients attached, and its parts; `with_ce` includes ce."""
        alpha = self.criterion.alpha
        kd, ce = sums.kd * self.factor, sums.ce * self.factor
        # A part of weight 0 is only logged: it may be infinite, and 0 * inf would be NaN.
        if alpha in (0.0, 1.0):
            loss = (ce if alpha else kd).clone()
        else:
            loss = (1.0 - alpha) * kd + alpha * ce
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
    """Validate and convert the tensors of a call; see `linear_sparse_cross_entropy`.

    Raises:
        InvalidArgumentError: shapes or dtypes do not match, the weight is sharded, or labels are
            required and missing.
        InvalidTargetsError: targets have a wrong shape or dtype.
    """
    criterion.require_labels(labels is not None)
    operands = _as_autocast_would(operands)
    if operands.weight is not None:
        _check_linear(operands.input, operands.weight, operands.bias)
    _check_targets(operands.input, ids, weights, labels, position_weights)
    x, weight, bias = operands
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
    """Return the factor by which a reduction multiplies sums over rows, 0-dimensional.

    For "mean" it is one over the sum of row weights, or 1 if that sum is 0; for "sum" it is 1.
    """
    if reduction == "sum":
        return row_weight.new_ones(())
    total = row_weight.sum()
    return torch.where(total == 0, 1.0, total).reciprocal()


def _needs(tensor: Tensor | None) -> bool:
    """Return whether a tensor requires a gradient in the current grad mode."""
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def _as_autocast_would(operands: Operands) -> Operands:
    """Cast operands to the dtype of autocast if it is enabled; logits and float64 are not cast."""
    device = operands.input.device.type
    if operands.weight is None or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    cast = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in operands)
    return Operands(*cast)  # type: ignore[arg-type]


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:  # noqa: A002
    """Validate that input [..., D], weight [V, D] and bias [V] match, and no weight is sharded."""
    if hasattr(weight, "placements"):
        raise InvalidArgumentError(
            "linear_weight is a sharded DTensor, and the loss requires a whole tensor: compute the "
            "loss inside the wrapped module's forward, where FSDP has gathered it (or use "
            "register_fsdp_forward_method), or pass this rank's slice to "
            "vocabulary_parallel_sparse_cross_entropy"
        )
    if input.dim() < 2 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise InvalidArgumentError(
            "expected input [..., D] and linear_weight [V, D] of the same D, found shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}: pass the head and its input"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidArgumentError(
            f"linear_bias must have shape {tuple(weight.shape[:1])}, found {tuple(bias.shape)}: "
            "pass the bias of the same head"
        )
    others = (weight,) if bias is None else (weight, bias)
    if any(t.dtype != input.dtype for t in others):
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
    """Validate the dtypes of targets and labels, and that shapes match the rows of input [..., D].

    Targets are [..., K], labels and position weights [...].
    """
    lead = tuple(input.shape[:-1])
    if not lead:
        raise InvalidArgumentError(
            "expected input of at least two dimensions [..., D], found shape "
            f"{tuple(input.shape)}: add a dimension of rows"
        )
    if tuple(ids.shape[:-1]) != lead or ids.shape != weights.shape:
        raise InvalidTargetsError(
            f"target_ids and target_weights must both have shape {(*lead, 'K')}, found "
            f"{tuple(ids.shape)} and {tuple(weights.shape)}: pass the targets of these rows, padded"
        )
    if ids.dtype != torch.int64 or not weights.is_floating_point():
        raise InvalidTargetsError(
            "target_ids must be int64 and target_weights floating-point, found "
            f"{ids.dtype} and {weights.dtype}: convert them"
        )
    for name, tensor in (("labels", labels), ("position_weights", position_weights)):
        if tensor is not None and tuple(tensor.shape) != lead:
            raise InvalidArgumentError(
                f"{name} must have shape {lead}, found {tuple(tensor.shape)}: pass one per row"
            )
    if labels is not None and labels.dtype not in (torch.int64, torch.int32):
        raise InvalidArgumentError(
            f"labels must be int64 or int32, found {labels.dtype}: pass token ids"
        )


class _Attach(torch.autograd.Function):
    """Autograd function that attaches computed gradients to a loss; backward scales them.

    Except under `torch.compile`, backward scales in place to save memory; in a second backward pass
    over the same graph, autograd then detects that the saved tensors have changed and raises.
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
        # torch.compile plans memory itself and forbids changes of saved tensors
        in_place = not torch.compiler.is_compiling()
        scaled = (
            None if g is None else (g.mul_(factor) if in_place else g * factor).to(ctx.dtype)
            for g in gradients
        )
        return None, None, *scaled, None, None, None
