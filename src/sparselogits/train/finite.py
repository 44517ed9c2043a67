"""Detect a loss that is not finite without waiting for the device in every step.

The losses of batches stay on the device and are checked together where the Trainer waits anyway: at
a log line, before a checkpoint is saved, and at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AT_MOST = 512
"""Largest number of losses that are kept unchecked, whatever the logging interval."""


@dataclass(frozen=True)
class NotFinite:
    """Describe the first loss that is not finite.

    Args:
        step: step of the loss, counted from 0; None if only weights are not finite, or if another
            rank has the loss.
        batch: number of the batch among the batches of this rank in that step.
        loss: value of the loss.
    """

    step: int | None = None
    batch: int = 0
    loss: float = float("nan")


class FiniteGuard:
    """Keep the losses of a rank's batches until they are checked."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []

    def clear(self) -> None:
        """Discard the losses."""
        self._losses.clear()

    def add(self, step: int, loss: Tensor) -> bool:
        """Keep the loss of a batch, and return whether the losses are due for a check."""
        self._losses.append((step, loss.detach().float().reshape(())))
        return len(self._losses) >= AT_MOST

    def look(
        self, sum_over_ranks: Callable[[Tensor], Tensor], model: nn.Module | None = None
    ) -> NotFinite | None:
        """Return the first loss since the last check that is not finite, on any rank.

        Args:
            sum_over_ranks: function that sums a vector over all ranks; called on every rank or on
                none.
            model: model whose weights are checked too; None checks the losses alone.
        """
        kept, self._losses = self._losses, []
        losses = torch.stack([loss for _, loss in kept]) if kept else torch.zeros(0)
        wrong = (~losses.isfinite()).sum()[None]
        if model is not None:
            wrong = wrong + sum(
                (~p.detach().isfinite()).any().to(wrong.device) for p in model.parameters()
            )
        if not int(sum_over_ranks(wrong.float())):
            return None
        values = losses.tolist()
        for place, (value, finite) in enumerate(
            zip(values, losses.isfinite().tolist(), strict=True)
        ):
            if not finite:
                step = kept[place][0]
                before = sum(other == step for other, _ in kept[:place])
                return NotFinite(step, before, value)
        return NotFinite()
