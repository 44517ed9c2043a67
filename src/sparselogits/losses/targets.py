"""Apply the missing-mass rules, and convert targets to the input for the row losses.

Let t be the stored weights of a position, m = max(0, 1 - sum t) the missing mass (arXiv 2503.16870,
section 3), and V the student's vocabulary size. The rules give these targets:

    drop           t, unchanged
    renormalise    t / sum t; 0 if the sum is 0
    smooth         t_j + m / V on every id j
    ghost          t, and mass m on one more class, the union of all other ids
    ground_truth   t, and mass m on the label
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparselogits.losses.criterion import MissingMass


class RowTargets(NamedTuple):
    """Targets of N rows, in the accumulation dtype of the loss.

    Attributes:
        ids: int64 [N, E].
        weights: [N, E]; 0 for padding. With "ground_truth" the last column belongs to the label.
        row_weight: [N]; 0 for rows excluded from the loss (ignored label or position weight 0).
        mass: total mass of the target after the missing-mass rule, [N].
        label: int64 or int32 [N], 0 for ignored rows; None without labels.
        ghost: mass of the ghost class, [N]; None without a ghost class.
        spread: mass added to every id of the vocabulary, [N]; None without smoothing.
    """

    ids: Tensor
    weights: Tensor
    row_weight: Tensor
    mass: Tensor
    label: Tensor | None = None
    ghost: Tensor | None = None
    spread: Tensor | None = None

    def rows(self, rows: slice) -> RowTargets:
        """Return the targets of some rows, as views."""
        return RowTargets._make(None if t is None else t[rows] for t in self)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses and sums: float64 for float64 input, float32 for any other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def place_missing_mass(
    ids: Tensor,
    weights: Tensor,
    row_weight: Tensor,
    label: Tensor | None,
    rule: MissingMass,
    vocab_size: int,
) -> RowTargets:
    """Apply a missing-mass rule to targets with ids and weights [N, K], row weights and labels [N].

    Weights are converted to the accumulation dtype, which is that of `row_weight`.
    """
    # Excluded rows may contain NaN: their weights are set to 0.
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
