"""Detect a loss that is not finite without waiting for the device in every step.

Losses stay on the device until the Trainer waits for the device anyway, at log lines, checkpoints
and the end of training, or until `_MOST_UNCHECKED` losses are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MOST_UNCHECKED = 512
"""Number of stored losses at which `FiniteGuard.add` requests a check."""


@dataclass(frozen=True)
class NotFinite:
    """Result of a check that found a loss or a weight that is not finite.

    Args:
        step: optimiser step of the first such loss on this rank, counted from 0; None if all losses
            on this rank are finite.
        batch: index of that loss's batch among this rank's batches in the step.
        loss: value of that loss.
    """

    step: int | None = None
    batch: int = 0
    loss: float = float("nan")


class FiniteGuard:
    """Store of the losses of a rank's batches until they are checked."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, int, Tensor]] = []  # step, index of the batch in it, loss
        self._last = (-1, -1)  # step and index of the last batch

    def clear(self) -> None:
        """Discard the stored losses, and restart the count of the batches in a step."""
        self._losses.clear()
        self._last = (-1, -1)

    def add(self, step: int, loss: Tensor) -> bool:
        """Store the loss of a batch, and return whether the losses should be checked now."""
        self._last = (step, self._last[1] + 1 if step == self._last[0] else 0)
        self._losses.append((*self._last, loss.detach().float().reshape(())))
        return len(self._losses) >= _MOST_UNCHECKED

    def check(
        self, sum_over_ranks: Callable[[Tensor], Tensor], model: nn.Module | None = None
    ) -> NotFinite | None:
        """Check the losses stored since the last call, and discard them.

        Args:
            sum_over_ranks: function that sums a vector over all ranks; called on every rank or on
                none.
            model: model whose weights are checked too; None to check only the losses.

        Returns:
            The first loss on this rank that is not finite, or a NotFinite without a step if the
            value is elsewhere; None if all values on all ranks are finite.
        """
        stored, self._losses = self._losses, []
        losses = torch.stack([loss for *_, loss in stored]) if stored else torch.zeros(0)
        wrong = (~losses.isfinite()).sum()[None]
        if model is not None:
            wrong = wrong + sum(
                (~p.detach().isfinite()).any().to(wrong.device) for p in model.parameters()
            )
        if not int(sum_over_ranks(wrong.float())):
            return None
        for (step, batch, _), value in zip(stored, losses.tolist(), strict=True):
            if not math.isfinite(value):
                return NotFinite(step, batch, value)
        return NotFinite()
