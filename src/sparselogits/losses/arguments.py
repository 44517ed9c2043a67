"""From a call's arguments to tensors that a loss can work on: checked, cast, one row a position.

Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError, InvalidTargetsError
from sparselogits.losses.chunked import accumulation_dtype
from sparselogits.losses.criterion import Criterion, MissingMass, Reduction
from sparselogits.losses.targets import RowTargets, place_missing_mass, row_weights


@dataclass(frozen=True)
class Arguments:
    """A call's tensors over its N rows.

    Args:
        input: hidden states [N, D], or logits [N, V] without a weight; cast as autocast would.
        weight: the head [V, D], or a slice of it, likewise.
        bias: [V] or None, likewise.
        ids: int64 [N, K].
        weights: [N, K], as given.
        row_weight: [N] in the dtype to accumulate in, 0 where a row adds nothing.
        label: int64 [N], 0 where ignored; None without labels.
        factor: 0-dimensional, what sums over rows are multiplied by.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    ids: Tensor
    weights: Tensor
    row_weight: Tensor
    label: Tensor | None
    factor: Tensor

    def targets(self, rule: MissingMass, vocab_size: int) -> RowTargets:
        """The targets, their missing mass placed among `vocab_size` ids."""
        return place_missing_mass(
            self.ids, self.weights, self.row_weight, self.label, rule, vocab_size
        )


def prepare(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    position_weights: Tensor | None,
    criterion: Criterion,
) -> Arguments:
    """Check and convert; shapes as in `linear_sparse_cross_entropy`, logits if no weight is given.

    Raises:
        InvalidArgumentError: what does not fit, or labels that the criterion needs and lacks.
        InvalidTargetsError: targets of the wrong shape or dtype.
    """
    criterion.require_labels(labels is not None)
    if weight is not None:
        check_linear(input, weight, bias)
    check_targets(input, ids, weights, labels, position_weights)
    x, weight, bias = as_autocast_would(input, weight, bias)
    x = x.flatten(0, -2)
    row_weight, label = row_weights(
        x,
        None if labels is None else labels.flatten(),
        None if position_weights is None else position_weights.flatten(),
        criterion.ignore_index,
        accumulation_dtype(x.dtype),
    )
    ids, weights = ids.flatten(0, -2), weights.flatten(0, -2)
    factor = reduction_factor(row_weight, criterion.reduction)
    return Arguments(x, weight, bias, ids, weights, row_weight, label, factor)


def reduction_factor(row_weight: Tensor, reduction: Reduction) -> Tensor:
    """What sums over rows are multiplied by; where no row counts the sum is 0 already."""
    if reduction == "sum":
        return row_weight.new_ones(())
    total = row_weight.sum()
    return torch.where(total == 0, 1.0, total).reciprocal()


def as_autocast_would(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cast as autocast would for `F.linear`; logits, given without a weight, stay as they are."""
    device = input.device.type
    if weight is None:
        return input, None, None
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return input, weight, bias


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:  # noqa: A002
    """Insist that input [..., D], weight [V, D] and bias [V] fit in shape and dtype."""
    if hasattr(weight, "placements"):
        raise InvalidArgumentError(
            "linear_weight is a sharded DTensor: compute the loss inside the wrapped module's "
            "forward, where FSDP has gathered it (or register_fsdp_forward_method), or pass this "
            "rank's slice to vocabulary_parallel_sparse_cross_entropy"
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


def check_targets(
    input: Tensor,  # noqa: A002
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    position_weights: Tensor | None,
) -> None:
    """Insist on targets [..., K] and one label and weight per row of input [..., D]."""
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
            "target_ids must be int64 and target_weights floating, found "
            f"{ids.dtype} and {weights.dtype}"
        )
    for name, tensor in (("labels", labels), ("position_weights", position_weights)):
        if tensor is not None and tuple(tensor.shape) != lead:
            raise InvalidArgumentError(
                f"{name} must have shape {lead}, one per row, found {tuple(tensor.shape)}"
            )
