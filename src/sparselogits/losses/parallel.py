"""The loss across ranks: a head cut along the vocabulary, or a sequence cut along its positions.

Vocabulary-parallel (tensor-parallel trainers): each rank holds a slice of the head, of any width,
and the same rows. A chunk costs three reductions of a few numbers a row over the group (stored
logits, maximum, sum; one more for labels, one for smoothing, and two, another maximum and sum,
where labels stand beside a target of another temperature), and the input's gradient one sum of
[N, D] at the end, as any column-parallel layer does.

Sequence-parallel and context-parallel: each rank holds some of the positions and the whole head.
Only the sum of weights crosses ranks, and the loss's value. Rows are independent, so any
permutation of positions will do (a ring's zigzag order, say) as long as hidden states, targets and
labels went through the same one. Megatron's [sequence, batch, ...] layout needs no transposition
either: pass targets in that order.

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
from sparselogits.losses.arguments import prepare, reduction_factor
from sparselogits.losses.chunked import default_chunk_rows, loss_and_gradients
from sparselogits.losses.criterion import Criterion
from sparselogits.losses.function import LossParts, finish, needed
from sparselogits.losses.functional import Implementation, loss_parts
from sparselogits.losses.rows import row_losses_
from sparselogits.losses.targets import RowTargets

PLAIN = Criterion()
"""Cross-entropy to the target and nothing else."""


@dataclass(frozen=True)
class VocabularySlice:
    """`Vocabulary` of which this rank holds columns first_id : first_id + logits.shape[1].

    Args:
        first_id: vocabulary id of this rank's first column.
        group: process group whose slices make up the vocabulary; None for all ranks.
    """

    first_id: int
    group: dist.ProcessGroup | None = None

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        """See `Vocabulary`; each value comes from the rank that holds its column."""
        local, held = self._local(ids, logits.shape[1])
        return self._reduce(torch.where(held, logits.gather(1, local), 0.0), dist.ReduceOp.SUM)

    def add_at_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """See `Vocabulary`; only the rank that holds a column changes it."""
        local, held = self._local(ids, logits.shape[1])
        logits.scatter_add_(1, local, torch.where(held, values, 0.0))

    def max(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return self._reduce(logits.amax(1, keepdim=True), dist.ReduceOp.MAX)

    def sum(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return self._reduce(logits.sum(1, keepdim=True), dist.ReduceOp.SUM)

    def softmax_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """See `Vocabulary`."""
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
    chunk_rows: int | None = None,
) -> LossParts:
    """`linear_sparse_cross_entropy` with the head's rows spread over a process group.

    Args:
        input: [..., D], the same on every rank. Its gradient comes out whole on every rank.
        linear_weight: this rank's slice [W, D] of the head, W >= 1; widths may differ.
        target_ids: int64 [..., K], ids of the whole vocabulary.
        target_weights: float32 [..., K].
        first_id: id of the slice's first row.
        vocab_size: V, the sum of all widths.
        group: process group; None for all ranks.
        labels: int64 [...], ids of the whole vocabulary.
        linear_bias: this rank's slice [W].
        position_weights: float [...].
        criterion: the options, under the names they have there.
        chunk_rows: as there; the same on every rank.

    Returns:
        loss and its parts, the same on every rank.

    Raises:
        InvalidArgumentError: as there, or a slice that lies outside the vocabulary.
        InvalidTargetsError: as there.
    """
    call = prepare(
        input,
        linear_weight,
        linear_bias,
        target_ids,
        target_weights,
        labels,
        position_weights,
        criterion,
    )
    last_id = first_id + linear_weight.shape[0]
    if not 0 <= first_id < last_id <= vocab_size:
        raise InvalidArgumentError(
            f"a slice of ids {first_id} to {last_id} is empty or outside {vocab_size} ids"
        )
    x, head, bias = call.input, call.weight, call.bias
    assert head is not None
    targets = call.targets(criterion.missing_mass, vocab_size)
    needs = needed(x, head, bias)
    # slices may differ in width, chunks must not: all choose by an even share
    share = -(-vocab_size // dist.get_world_size(group))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        result = loss_and_gradients(
            x,
            head,
            bias,
            call.row_weight,
            _SlicedLosses(targets, criterion, VocabularySlice(first_id, group)),
            needs=needs,
            chunk_rows=chunk_rows or default_chunk_rows(x.shape[0], share, x.device, x.dtype),
        )
        if result.input is not None:  # each rank has the pull of its own columns
            dist.all_reduce(result.input, group=group)
    return finish(
        result, criterion.alpha, call.factor, x, head, bias, with_ce=call.label is not None
    )


@dataclass(frozen=True)
class _SlicedLosses:
    """`ChunkLosses` of a slice; whole chunks, since every block would be a round of messages."""

    targets: RowTargets
    criterion: Criterion
    vocabulary: VocabularySlice

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        part = self.targets.rows(rows)
        work = logits.to(part.row_weight.dtype)
        kd, ce = row_losses_(
            work,
            part,
            self.criterion,
            with_ce=part.label is not None,
            with_grad=gradient is not None,
            vocabulary=self.vocabulary,
        )
        if gradient is not None and not (work is logits and gradient is logits):
            gradient.copy_(work)
        assert kd is not None
        zero = part.row_weight.new_zeros(())
        return part.row_weight.dot(kd), zero if ce is None else part.row_weight.dot(ce)


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
    impl: Implementation = "auto",
    chunk_rows: int | None = None,
) -> LossParts:
    """`linear_sparse_cross_entropy` over the positions of all ranks, each of which holds some.

    Args:
        input: this rank's rows [..., D]; their number may differ between ranks and be 0.
        linear_weight: the whole head [V, D]. Its gradient is this rank's share: the shares add up
            over the group (a sum, where data parallelism averages).
        target_ids: int64 [..., K] of this rank's rows.
        target_weights: float32 [..., K].
        group: process group; None for all ranks.
        labels: int64 [...] of this rank's rows.
        linear_bias: [V]; its gradient is a share likewise.
        position_weights: float [...] of this rank's rows.
        criterion: the options, under the names they have there; a mean is over all ranks' rows.
        impl: as there.
        chunk_rows: as there; ranks may differ.

    Returns:
        loss and its parts over all ranks' positions, the same on every rank.
    """
    own_sum = replace(criterion, reduction="sum")
    call = prepare(
        input,
        linear_weight,
        linear_bias,
        target_ids,
        target_weights,
        labels,
        position_weights,
        own_sum,
    )
    parts = loss_parts(call, own_sum, impl, chunk_rows)
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
