"""Compute the loss across ranks, with the head or the sequence split among them.

Vocabulary-parallel (for tensor-parallel trainers): each rank holds a slice of the head, of any
width, and the same rows. A chunk costs three reductions of a few numbers per row over the group
(stored logits, maximum, sum; one more for labels, one for smoothing, and two, another maximum and
sum, where labels are used with a target of another temperature). The input's gradient costs one sum
of [N, D] at the end, as in any column-parallel layer.

Sequence-parallel and context-parallel: each rank holds some of the positions and the whole head.
Only the sum of weights and the value of the loss cross ranks. Rows are independent, so any
permutation of positions is possible (such as a ring's zigzag order) if hidden states, targets and
labels have the same one. Megatron's [sequence, batch, ...] layout needs no transposition either:
pass targets in that order.

Both are collective calls: every rank of the group makes them, with the same options and, for
vocabulary-parallel, the same rows and `chunk_rows`.
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
    """Reduce and index logits of which this rank holds a slice of the columns.

    Args:
        first_id: vocabulary id of this rank's first column.
        group: process group whose slices make up the vocabulary; None for all ranks.
    """

    first_id: int
    group: dist.ProcessGroup | None = None

    def block_rows(self, logits: Tensor) -> int:
        """Return all rows: each block would cost its own reductions."""
        return max(1, logits.shape[0])

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the values at ids, each from the rank that holds its column."""
        local, held = self._local(ids, logits.shape[1])
        return self._reduce(torch.where(held, logits.gather(1, local), 0.0), dist.ReduceOp.SUM)

    def add_at_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add values at ids, each on the rank that holds its column."""
        local, held = self._local(ids, logits.shape[1])
        logits.scatter_add_(1, local, torch.where(held, values, 0.0))

    def max(self, logits: Tensor) -> Tensor:
        """Return the maximum over the columns of all ranks."""
        return self._reduce(super().max(logits), dist.ReduceOp.MAX)

    def sum(self, logits: Tensor) -> Tensor:
        """Return the sum over the columns of all ranks."""
        return self._reduce(super().sum(logits), dist.ReduceOp.SUM)

    def softmax_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """Replace logits by the softmax over the columns of all ranks, return its maximum."""
        exponentials = logits.sub_(maximum).exp_()
        largest = self.sum(exponentials).reciprocal()
        exponentials.mul_(largest)
        return largest

    def _local(self, ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        local = ids - self.first_id
        held = (local >= 0) & (local < width)
        return torch.where(held, local, 0), held

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
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
    """Compute `linear_sparse_cross_entropy` with the head's rows spread over a process group.

    Tensors, options and errors that are not listed here are those of `linear_sparse_cross_entropy`;
    ids and labels are those of the whole vocabulary.

    Args:
        input: [..., D], the same on every rank. Its gradient is complete on every rank.
        linear_weight: this rank's slice [W, D] of the head, W >= 1; widths may differ.
        target_ids: int64 [..., K].
        target_weights: float [..., K].
        first_id: id of the slice's first row.
        vocab_size: V, the sum of all widths.
        group: process group; None for all ranks.
        labels: int64 [...].
        linear_bias: this rank's slice [W].
        position_weights: float [...].
        criterion: the options, the same on every rank; "chunked" is the only implementation.
        options: fields of `Criterion` as keywords; they replace those of `criterion`.

    Returns:
        The loss and its parts, the same on every rank.

    Raises:
        InvalidArgumentError: If the slice is empty or outside the vocabulary, or as there.
    """
    criterion = criterion.updated(options)
    criterion.require_chunked("vocabulary_parallel_sparse_cross_entropy")
    operands = Operands(input, linear_weight, linear_bias)
    call = prepare(operands, target_ids, target_weights, labels, position_weights, criterion)
    last_id = first_id + linear_weight.shape[0]
    if not 0 <= first_id < last_id <= vocab_size:
        raise InvalidArgumentError(
            f"a slice of ids {first_id} to {last_id} is empty or outside a vocabulary of "
            f"{vocab_size} ids: pass first_id and vocab_size of the whole head"
        )
    x, with_ce = call.operands.input, call.label is not None
    # slices may differ in width, chunks must not: all ranks choose by an even share
    share = -(-vocab_size // dist.get_world_size(group))
    rows = criterion.chunk_rows or default_chunk_rows(x.shape[0], share, x.device, x.dtype)
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
    if d_input is not None:  # each rank has the contribution of its own columns
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
    """Compute `linear_sparse_cross_entropy` over the positions of all ranks.

    Tensors, options and errors that are not listed here are those of `linear_sparse_cross_entropy`.

    Args:
        input: this rank's rows [..., D]; their number may differ between ranks and be 0.
        linear_weight: the whole head [V, D]. Its gradient is this rank's contribution to a sum
            over the group (a sum, where data parallelism averages).
        target_ids: int64 [..., K] of this rank's rows.
        target_weights: float [..., K].
        group: process group; None for all ranks.
        labels: int64 [...] of this rank's rows.
        linear_bias: [V]; its gradient is a contribution likewise.
        position_weights: float [...] of this rank's rows.
        criterion: the options; a mean is over the rows of all ranks, `chunk_rows` may differ.
        options: fields of `Criterion` as keywords; they replace those of `criterion`.

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
