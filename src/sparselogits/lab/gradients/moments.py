"""What there is to know of a gradient beside another: inner products, and figures made of them.

With g the gradient of full distillation on some text and g_1 ... g_R those of a target in R
draws, on the same text and of the same student, four kinds of inner products hold everything:
|g|^2, <g, g_r>, |g_r|^2 and |g_1 + ... + g_R|^2. They add up over positions where gradients of
positions stand beside each other, as in logit and hidden space. With e_r = g_r - g:

    angle         arccos <g, g_r> / (|g| |g_r|)
    norm ratio    |g_r| / |g|
    squared bias  the mean of <e_r, e_q> over pairs r != q, over |g|^2
    variance      (sum |e_r|^2 - |sum e_r|^2 / R) / (R - 1), over |g|^2

The mean over pairs of *different* draws has expectation |E e|^2: the noise that |mean of e_r|^2
still holds at finite R is not in it. It can come out negative where there is no bias. A target
that is not random needs one draw: its squared bias is |e|^2 and its variance 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Inner products of one target's gradients with full distillation's.

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
    def of(full: Tensor, estimates: Sequence[Tensor]) -> Moments:
        """Of gradients of any one shape, in float64 whatever their dtype."""
        g = full.double().flatten()
        dots, squares = [], []
        total = torch.zeros_like(g)
        for estimate in estimates:
            wide = estimate.double().flatten()
            dots.append(torch.dot(g, wide))
            squares.append(torch.dot(wide, wide))
            total += wide
        return Moments(
            float(torch.dot(g, g)),
            torch.stack(dots).cpu(),
            torch.stack(squares).cpu(),
            float(torch.dot(total, total)),
        )

    @staticmethod
    def zero(draws: int) -> Moments:
        """Of no positions."""
        nothing = torch.zeros(draws, dtype=torch.float64)
        return Moments(0.0, nothing, nothing, 0.0)

    def __add__(self, other: Moments) -> Moments:
        """Of both lots of positions, side by side."""
        return Moments(
            self.full + other.full,
            self.dots + other.dots,
            self.squares + other.squares,
            self.total + other.total,
        )

    @property
    def draws(self) -> int:
        """R."""
        return len(self.dots)

    def angles(self) -> Tensor:
        """float64 [R], degrees in [0, 180]; 90 against a gradient of norm 0."""
        scale = (self.full * self.squares).sqrt()
        cosine = torch.where(scale > 0, self.dots / scale, 0.0)
        return cosine.clamp(-1, 1).acos().rad2deg()

    def norm_ratios(self) -> Tensor:
        """float64 [R]."""
        return (self.squares / self.full).sqrt()

    def squared_bias(self) -> float:
        """Relative to |g|^2; unbiased, so it may be negative."""
        if self.draws == 1:
            return float(self._errors()[0]) / self.full
        pairs = self._error_of_sum() - float(self._errors().sum())
        return pairs / (self.draws * (self.draws - 1)) / self.full

    def variance(self) -> float:
        """Trace of the covariance over draws, relative to |g|^2; 0 from a single draw."""
        if self.draws == 1:
            return 0.0
        within = float(self._errors().sum()) - self._error_of_sum() / self.draws
        return within / (self.draws - 1) / self.full

    def _errors(self) -> Tensor:
        """|e_r|^2."""
        return self.squares - 2 * self.dots + self.full

    def _error_of_sum(self) -> float:
        """|sum of e_r|^2."""
        return self.total - 2 * self.draws * float(self.dots.sum()) + self.draws**2 * self.full
