"""Targets as the row kernels take them: padding made harmless, the missing mass placed.

The rules, with t the stored weights of a position, V the student's vocabulary and
m = max(0, 1 - sum t) the missing mass (paper, section 3: Top-K and its partial remedies):

    drop           t as it stands: the mass is what it is
    renormalise    t / sum t
    smooth         t_j + m / V on every id j
    ghost          one more class, "none of the stored ids": m against the student's mass M there,
                   so the gradient is s - t on stored ids and s (1 - m / M) on all others
    ground_truth   t plus m on the label

Cost: a few [N, K] temporaries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparselogits.losses.criterion import MissingMass


class RowTargets(NamedTuple):
    """Targets of N rows, in the dtype the loss computes in.

    Attributes:
        ids: int64 [N, E].
        weights: [N, E]; 0 marks padding. May hold the label as a last column (ground_truth).
        row_weight: [N], 0 where a row adds nothing (ignored label or position weight 0).
        mass: [N], all of the target's mass, whatever a rule has added included.
        label: int64 [N], 0 where ignored; None without labels.
        ghost: [N], mass of the ghost class; None without one.
        spread: [N], mass added to every id of the vocabulary; None without smoothing.
    """

    ids: Tensor
    weights: Tensor
    row_weight: Tensor
    mass: Tensor
    label: Tensor | None = None
    ghost: Tensor | None = None
    spread: Tensor | None = None

    def rows(self, rows: slice) -> RowTargets:
        """A contiguous run of rows, as views."""
        return RowTargets._make(None if t is None else t[rows] for t in self)


def row_weights(
    rows: Tensor,
    labels: Tensor | None,
    position_weights: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """How much each row counts, and the labels with ignored ones replaced by 0.

    Args:
        rows: any [N, ...] tensor, for its length and device.
        labels: int64 [N] or None.
        position_weights: float [N] or None (ones).
        ignore_index: the label of rows that add nothing.
        dtype: of the result.

    Returns:
        weights [N] and labels int64 [N] or None.
    """
    if position_weights is None:
        weight = torch.ones(rows.shape[0], dtype=dtype, device=rows.device)
    else:
        weight = position_weights.to(dtype)
    if labels is None:
        return weight, None
    counted = labels != ignore_index
    return torch.where(counted, weight, 0.0), torch.where(counted, labels, 0)


def place_missing_mass(
    ids: Tensor,
    weights: Tensor,
    row_weight: Tensor,
    label: Tensor | None,
    rule: MissingMass,
    vocab_size: int,
) -> RowTargets:
    """Apply one of the rules of the module's docstring.

    Args:
        ids: int64 [N, K]; padding has weight 0 and any valid id.
        weights: float [N, K].
        row_weight: [N] in the dtype to compute in.
        label: int64 [N] or None; needed by "ground_truth".
        rule: the rule.
        vocab_size: V, the student's.

    Returns:
        Targets in the dtype of `row_weight`.
    """
    # Rows that do not count may hold anything: their weights become 0, their ids stay.
    weights = torch.where((row_weight != 0)[:, None], weights.to(row_weight.dtype), 0.0)
    mass = weights.sum(1)
    if rule == "drop":
        return RowTargets(ids, weights, row_weight, mass, label)
    if rule == "renormalise":
        present = mass != 0
        weights = torch.where(present[:, None], weights / mass[:, None], 0.0)
        return RowTargets(ids, weights, row_weight, present.to(mass.dtype), label)
    missing = (1 - mass).clamp(min=0)
    whole = mass + missing
    if rule == "smooth":
        return RowTargets(ids, weights, row_weight, whole, label, spread=missing / vocab_size)
    if rule == "ghost":
        return RowTargets(ids, weights, row_weight, whole, label, ghost=missing)
    assert label is not None  # Criterion.require_labels has seen to it
    return RowTargets(
        torch.cat([ids, label[:, None]], 1),
        torch.cat([weights, missing[:, None]], 1),
        row_weight,
        whole,
        label,
    )
