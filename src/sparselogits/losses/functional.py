"""Define the sparse loss as functions and as a module.

`linear_sparse_cross_entropy` takes the input and weight of the head, so that by default logits
exist for only one chunk of rows at a time; `sparse_cross_entropy` takes logits. Both resemble
`linear_cross_entropy` and `cross_entropy` of `torch.nn.functional`. The teacher's targets are
sparse, so none of their tensors has a vocabulary dimension.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor, nn

from sparselogits.losses.call import Call, LossParts, Operands, prepare
from sparselogits.losses.chunked import sparse_parts
from sparselogits.losses.criterion import PLAIN, Criterion
from sparselogits.losses.reference import reference_parts


@overload
def linear_sparse_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def linear_sparse_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[True],
    **options: Any,
) -> LossParts: ...


def linear_sparse_cross_entropy(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    labels: Tensor | None = None,
    linear_bias: Tensor | None = None,
    position_weights: Tensor | None = None,
    criterion: Criterion = PLAIN,
    return_parts: bool = False,
    **options: Any,
) -> Tensor | LossParts:
    """Compute cross-entropy of `softmax(input @ linear_weight.T)` to sparse targets and to labels.

    Let z be the logits after scale and softcap (`Criterion`), t the target after the missing-mass
    rule, and y and w the label and weight of a row. Then, with reduction "mean",

        kd = -sum_i t_i log softmax(z / temperature)_i        ce = -log softmax(z)_y
        loss = sum_rows w ((1 - alpha) kd + alpha ce) / sum_rows w

    With importance-sampled targets this is the loss of random sampling KD (RS-KD): the expectation
    of its gradient is the gradient of full distillation (docs/theory.md, section 2).

    Only `input`, `linear_weight` and `linear_bias` receive gradients. "chunked" and "triton"
    compute them in the forward pass, so logits exist for only one chunk of rows at a time, and in
    eager mode a second backward pass raises an error. The values of ids and labels are not
    validated, because that would synchronise with the device: an id out of range causes an indexing
    error on the device, and with "triton" undefined behaviour.

    Args:
        input: hidden states [..., D] before the head, in any floating-point dtype.
        linear_weight: head [V, D] in the same dtype; with autocast, in any floating-point dtype
            except float64. V may exceed the teacher's vocabulary.
        target_ids: int64 [..., K] in [0, V); entries of a row with non-zero weight have distinct
            ids. K may be 0.
        target_weights: float [..., K], usually float32, with any sum; 0 for padding.
        labels: int64 or int32 [...], label of each row. Rows labelled `ignore_index` are excluded
            from the loss, including its KD part. None for no labels.
        linear_bias: bias [V] in the dtype of `input`; None for no bias.
        position_weights: float [...], weight of each row; None for ones.
        criterion: options of the loss.
        return_parts: whether to return `LossParts`, with kd and ce for logging.
        options: fields of `Criterion` as keywords, such as `alpha=0.1`; they override `criterion`.

    Returns:
        The loss, 0-dimensional, in float32 (float64 for float64 input); or `LossParts`.

    Raises:
        InvalidArgumentError: an option is invalid, labels are required and missing, shapes or
            dtypes do not match, `linear_weight` is a DTensor, or `impl` is "triton" and the input
            float64.
        InvalidTargetsError: targets have a wrong shape or dtype.
        MissingDependencyError: `impl` is "triton" and Triton is not installed.
        TypeError: an option is not a field of `Criterion`.

    Examples:
        Six positions with four entries each, hidden width 8, vocabulary 100:

        >>> import torch
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> ids, weights = torch.rand(6, 100).topk(4).indices, torch.full((6, 4), 0.25)
        >>> loss = linear_sparse_cross_entropy(hidden, head, ids, weights, temperature=2.0)
        >>> loss.backward()
        >>> hidden.grad.shape
        torch.Size([6, 8])
    """
    call = prepare(
        Operands(input, linear_weight, linear_bias),
        target_ids,
        target_weights,
        labels,
        position_weights,
        criterion.updated(options),
    )
    parts = loss_parts(call, with_ce=return_parts)
    return parts if return_parts else parts.loss


@overload
def sparse_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def sparse_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    return_parts: Literal[True],
    **options: Any,
) -> LossParts: ...


def sparse_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    labels: Tensor | None = None,
    position_weights: Tensor | None = None,
    criterion: Criterion = PLAIN,
    return_parts: bool = False,
    **options: Any,
) -> Tensor | LossParts:
    """Compute the loss of `linear_sparse_cross_entropy` from logits.

    With "chunked" and "triton", the forward pass allocates one tensor of the shape of the logits,
    for their gradient. Arguments, results and errors that are not listed are those of
    `linear_sparse_cross_entropy`.

    Args:
        logits: [..., V], in any floating-point dtype. If the model has already applied its scale
            and softcap, leave `logit_scale` and `logit_softcap` at their defaults.

    Examples:
        >>> import torch
        >>> logits = torch.randn(6, 100, requires_grad=True)
        >>> ids, weights = torch.rand(6, 100).topk(4).indices, torch.full((6, 4), 0.25)
        >>> loss = sparse_cross_entropy(logits, ids, weights, labels=ids[:, 0], alpha=0.5)
        >>> bool(loss > 0)
        True
    """
    criterion = criterion.updated(options)
    call = prepare(
        Operands(logits), target_ids, target_weights, labels, position_weights, criterion
    )
    parts = loss_parts(call, with_ce=return_parts)
    return parts if return_parts else parts.loss


class SparseKDLoss(nn.Module):
    """Module without parameters that computes `linear_sparse_cross_entropy` with fixed options.

    Args:
        criterion: options of the loss.
        options: fields of `Criterion` as keywords; they override `criterion`.

    Raises:
        InvalidArgumentError: a number is out of range, or a name is unknown.
        TypeError: an option is not a field of `Criterion`.

    Examples:
        >>> import torch
        >>> loss = SparseKDLoss(alpha=0.1)
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> ids, weights = torch.rand(6, 100).topk(4).indices, torch.full((6, 4), 0.25)
        >>> parts = loss(hidden, head, ids, weights, labels=torch.randint(100, (6,)))
        >>> parts.loss.shape
        torch.Size([])
    """

    def __init__(self, criterion: Criterion = PLAIN, **options: Any) -> None:
        super().__init__()
        self.criterion = criterion.updated(options)

    def forward(
        self,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        target_ids: Tensor,
        target_weights: Tensor,
        **tensors: Tensor | None,
    ) -> LossParts:
        """Compute the loss and its parts; see `linear_sparse_cross_entropy`.

        The keywords `tensors` are `labels`, `linear_bias` and `position_weights`.
        """
        return linear_sparse_cross_entropy(
            input,
            linear_weight,
            target_ids,
            target_weights,
            criterion=self.criterion,
            return_parts=True,
            **tensors,
        )

    def extra_repr(self) -> str:
        """Return the options, for `print(model)`."""
        return str(self.criterion)


def loss_parts(call: Call, *, with_ce: bool = True) -> LossParts:
    """Compute the loss with the implementation that the criterion selects.

    Given labels, `with_ce` computes ce even if alpha is 0.
    """
    if call.criterion.impl == "reference":
        return reference_parts(call)
    return sparse_parts(call, with_ce=with_ce)
