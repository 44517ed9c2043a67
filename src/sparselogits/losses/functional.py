"""Provide the sparse loss as functions and as a module.

`linear_sparse_cross_entropy` takes the head's input and weight, so logits exist one chunk of rows
at a time; `sparse_cross_entropy` takes logits. Both resemble their namesakes in
`torch.nn.functional`, and no teacher tensor is as wide as the vocabulary.
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

    With z the logits after scale and softcap (`Criterion`), t the target after its missing-mass
    rule, and y and w the label and the weight of a row:

        kd = -sum_i t_i log softmax(z / temperature)_i        ce = -log softmax(z)_y
        loss = sum_rows w ((1 - alpha) kd + alpha ce) / sum_rows w

    With importance-sampled targets it is the loss of random sampling KD (RS-KD): the gradient is
    that of full distillation in expectation (docs/theory.md, section 2).

    Gradients flow to `input`, `linear_weight` and `linear_bias` only. "chunked" and "triton"
    compute them in the forward pass, so logits exist one chunk of rows at a time; a second backward
    raises. Ids out of range are an indexing error of the device: check targets where they are read.

    Args:
        input: hidden states [..., D] before the head, in any floating-point dtype.
        linear_weight: the head [V, D] in the same dtype; V may exceed the teacher's vocabulary.
        target_ids: int64 [..., K] in [0, V), distinct among entries of a row that have weight.
            K may be 0.
        target_weights: float [..., K], usually float32, of any sum; 0 marks padding, whatever its
            id.
        labels: int64 [...], the next token of each row. Rows labelled `ignore_index` add nothing
            to the loss, their KD part included. Without labels every row counts.
        linear_bias: [V], in the dtype of `input`.
        position_weights: float [...], weight of each row; None for ones.
        criterion: the options of the loss.
        return_parts: whether to return kd and ce as well, reduced and detached, for logging.
        options: fields of `Criterion` as keywords, such as `alpha=0.1`; they replace those of
            `criterion`.

    Returns:
        The loss, 0-dimensional, in float32 (float64 for float64 input); or `LossParts`.

    Raises:
        InvalidArgumentError: If options are out of range or contradict each other, or shapes or
            dtypes do not fit.
        InvalidTargetsError: If targets have the wrong shape or dtype.
        TypeError: If an option is not a field of `Criterion`.

    Examples:
        Six positions with four entries each, hidden width 8, vocabulary 100:

        >>> import torch
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> ids, weights = torch.randint(100, (6, 4)), torch.full((6, 4), 0.25)
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
    """Compute the loss of `linear_sparse_cross_entropy` from logits [..., V] that exist already.

    Allocates one tensor of the size of the logits, their gradient. A model that has applied its
    own softcap or scale needs neither here. Arguments, result and errors are those of
    `linear_sparse_cross_entropy`.

    Examples:
        >>> import torch
        >>> logits = torch.randn(6, 100, requires_grad=True)
        >>> ids, weights = torch.randint(100, (6, 4)), torch.full((6, 4), 0.25)
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
    """Compute `linear_sparse_cross_entropy` with the options bound; holds no parameters.

    Args:
        criterion: the options of the loss.
        options: fields of `Criterion` as keywords; they replace those of `criterion`.

    Raises:
        InvalidArgumentError: If a number is out of range or a name is unknown.
        TypeError: If an option is not a field of `Criterion`.

    Examples:
        >>> import torch
        >>> loss = SparseKDLoss(alpha=0.1)
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> ids, weights = torch.randint(100, (6, 4)), torch.full((6, 4), 0.25)
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
        """Return the loss and its parts.

        Args:
            input: hidden states [..., D].
            linear_weight: the head [V, D].
            target_ids: int64 [..., K].
            target_weights: float [..., K].
            tensors: `labels`, `linear_bias` and `position_weights` of
                `linear_sparse_cross_entropy`.
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
    """Compute the loss by the implementation that the criterion names.

    Args:
        call: the tensors and options.
        with_ce: whether to compute the label's part also where alpha is 0, if there are labels.
    """
    if call.criterion.impl == "reference":
        return reference_parts(call)
    return sparse_parts(call, with_ce=with_ce)
