"""Compare a gradient with another one by inner products, and compute metrics from these.

With g the gradient of full distillation on some text and g_1 ... g_R those of a target in R
draws, on the same text and for the same student, four kinds of inner products suffice: |g|^2,
<g, g_r>, |g_r|^2 and |g_1 + ... + g_R|^2. They add up over positions where the gradients of
positions are kept side by side, as in logit and hidden space. With e_r = g_r - g:

    angle         arccos <g, g_r> / (|g| |g_r|)
    norm ratio    |g_r| / |g|
    squared bias  the mean of <e_r, e_q> over pairs r != q, divided by |g|^2
    variance      (sum |e_r|^2 - |sum e_r|^2 / R) / (R - 1), divided by |g|^2

The mean over pairs of different draws has expectation |E e|^2: it does not contain the noise that
|mean of e_r|^2 has at finite R. It can be negative where there is no bias. A target that is not
random needs one draw: its squared bias is |e|^2 and its variance 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2**16  # numbers that are converted to float64 at a time, so that they stay in cache


@dataclass(frozen=True)
class Moments:
    """Hold the inner products of one target's gradients with full distillation's.

    Args:
        full: |g|^2.
        dots: float64 [R], <g, g_r>.
        squares: float64 [R], |g_r|^2.
        total: |g_1 + ... + g_R|^2.
    """

    full: float
    dots: Tensor
    squares: Tensor
    total: float

    @staticmethod
    def of(full: Tensor, estimates: Iterable[Tensor]) -> Moments:
        """Compute the inner products of gradients of one shape, in float64 whatever their dtype.

        Args:
            full: g.
            estimates: g_1 ... g_R, at least one; read once, so they may be made one by one.
        """
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
        """Return the moments of no positions."""
        nothing = torch.zeros(draws, dtype=torch.float64)
        return Moments(0.0, nothing, nothing, 0.0)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the positions of both, side by side."""
        return Moments(
            self.full + other.full,
            self.dots + other.dots,
            self.squares + other.squares,
            self.total + other.total,
        )

    @property
    def draws(self) -> int:
        """Number of draws, R."""
        return len(self.dots)

    def angles(self) -> Tensor:
        """Return the angle of each draw, float64 [R], in degrees; 90 if a gradient is zero."""
        scale = (self.full * self.squares).sqrt()
        cosine = torch.where(scale > 0, self.dots / scale, 0.0)
        return cosine.clamp(-1, 1).acos().rad2deg()

    def norm_ratios(self) -> Tensor:
        """Return the norm ratio of each draw, float64 [R]."""
        return (self.squares / self.full).sqrt()

    def squared_bias(self) -> float:
        """Return an unbiased estimate of the squared bias over |g|^2; it may be negative."""
        if self.draws == 1:
            return float(self._errors()[0]) / self.full
        pairs = self._error_of_sum() - float(self._errors().sum())
        return pairs / (self.draws * (self.draws - 1)) / self.full

    def variance(self) -> float:
        """Return the trace of the covariance over draws, relative to |g|^2; 0 for one draw."""
        if self.draws == 1:
            return 0.0
        within = float(self._errors().sum()) - self._error_of_sum() / self.draws
        return within / (self.draws - 1) / self.full

    def _errors(self) -> Tensor:
        """Return |e_r|^2 for each draw."""
        return self.squares - 2 * self.dots + self.full

    def _error_of_sum(self) -> float:
        """Return |sum of e_r|^2."""
        return self.total - 2 * self.draws * float(self.dots.sum()) + self.draws**2 * self.full


def _dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two tensors of one shape, computed in float64."""
    a, b = a.flatten(), b.flatten()
    parts = [
        torch.dot(a[start : start + _BLOCK].double(), b[start : start + _BLOCK].double())
        for start in range(0, len(a), _BLOCK)
    ]
    return float(torch.stack(parts).sum()) if parts else 0.0
