"""The loss, as functions: cross-entropy to sparse soft targets, mixed with that to labels.

`linear_sparse_cross_entropy` takes the head's input and weight, so that logits exist one chunk of
rows at a time; `sparse_cross_entropy` takes logits. Both mirror their namesakes in
`torch.nn.functional`, and neither ever holds a teacher tensor as wide as the vocabulary.
"""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses.arguments import Arguments, prepare
from sparselogits.losses.criterion import Criterion, MissingMass, Reduction
from sparselogits.losses.function import LossParts, finish, needed
from sparselogits.losses.linear import Plan, sparse_loss
from sparselogits.losses.reference import dense_losses

Implementation = Literal["auto", "chunked", "triton", "reference"]


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
        chunk_rows: rows whose logits exist at a time. When None, chosen from shapes and dtype, and
            from an accelerator's total memory, never from what is free.
        return_parts: also return kd and ce, reduced and detached, for logging.

    Returns:
        The loss, 0-dimensional, float32 (float64 for float64 input); or `LossParts`.

    Raises:
        InvalidArgumentError: options out of range or in contradiction, shapes that do not fit.
        InvalidTargetsError: targets of the wrong shape or dtype.

    Examples:
        Six positions with four entries each, hidden width 8, vocabulary 100:

        >>> import torch
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> ids, weights = torch.randint(100, (6, 4)), torch.full((6, 4), 0.25)
        >>> loss = linear_sparse_cross_entropy(hidden, head, ids, weights)
        >>> loss.backward()
        >>> hidden.grad.shape
        torch.Size([6, 8])
    """
    criterion = Criterion(
        alpha, missing_mass, logit_scale, logit_softcap, temperature, ignore_index, reduction
    )
    arguments = prepare(
        input,
        linear_weight,
        linear_bias,
        target_ids,
        target_weights,
        labels,
        position_weights,
        criterion,
    )
    parts = loss_parts(arguments, criterion, impl, chunk_rows, with_ce=return_parts)
    return parts if return_parts else parts.loss


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

    Examples:
        >>> import torch
        >>> logits = torch.randn(6, 100, requires_grad=True)
        >>> ids, weights = torch.randint(100, (6, 4)), torch.full((6, 4), 0.25)
        >>> loss = sparse_cross_entropy(logits, ids, weights, labels=ids[:, 0], alpha=0.5)
        >>> bool(loss > 0)
        True
    """
    criterion = Criterion(
        alpha, missing_mass, logit_scale, logit_softcap, temperature, ignore_index, reduction
    )
    arguments = prepare(
        logits, None, None, target_ids, target_weights, labels, position_weights, criterion
    )
    parts = loss_parts(arguments, criterion, impl, chunk_rows, with_ce=return_parts)
    return parts if return_parts else parts.loss


def loss_parts(
    arguments: Arguments,
    criterion: Criterion,
    impl: Implementation = "auto",
    chunk_rows: int | None = None,
    *,
    with_ce: bool = True,
) -> LossParts:
    """What both functions above, the module and the sequence-parallel form come down to.

    Args:
        arguments: the tensors.
        criterion: the formula.
        impl: as above.
        chunk_rows: as above.
        with_ce: compute the label's part even where alpha = 0, if there are labels.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise InvalidArgumentError(f"chunk_rows must be positive, found {chunk_rows}")
    chosen = _choose(impl)
    if chosen == "reference":
        return _reference(arguments, criterion)
    x, weight, bias = arguments.input, arguments.weight, arguments.bias
    with_ce = arguments.label is not None and (with_ce or criterion.alpha > 0)
    plan = Plan(
        criterion.alpha,
        criterion.logit_scale,
        criterion.logit_softcap,
        criterion.temperature,
        with_ce,
        *needed(x, weight, bias),
        chunk_rows,
        chosen,
    )
    vocab_size = x.shape[1] if weight is None else weight.shape[0]
    targets = arguments.targets(criterion.missing_mass, vocab_size)
    result = sparse_loss(x, weight, bias, targets, plan)
    return finish(result, criterion.alpha, arguments.factor, x, weight, bias, with_ce=with_ce)


def _reference(arguments: Arguments, criterion: Criterion) -> LossParts:
    row_weight, bias = arguments.row_weight, arguments.bias
    counted = (row_weight != 0)[:, None]
    z = torch.where(counted, arguments.input, 0.0).to(row_weight.dtype)
    if arguments.weight is not None:
        z = F.linear(z, arguments.weight.to(z.dtype), None if bias is None else bias.to(z.dtype))
    weights = torch.where(counted, arguments.weights, 0.0)
    kd_rows, ce_rows = dense_losses(z, arguments.ids, weights, arguments.label, criterion)
    kd = (row_weight * kd_rows).sum() * arguments.factor
    if ce_rows is None:
        return LossParts(kd, kd.detach(), None)
    ce = (row_weight * ce_rows).sum() * arguments.factor
    loss = kd if criterion.alpha == 0 else (1 - criterion.alpha) * kd + criterion.alpha * ce
    return LossParts(loss, kd.detach(), ce.detach())


def _choose(impl: Implementation) -> Literal["chunked", "triton", "reference"]:
    if impl == "auto":
        return "chunked"
    if impl not in ("chunked", "triton", "reference"):
        raise InvalidArgumentError(
            f"unknown impl {impl!r}: choose 'auto', 'chunked', 'triton' or 'reference'"
        )
    return impl
