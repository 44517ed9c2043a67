"""Compute the loss with the head or the sequence divided among ranks.

Vocabulary-parallel (for tensor-parallel trainers): each rank has a slice of the head, of any width,
and the same rows. A chunk costs three to seven all-reduces of one number per row, or, in the first
of them, one number per stored entry. The input's gradient costs one all-reduce of [N, D] at the
end, as in any column-parallel layer.

Sequence-parallel and context-parallel: each rank has some of the positions and the whole head. Only
the sum of row weights and the values of the loss are reduced over ranks. Rows are independent, so
positions may be permuted (such as the zigzag order of ring attention) if hidden states, targets and
labels are permuted alike. Megatron's [sequence, batch, ...] layout requires no transposition: pass
targets in that layout, too.

Both are collective calls: every rank of the group must make them, with the same options and, for
vocabulary-parallel, the same rows. Only `chunk_rows` may differ between ranks if the sequence is
divided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses.call import LossParts, Operands, prepare, reduction_factor
from sparselogits.losses.chunked import default_chunk_rows, loss_and_gradients
from sparselogits.losses.criterion import PLAIN, Criterion
from sparselogits.losses.functional import loss_parts
from sparselogits.losses.rows import SparseLosses, Vocabulary


@dataclass(frozen=True)
class VocabularySlice(Vocabulary):
    """Reductions and indexing of logits whose columns are divided among a group's ranks.

    The slices of all ranks cover the vocabulary and do not overlap.

    Args:
        first_id: id of this rank's first column.
        group: process group of the ranks; None for all ranks.
    """

    first_id: int
    group: dist.ProcessGroup | None = None

    def block_rows(self, logits: Tensor) -> int:
        """Return the number of all rows, because smaller blocks would require more all-reduces."""
        return max(1, logits.shape[0])

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the values [R, E] at int64 ids [R, E], which may be on any rank."""
        local, is_local = self._local(ids, logits.shape[1])
        return self._reduce(torch.where(is_local, logits.gather(1, local), 0.0), dist.ReduceOp.SUM)

    def add_at_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add values [R, E] in place at the ids [R, E] whose columns are on this rank."""
        local, is_local = self._local(ids, logits.shape[1])
        logits.scatter_add_(1, local, torch.where(is_local, values, 0.0))

    def max(self, logits: Tensor) -> Tensor:
        """Return the maximum over the columns of all ranks, [R, 1]."""
        return self._reduce(super().max(logits), dist.ReduceOp.MAX)

    def sum(self, logits: Tensor) -> Tensor:
        """Return the sum over the columns of all ranks, [R, 1]."""
        return self._reduce(super().sum(logits), dist.ReduceOp.SUM)

    def softmax_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """Replace logits by the softmax over all ranks; return its largest value, [R, 1].

        `maximum` contains the largest logit over all ranks, [R, 1].
        """
        exponentials = logits.sub_(maximum).exp_()
        largest = self.sum(exponentials).reciprocal()
        exponentials.mul_(largest)
        return largest

    def _local(self, ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the local columns of ids (0 for other ranks' ids), and whether each is local."""
        local = ids - self.first_id
        is_local = (local >= 0) & (local < width)
        return torch.where(is_local, local, 0), is_local

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        """Reduce a tensor over the group in place, and return it."""
        dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


def vocabulary_parallel_sparse_cross_entropy(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    first_id: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    labels: Tensor | None = None,
    linear_bias: Tensor | None = None,
    position_weights: Tensor | None = None,
    criterion: Criterion = PLAIN,
    **options: Any,
) -> LossParts:
    """Compute `linear_sparse_cross_entropy` with the rows of the head divided among ranks.

    Arguments and errors that are not listed are those of `linear_sparse_cross_entropy`. All
    tensors except the slices of the head are the same on every rank. docs/loss.md has an example.

    Args:
        input: hidden states [..., D], the same on every rank. Every rank gets the whole gradient.
        linear_weight: this rank's slice [W, D] of the head, W >= 1; widths may differ.
        first_id: id of the first row of the slice; targets and labels are ids of the whole head.
        vocab_size: vocabulary size V, the sum of all widths.
        group: process group; None for all ranks.
        linear_bias: this rank's slice [W] of the bias; None for no bias.
        criterion: options of the loss, the same on every rank; `impl` is "auto" or "chunked".

    Returns:
        The loss and its parts, the same on every rank.

    Raises:
        InvalidArgumentError: the slice is empty or outside the vocabulary, or `impl` is
            neither "auto" nor "chunked".
    """
    criterion = criterion.updated(options)
    criterion.require_chunked("vocabulary_parallel_sparse_cross_entropy")
    operands = Operands(input, linear_weight, linear_bias)
    call = prepare(operands, target_ids, target_weights, labels, position_weights, criterion)
    last_id = first_id + linear_weight.shape[0]
    if not 0 <= first_id < last_id <= vocab_size:
        raise InvalidArgumentError(
            f"the slice of ids [{first_id}, {last_id}) is empty or outside the vocabulary of "
            f"{vocab_size} ids: pass the id of the slice's first row and the size of the whole "
            "vocabulary"
        )
    x, with_ce = call.operands.input, call.label is not None
    # widths may differ but chunks must not, so every rank computes with the mean width
    mean_width = -(-vocab_size // dist.get_world_size(group))
    rows = criterion.chunk_rows or default_chunk_rows(x.shape[0], mean_width, x.device, x.dtype)
    result = loss_and_gradients(
        call.operands,
        call.row_weight,
        SparseLosses(
            call.targets(vocab_size), criterion, with_ce, VocabularySlice(first_id, group)
        ),
        needs=call.needs,
        chunk_rows=rows,
    )
    d_input = result.gradients[0]
    if d_input is not None:  # the contribution of this rank's columns
        dist.all_reduce(d_input, group=group)
    return call.finish(result, with_ce=with_ce)


def sequence_parallel_sparse_cross_entropy(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    labels: Tensor | None = None,
    linear_bias: Tensor | None = None,
    position_weights: Tensor | None = None,
    criterion: Criterion = PLAIN,
    **options: Any,
) -> LossParts:
    """Compute `linear_sparse_cross_entropy` with the positions divided among ranks.

    Arguments and errors that are not listed are those of `linear_sparse_cross_entropy`, for this
    rank's rows. docs/loss.md has an example.

    Args:
        input: hidden states [..., D]. The number of rows may be 0 and may differ between ranks.
        linear_weight: whole head [V, D]. Its gradient, like that of `linear_bias`, is this rank's
            contribution, to be summed over the group (DDP and FSDP average by default).
        group: process group; None for all ranks.
        criterion: options of the loss; "mean" averages over the rows of all ranks. `chunk_rows`
            may differ between ranks.

    Returns:
        The loss and its parts over the positions of all ranks, the same on every rank.
    """
    criterion = criterion.updated(options)
    call = prepare(
        Operands(input, linear_weight, linear_bias),
        target_ids,
        target_weights,
        labels,
        position_weights,
        replace(criterion, reduction="sum"),
    )
    parts = loss_parts(call)
    ce = torch.zeros_like(parts.kd) if parts.ce is None else parts.ce
    sums = torch.stack([call.row_weight.sum(), parts.loss.detach(), parts.kd, ce])
    dist.all_reduce(sums, group=group)
    factor = reduction_factor(sums[:1], criterion.reduction)
    elsewhere = sums[1] - parts.loss.detach()
    return LossParts(
        (parts.loss + elsewhere) * factor,
        sums[2] * factor,
        None if parts.ce is None else sums[3] * factor,
    )
