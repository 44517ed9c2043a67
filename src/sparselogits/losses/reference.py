"""The oracle: the loss by plain autograd, over a dense target, as close to the formula as it gets.

Costs several [N, V] tensors; for tests and small vocabularies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselogits.losses.criterion import Criterion


def dense_losses(
    logits: Tensor,
    target_ids: Tensor,
    target_weights: Tensor,
    label: Tensor | None,
    criterion: Criterion,
) -> tuple[Tensor, Tensor | None]:
    """Unweighted losses per row.

    Args:
        logits: raw student logits [N, V]; computed with in their own dtype.
        target_ids: int64 [N, K].
        target_weights: float [N, K].
        label: int64 [N], every one a valid id, or None.
        criterion: the formula.

    Returns:
        kd [N], and ce [N] or None without labels.
    """
    N, V = logits.shape
    z = logits * criterion.logit_scale
    if criterion.logit_softcap is not None:
        z = criterion.logit_softcap * torch.tanh(z / criterion.logit_softcap)
    log_s = torch.log_softmax(z / criterion.temperature, dim=1)
    weights = target_weights.to(z.dtype)
    target = z.new_zeros(N, V).scatter_add(1, target_ids, weights)
    mass = weights.sum(1, keepdim=True)
    missing = (1 - mass).clamp(min=0)
    rule = criterion.missing_mass
    if rule == "renormalise":
        target = torch.where(mass != 0, target / mass, 0.0)
    elif rule == "smooth":
        target = target + missing / V
    elif rule == "ground_truth":
        assert label is not None
        target = target.scatter_add(1, label[:, None], missing)
    # 0 * NaN is wanted, 0 * -inf is not: ids that are no token carry logits of -inf
    kd = -torch.where((target == 0) & (log_s == -torch.inf), 0.0, target * log_s).sum(1)
    if rule == "ghost":
        stored = target != 0
        has_ghost = (missing[:, 0] > 0) & ~(stored | (log_s == -torch.inf)).all(1)
        log_rest = log_s.masked_fill(stored & has_ghost[:, None], -torch.inf).logsumexp(1)
        kd = kd - torch.where(has_ghost, missing[:, 0] * log_rest, 0.0)
    ce = None
    if label is not None:
        ce = -torch.log_softmax(z, dim=1).gather(1, label[:, None])[:, 0]
    return kd, ce
