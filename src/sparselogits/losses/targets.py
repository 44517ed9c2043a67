"""Convert targets to the form that the row losses take, and apply the missing-mass rules.

With t the stored weights of a position, V the student's vocabulary size and m = max(0, 1 - sum t)
the missing mass (section 3 of the RS-KD paper: Top-K and its partial remedies), the rules are:

    drop           t is left as it is, whatever its mass
    renormalise    t / sum t
    smooth         t_j + m / V on every id j
    ghost          one more class, "none of the stored ids": m against the student's mass M there,
                   so the gradient is s - t on stored ids and s (1 - m / M) on all others
    ground_truth   t, and m on the label

The cost is a few [N, K] temporaries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparselogits.losses.criterion import MissingMass


class RowTargets(NamedTuple):
    """Hold the targets of N rows, in the dtype that the loss computes in.

    Attributes:
        ids: int64 [N, E].
        weights: [N, E]; 0 marks padding. The last column may hold the label (ground_truth).
        row_weight: [N]; 0 where a row adds nothing (ignored label or position weight 0).
        mass: [N], total mass of the target, including what a rule has added.
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
        """Return a contiguous run of rows, as views."""
        return RowTargets._make(None if t is None else t[rows] for t in self)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that losses and sums are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        row_weight: [N], in the dtype to compute in.
        label: int64 [N] or None; "ground_truth" needs labels.
        rule: the rule.
        vocab_size: V, the student's vocabulary size.

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
    assert label is not None  # checked by Criterion.require_labels
    return RowTargets(
        torch.cat([ids, label[:, None]], 1),
        torch.cat([weights, missing[:, None]], 1),
        row_weight,
        whole,
        label,
    )
