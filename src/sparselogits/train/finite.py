"""Notice a loss that is not finite, without waiting for the device at each step.

The losses of batches are kept on the device and looked at together, where the Trainer waits anyway:
at a log line, before a checkpoint is saved, and at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AT_MOST = 512
"""Losses kept before they are looked at, whatever the logging interval."""


@dataclass(frozen=True)
class NotFinite:
    """What was found.

    Args:
        step: the first step with a loss that is not finite, counted from 0; None where only the
            weights are not, or where another rank has the loss.
        batch: number of the batch among those that this rank took in that step.
        loss: the loss.
    """

    step: int | None = None
    batch: int = 0
    loss: float = float("nan")


class FiniteGuard:
    """Losses of a rank's batches since they were last looked at."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []

    def clear(self) -> None:
        """Forget the losses, as at the beginning of a run."""
        self._losses.clear()

    def add(self, step: int, loss: Tensor) -> bool:
        """Keep the loss of a batch; returns whether it is time to look."""
        self._losses.append((step, loss.detach().float().reshape(())))
        return len(self._losses) >= AT_MOST

    def look(
        self, sum_over_ranks: Callable[[Tensor], Tensor], model: nn.Module | None = None
    ) -> NotFinite | None:
        """Find the first loss since the last look that is not finite, on any rank.

        Args:
            sum_over_ranks: sums a vector over all ranks; called on every rank or on none.
            model: look at these weights as well.
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
