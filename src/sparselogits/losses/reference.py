"""Compute the loss in plain differentiable operations on dense targets, as a reference for tests.

The computation allocates several [N, V] tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselogits.losses.call import Call, LossParts
from sparselogits.losses.criterion import Criterion


def reference_parts(call: Call) -> LossParts:
    """Compute the loss and its parts from all logits at once, in differentiable operations."""
    row_weight, factor, alpha = call.row_weight, call.factor, call.criterion.alpha
    counted = (row_weight != 0)[:, None]
    input, weight, bias = call.operands  # noqa: A001
    z = torch.where(counted, input, 0.0).to(row_weight.dtype)
    if weight is not None:
        z = F.linear(z, weight.to(z.dtype), None if bias is None else bias.to(z.dtype))
    weights = torch.where(counted, call.weights, 0.0)
    kd_rows, ce_rows = _row_losses(z, call.ids, weights, call.label, call.criterion)
    kd = (row_weight * kd_rows).sum() * factor
    if ce_rows is None:
        return LossParts(kd, kd.detach(), None)
    ce = (row_weight * ce_rows).sum() * factor
    # a part of weight 0 may be infinite, and 0 * inf would be NaN
    loss = kd if alpha == 0 else ce if alpha == 1 else (1 - alpha) * kd + alpha * ce
    return LossParts(loss, kd.detach(), ce.detach())


def _row_losses(
    logits: Tensor, ids: Tensor, weights: Tensor, label: Tensor | None, criterion: Criterion
) -> tuple[Tensor, Tensor | None]:
    """Return kd [N], and ce [N] or None without labels, in the dtype of the logits."""
    N, V = logits.shape
    z = logits * criterion.logit_scale
    if criterion.logit_softcap is not None:
        z = criterion.logit_softcap * torch.tanh(z / criterion.logit_softcap)
    log_s = torch.log_softmax(z / criterion.temperature, dim=1)
    weights = weights.to(z.dtype)
    target = z.new_zeros(N, V).scatter_add(1, ids, weights)
    mass = weights.sum(1, keepdim=True)
    missing = (1 - mass).clamp(min=0)
    rule = criterion.missing_mass
    if rule == "renormalise":
        target = torch.where(mass != 0, target / mass, 0.0)
    elif rule == "smooth":
        target = target + missing / V
    elif rule == "ground_truth":
        assert label is not None  # checked by Criterion.require_labels
        target = target.scatter_add(1, label[:, None], missing)
    # masked ids have logits of -inf, whose product with a target of 0 must be 0, not NaN
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
