"""The loss, as functions: cross-entropy to sparse soft targets, mixed with that to labels.

`linear_sparse_cross_entropy` takes the head's input and weight, so that logits exist one chunk of
rows at a time; `sparse_cross_entropy` takes logits. Both mirror their namesakes in
`torch.nn.functional`, and neither ever holds a teacher tensor as wide as the vocabulary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses.arguments import (
    Reduction,
    as_autocast_would,
    check_linear,
    check_targets,
    reduction_factor,
)
from sparselogits.losses.chunked import accumulation_dtype
from sparselogits.losses.criterion import Criterion, MissingMass
from sparselogits.losses.function import finish, needed
from sparselogits.losses.linear import Plan, sparse_loss
from sparselogits.losses.reference import dense_losses
from sparselogits.losses.targets import place_missing_mass, row_weights

Implementation = Literal["auto", "chunked", "triton", "reference"]


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


class _Options(TypedDict, total=False):
    labels: Tensor | None
    alpha: float
    logit_softcap: float | None
    logit_scale: float
    temperature: float
    position_weights: Tensor | None
    ignore_index: int
    missing_mass: MissingMass
    reduction: Reduction
    impl: Implementation
    chunk_rows: int | None


class _LinearOptions(_Options, total=False):
    linear_bias: Tensor | None


@overload
def linear_sparse_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_LinearOptions],
) -> Tensor: ...


@overload
def linear_sparse_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[_LinearOptions],
) -> LossParts: ...


def linear_sparse_cross_entropy(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    labels: Tensor | None = None,
    alpha: float = 0.0,
    linear_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    position_weights: Tensor | None = None,
    ignore_index: int = -100,
    missing_mass: MissingMass = "drop",
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    chunk_rows: int | None = None,
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Cross-entropy of `softmax(input @ linear_weight.T)` to sparse soft targets and to labels.

    With z the transformed logits of `criterion.py`, t the target after its missing-mass rule, and
    y and w the label and the weight of a row:

        kd = -sum_i t_i log softmax(z / temperature)_i        ce = -log softmax(z)_y
        loss = sum_rows w ((1 - alpha) kd + alpha ce) / sum_rows w

    Gradients flow to `input`, `linear_weight` and `linear_bias` only. "chunked" and "triton" form
    them in the forward pass, so that logits exist one chunk of rows at a time; a second backward
    raises. Ids out of range are an indexing error of the device: check targets where they are read.

    Args:
        input: hidden states [..., D] before the head, any floating dtype.
        linear_weight: the head [V, D]; V may exceed the teacher's vocabulary.
        target_ids: int64 [..., K] in [0, V), distinct among entries of a row that weigh anything.
            K may be 0.
        target_weights: float32 [..., K]; may sum to anything; 0 marks padding, whatever its id.
        labels: int64 [...], the next token of each row. Rows labelled `ignore_index` add nothing
            to the loss, its KD part included. Without labels every row counts.
        alpha: share of the label's cross-entropy, in [0, 1]; positive needs labels.
        linear_bias: [V].
        logit_softcap: bound of the logits, after scaling (Gemma's `final_logit_softcapping`).
        logit_scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        temperature: divides the student's logits in the KD part only; the loss is not multiplied
            by its square.
        position_weights: float [...], what each row counts; ones when None.
        ignore_index: see `labels`.
        missing_mass: rule for biased targets: "drop", "renormalise", "smooth", "ghost" or
            "ground_truth"; see `targets.py`. Leave it at "drop" for unbiased ones.
        reduction: "mean" divides by the sum of the weights of rows that count (0 if none do),
            "sum" by nothing.
        impl: "chunked" (any device), "triton" (CUDA), "reference" (plain autograd, whole logits)
            or "auto", which is "chunked".
        chunk_rows: rows whose logits exist at a time; chosen by the device's memory when None.
        return_parts: also return kd and ce, reduced and detached, for logging.

    Returns:
        The loss, 0-dimensional, float32 (float64 for float64 input); or `LossParts`.

    Raises:
        InvalidArgumentError: options out of range or in contradiction, shapes that do not fit.
        InvalidTargetsError: targets of the wrong shape or dtype.
    """
    criterion = Criterion(alpha, missing_mass, logit_scale, logit_softcap, temperature)
    check_linear(input, linear_weight, linear_bias)
    return _loss(
        input,
        linear_weight,
        linear_bias,
        target_ids,
        target_weights,
        labels,
        position_weights,
        criterion,
        ignore_index,
        reduction,
        impl,
        chunk_rows,
        return_parts,
    )


@overload
def sparse_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def sparse_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[_Options],
) -> LossParts: ...


def sparse_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    labels: Tensor | None = None,
    alpha: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    position_weights: Tensor | None = None,
    ignore_index: int = -100,
    missing_mass: MissingMass = "drop",
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    chunk_rows: int | None = None,
    return_parts: bool = False,
) -> Tensor | LossParts:
    """`linear_sparse_cross_entropy` on logits [..., V] that exist already.

    Costs one tensor like the logits, their gradient. All arguments as there; models that have
    applied their own softcap or scale need neither here.
    """
    criterion = Criterion(alpha, missing_mass, logit_scale, logit_softcap, temperature)
    return _loss(
        logits,
        None,
        None,
        target_ids,
        target_weights,
        labels,
        position_weights,
        criterion,
        ignore_index,
        reduction,
        impl,
        chunk_rows,
        return_parts,
    )


def _loss(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    position_weights: Tensor | None,
    criterion: Criterion,
    ignore_index: int,
    reduction: Reduction,
    impl: Implementation,
    chunk_rows: int | None,
    return_parts: bool,
) -> Tensor | LossParts:
    criterion.require_labels(labels is not None)
    if chunk_rows is not None and chunk_rows < 1:
        raise InvalidArgumentError(f"chunk_rows must be positive, found {chunk_rows}")
    check_targets(input, ids, weights, labels, position_weights)
    input, weight, bias = as_autocast_would(input, weight, bias)  # noqa: A001
    vocab_size = (input if weight is None else weight).shape[-1 if weight is None else 0]
    input = input.flatten(0, -2)  # noqa: A001
    ids, weights = ids.flatten(0, -2), weights.flatten(0, -2)
    dtype = accumulation_dtype(input.dtype)
    row_weight, label = row_weights(
        input,
        None if labels is None else labels.reshape(-1),
        None if position_weights is None else position_weights.reshape(-1),
        ignore_index,
        dtype,
    )
    factor = reduction_factor(row_weight, reduction)
    with_ce = label is not None and (criterion.alpha > 0 or return_parts)
    if _choose(impl, input) == "reference":
        loss, kd, ce = _reference(
            input, weight, bias, ids, weights, row_weight, label, factor, criterion
        )
    else:
        targets = place_missing_mass(
            ids, weights, row_weight, label, criterion.missing_mass, vocab_size
        )
        plan = Plan(
            criterion.alpha,
            criterion.logit_scale,
            criterion.logit_softcap,
            criterion.temperature,
            with_ce,
            *needed(input, weight, bias),
            chunk_rows,
            _choose(impl, input),
        )
        result = sparse_loss(input, weight, bias, targets, plan)
        loss, kd, ce = finish(result, criterion.alpha, factor, input, weight, bias)
    return LossParts(loss, kd, ce if label is not None else None) if return_parts else loss


def _reference(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    row_weight: Tensor,
    label: Tensor | None,
    factor: Tensor,
    criterion: Criterion,
) -> tuple[Tensor, Tensor, Tensor]:
    counted = row_weight != 0
    x = torch.where(counted[:, None], input, 0.0).to(row_weight.dtype)
    if weight is not None:
        x = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    weights = torch.where(counted[:, None], weights, 0.0)
    kd_rows, ce_rows = dense_losses(x, ids, weights, label, criterion)
    kd = (row_weight * kd_rows).sum() * factor
    ce = kd.new_zeros(()) if ce_rows is None else (row_weight * ce_rows).sum() * factor
    loss = kd if criterion.alpha == 0 else (1 - criterion.alpha) * kd + criterion.alpha * ce
    return loss, kd.detach(), ce.detach()


def _choose(impl: Implementation, input: Tensor) -> Literal["chunked", "triton", "reference"]:  # noqa: A002
    if impl == "auto":
        return "chunked"
    if impl not in ("chunked", "triton", "reference"):
        raise InvalidArgumentError(
            f"unknown impl {impl!r}: choose 'auto', 'chunked', 'triton' or 'reference'"
        )
    return impl
