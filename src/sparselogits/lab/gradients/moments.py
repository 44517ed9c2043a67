"""Compute metrics of a target's gradients from inner products with full distillation's gradient.

Let g be the gradient of full distillation on some text, g_1 ... g_R the gradients of R draws of a
target, and e_r = g_r - g. All metrics follow from inner products, which add up over positions if
the gradients of positions are concatenated:

    angle         arccos <g, g_r> / (|g| |g_r|)
    norm ratio    |g_r| / |g|
    squared bias  the mean of <e_r, e_q> over pairs r != q, divided by |g|^2
    variance      (sum |e_r|^2 - |sum e_r|^2 / R) / (R - 1), divided by |g|^2

The mean over pairs of different draws has expectation |E e|^2; it can be negative if the bias is
small. A target that is not random needs one draw: its squared bias is |e|^2 / |g|^2 and its
variance is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2**16
"""Number of values converted to float64 at a time, so that they fit in the processor's cache."""


@dataclass(frozen=True)
class Moments:
    """Inner products of a target's gradients g_r and full distillation's gradient g.

    Args:
        full: |g|^2.
        dots: <g, g_r> of each draw, float64 [R].
        squares: |g_r|^2 of each draw, float64 [R].
        total: |g_1 + ... + g_R|^2.
    """

    full: float
    dots: Tensor
    squares: Tensor
    total: float

    @staticmethod
    def of(full: Tensor, estimates: Iterable[Tensor]) -> Moments:
        """Compute the inner products of g and g_1 ... g_R, tensors of one shape, in float64."""
        dots, squares, total = [], [], None
        for estimate in estimates:
            dots.append(_dot(full, estimate))
            squares.append(_dot(estimate, estimate))
            total = estimate if total is None else total + estimate
        assert total is not None
        return Moments(
            _dot(full, full),
            torch.tensor(dots, dtype=torch.float64),
            torch.tensor(squares, dtype=torch.float64),
            squares[0] if len(squares) == 1 else _dot(total, total),
        )

    @staticmethod
    def zero(draws: int) -> Moments:
        """Return zero moments, to which the moments of positions can be added."""
        zeros = torch.zeros(draws, dtype=torch.float64)
        return Moments(0.0, zeros, zeros, 0.0)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the gradients concatenated over the positions of both operands."""
        return Moments(
            self.full + other.full,
            self.dots + other.dots,
            self.squares + other.squares,
            self.total + other.total,
        )

    @property
    def draws(self) -> int:
        """Number of draws R."""
        return len(self.dots)

    def angles(self) -> Tensor:
        """Compute the angle per draw in degrees, float64 [R]; 90 if a gradient is zero."""
        scale = (self.full * self.squares).sqrt()
        cosine = torch.where(scale > 0, self.dots / scale, 0.0)
        return cosine.clamp(-1, 1).acos().rad2deg()

    def norm_ratios(self) -> Tensor:
        """Compute the norm ratio |g_r| / |g| per draw, float64 [R]."""
        return (self.squares / self.full).sqrt()

    def squared_bias(self) -> float:
        """Estimate the squared bias relative to |g|^2; the unbiased estimate may be negative."""
        if self.draws == 1:
            return float(self._errors()[0]) / self.full
        pairs = self._error_of_sum() - float(self._errors().sum())
        return pairs / (self.draws * (self.draws - 1)) / self.full

    def variance(self) -> float:
        """Estimate the trace of the covariance over draws relative to |g|^2; 0 for one draw."""
        if self.draws == 1:
            return 0.0
        within = float(self._errors().sum()) - self._error_of_sum() / self.draws
        return within / (self.draws - 1) / self.full

    def _errors(self) -> Tensor:
        """Compute |e_r|^2 per draw, float64 [R]."""
        return self.squares - 2 * self.dots + self.full

    def _error_of_sum(self) -> float:
        """Compute |e_1 + ... + e_R|^2."""
        return self.total - 2 * self.draws * float(self.dots.sum()) + self.draws**2 * self.full


def _dot(a: Tensor, b: Tensor) -> float:
    """Compute the inner product of two tensors of the same shape, in float64."""
    a, b = a.flatten(), b.flatten()
    parts = [
        torch.dot(a[start : start + _BLOCK].double(), b[start : start + _BLOCK].double())
        for start in range(0, len(a), _BLOCK)
    ]
    return float(torch.stack(parts).sum()) if parts else 0.0
