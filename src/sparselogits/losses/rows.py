"""Compute the loss of a block of rows, and replace the logits by their gradient.

With the default options, the computation takes four passes over the rows (maximum, softmax in
place, maximum, scaling) and sparse corrections at the stored ids. The second maximum is the largest
probability; its negative logarithm is the logsumexp relative to the largest logit.

Let u be the logits after scale, softcap and temperature, s = softmax(u), t the target with total
mass M_t, `spread` the smoothing mass added to every id, m the target's mass on the ghost class, and
M the student's mass on it. The gradient of the KD part with respect to u is

    M_t s - t                          drop, renormalise, ground_truth
    M_t s - t - spread                 smooth
    M_t s - t  on stored ids, and      ghost
    s (M_t - m / M)  on the others
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparselogits.losses.criterion import Criterion
from sparselogits.losses.targets import RowTargets

_BLOCK_ELEMENTS = 2**21  # 8 MiB of float32, which stay in a CPU's cache between passes


class Vocabulary:
    """Reductions and indexing of logits [R, V] along the vocabulary.

    The subclass `parallel.VocabularySlice` supports columns that are divided among ranks.
    """

    def block_rows(self, logits: Tensor) -> int:
        """Return the number of rows per block, at least 1."""
        if logits.device.type != "cpu":  # few kernel launches; temporary copies of 1/8 of the rows
            return max(1, -(-logits.shape[0] // 8))
        return max(8, _BLOCK_ELEMENTS // logits.shape[1])

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return the values [R, E] at int64 ids [R, E]."""
        return logits.gather(1, ids)

    def add_at_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add values [R, E] in place at ids [R, E], which may repeat within a row."""
        logits.scatter_add_(1, ids, values)

    def max(self, logits: Tensor) -> Tensor:
        """Return the maximum over the vocabulary, [R, 1]."""
        return logits.amax(1, keepdim=True)

    def sum(self, logits: Tensor) -> Tensor:
        """Return the sum over the vocabulary, [R, 1]."""
        return logits.sum(1, keepdim=True)

    def softmax_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """Replace logits, whose maximum is given, by the softmax; return its maximum, [R, 1]."""
        return torch.softmax(logits, 1, out=logits).amax(1, keepdim=True)


WHOLE = Vocabulary()
"""Vocabulary with all columns on this rank."""


@dataclass(frozen=True)
class SparseLosses:
    """Callable that computes losses of sparse targets; implements `chunked.ChunkLosses`."""

    targets: RowTargets
    criterion: Criterion
    with_ce: bool
    vocabulary: Vocabulary = WHOLE

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted loss sums of some rows; see `chunked.ChunkLosses`."""
        targets = self.targets.rows(rows)
        dtype = targets.row_weight.dtype
        kd = ce = targets.row_weight.new_zeros(())
        step = self.vocabulary.block_rows(logits)
        for start in range(0, logits.shape[0], step):
            block = logits[start : start + step]
            part = targets.rows(slice(start, start + step))
            work = block.to(dtype)  # the block itself if it has this dtype
            kd_rows, ce_rows = row_losses_(
                work,
                part,
                self.criterion,
                with_ce=self.with_ce,
                with_grad=gradient is not None,
                vocabulary=self.vocabulary,
            )
            kd = kd + part.row_weight.dot(kd_rows)
            if ce_rows is not None:
                ce = ce + part.row_weight.dot(ce_rows)
            if gradient is not None and not (work is block and gradient is logits):
                gradient[start : start + step].copy_(work)
        return kd, ce


def row_losses_(
    logits: Tensor,
    targets: RowTargets,
    criterion: Criterion,
    *,
    with_ce: bool,
    with_grad: bool,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor | None]:
    """Return the unweighted losses kd and ce of R rows; replace logits by the gradient on request.

    Args:
        logits: raw logits [R, V], in the dtype of the targets' weights; overwritten with
            row_weight * d((1 - alpha) kd + alpha ce) / d(logits) if `with_grad`, else with
            intermediate values.
        targets: targets of the same R rows.
        criterion: options of the loss.
        with_ce: whether to compute ce; required if alpha > 0.
        with_grad: whether to compute the gradient.
        vocabulary: reductions and indexing of the logits.

    Returns:
        kd [R], and ce [R] or None without `with_ce`.
    """
    z, slope = transform_(
        logits, criterion.logit_scale, criterion.logit_softcap, with_slope=with_grad
    )
    kd_share, ce_share = 1.0 - criterion.alpha, criterion.alpha
    if criterion.temperature == 1.0:
        softmax = _softmax_(z, targets, vocabulary, with_kd=True, with_ce=with_ce)
        kd, ce = _losses(softmax, targets)
        if with_grad:
            _gradient_(z, softmax, targets, kd_share, ce_share, vocabulary)
    else:
        at_one = z.clone() if with_ce else None
        z.div_(criterion.temperature)
        softmax = _softmax_(z, targets, vocabulary, with_kd=True, with_ce=False)
        kd, ce = _losses(softmax, targets)
        if with_grad:
            _gradient_(z, softmax, targets, kd_share / criterion.temperature, 0.0, vocabulary)
        if at_one is not None:
            softmax = _softmax_(at_one, targets, vocabulary, with_kd=False, with_ce=True)
            _, ce = _losses(softmax, targets)
            if with_grad:
                _gradient_(at_one, softmax, targets, 0.0, ce_share, vocabulary)
                z.add_(at_one)
    if with_grad and slope is not None:
        z.mul_(slope)
    elif with_grad and criterion.logit_scale != 1.0:
        z.mul_(criterion.logit_scale)
    assert kd is not None
    return kd, ce


def transform_(
    logits: Tensor, scale: float, cap: float | None, *, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Apply scale and softcap to raw logits [R, V] in place.

    Returns:
        The transformed logits; with a softcap and `with_slope` also their derivative, else None.
    """
    if cap is None:
        return (logits if scale == 1.0 else logits.mul_(scale)), None
    z = logits.mul_(scale / cap).tanh_()
    slope = z.square().neg_().add_(1.0).mul_(scale) if with_slope else None
    return z.mul_(cap), slope


class _Softmax(NamedTuple):
    """Values that losses and gradients need after the logits have been replaced by their softmax.

    The softmax is over all ids; with a ghost class, over all ids that are not stored. Logits are
    relative to the row's maximum over all ids.
    """

    values: Tensor | None  # logits of stored ids, 0 at padding, [R, E]; None without the KD part
    label_value: Tensor | None  # logit of the label, [R, 1]; None without ce
    log_rest: Tensor  # logsumexp over the ids of the softmax, [R, 1]
    log_sum: Tensor  # logsumexp over all ids, [R, 1]
    total: Tensor | None  # sum of all logits, [R, 1]; None without smoothing
    ghost: Tensor | None  # mass of the ghost class, 0 if all ids are stored; None without the class


def _softmax_(
    u: Tensor, targets: RowTargets, vocabulary: Vocabulary, *, with_kd: bool, with_ce: bool
) -> _Softmax:
    """Replace the rows of u, [R, V], by their softmax, and return values derived from the rows."""
    values = label_value = total = ghost = None
    stored = targets.weights != 0
    if with_kd:
        values = vocabulary.gather(u, targets.ids)
    if with_ce:
        assert targets.label is not None  # checked by Criterion.require_labels
        label_value = vocabulary.gather(u, targets.label[:, None])
    if values is not None and targets.ghost is not None:
        ghost = targets.ghost[:, None]
        out = torch.zeros_like(values).masked_fill_(stored, -torch.inf)
        vocabulary.add_at_(u, targets.ids, out)
    top = pivot = above = vocabulary.max(u)
    if values is not None and ghost is not None:
        nothing_left = pivot == -torch.inf  # all ids stored
        u.masked_fill_(nothing_left, 0.0)  # any finite value, which is multiplied by 0 later
        above = torch.where(nothing_left, 0.0, pivot)
        masked = values.masked_fill(~stored, -torch.inf)
        top = torch.cat([pivot, masked], 1).amax(1, keepdim=True)
    if with_kd and targets.spread is not None:
        total = vocabulary.sum(u.sub_(top))
        above = torch.zeros_like(top)
    log_rest = log_sum = vocabulary.softmax_(u, above).log().neg()
    if values is not None and ghost is not None:
        log_rest = torch.where(nothing_left, -torch.inf, log_rest + (pivot - top))
        log_sum = torch.cat([log_rest, masked - top], 1).logsumexp(1, keepdim=True)
        ghost = torch.where(nothing_left, 0.0, ghost)
    return _Softmax(
        None if values is None else torch.where(stored, values - top, 0.0),
        None if label_value is None else label_value - top,
        log_rest,
        log_sum,
        total,
        ghost,
    )


def _target_mass(softmax: _Softmax, targets: RowTargets) -> Tensor:
    """Return the total mass of the target, including ghost class and smoothing, [R, 1]."""
    mass = targets.mass[:, None]
    if softmax.ghost is not None and targets.ghost is not None:
        mass = mass - (targets.ghost[:, None] - softmax.ghost)
    return mass


def _losses(softmax: _Softmax, targets: RowTargets) -> tuple[Tensor | None, Tensor | None]:
    """Return the unweighted losses kd and ce, [R] each, or None for a loss not requested."""
    kd = ce = None
    if softmax.values is not None:
        mass = _target_mass(softmax, targets)
        # where(), because at padding the product 0 * -inf would be NaN
        stored = torch.where(targets.weights != 0, targets.weights * softmax.values, 0.0)
        kd = mass * softmax.log_sum - stored.sum(1, keepdim=True)
        if softmax.total is not None and targets.spread is not None:
            kd = kd - targets.spread[:, None] * softmax.total
        if softmax.ghost is not None:
            kd = kd - torch.where(softmax.ghost == 0, 0.0, softmax.ghost * softmax.log_rest)
        kd = kd[:, 0]
    if softmax.label_value is not None:
        ce = (softmax.log_sum - softmax.label_value)[:, 0]
    return kd, ce


def _gradient_(
    u: Tensor,
    softmax: _Softmax,
    targets: RowTargets,
    kd_share: float,
    ce_share: float,
    vocabulary: Vocabulary,
) -> None:
    """Replace the softmax in u, [R, V], by row_weight * (kd_share dkd/du + ce_share dce/du)."""
    weight = targets.row_weight[:, None]
    kd_weight = kd_share * weight

    def of_kd(target: Tensor) -> Tensor:
        """Return the share of kd times a part of the target, which may be NaN if the share is 0."""
        return kd_weight * target if kd_share else torch.zeros_like(target)

    whole = of_kd(_target_mass(softmax, targets)) + ce_share * weight
    if softmax.ghost is None:
        u.mul_(whole)
    else:
        share_of_rest = (softmax.log_rest - softmax.log_sum).exp()
        u.mul_(whole * share_of_rest - of_kd(softmax.ghost))
    if softmax.total is not None and targets.spread is not None:
        u.sub_(of_kd(targets.spread[:, None]))
    if softmax.values is not None:
        at_stored = -of_kd(targets.weights)
        if softmax.ghost is not None:
            student = (softmax.values - softmax.log_sum).exp()
            at_stored = at_stored + torch.where(targets.weights != 0, whole * student, 0.0)
        vocabulary.add_at_(u, targets.ids, at_stored)
    if softmax.label_value is not None and ce_share != 0.0:
        assert targets.label is not None
        vocabulary.add_at_(u, targets.label[:, None], -ce_share * weight)
