"""Means with Student's t intervals, for figures that come from a handful of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparselogits.errors import InvalidArgumentError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over independent units and the interval around it.

    Args:
        mean: of the units.
        low: lower end of the interval; None where a single unit leaves nothing to judge by.
        high: upper end, likewise.
        units: how many the mean is over.
    """

    mean: float
    low: float | None
    high: float | None
    units: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "units": self.units}


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean and two-sided t interval of independent, about normally distributed units.

    Raises:
        InvalidArgumentError: for no units, or a confidence outside (0, 1).
    """
    if not values or not 0 < confidence < 1:
        raise InvalidArgumentError(
            f"an interval needs at least one value and a confidence in (0, 1); got {len(values)} "
            f"values and {confidence}"
        )
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, 1)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1) / count)
    half = t_quantile(count - 1, (1 + confidence) / 2) * spread
    return Estimate(mean, mean - half, mean + half, count)


def t_quantile(degrees: int, probability: float) -> float:
    """Quantile of Student's t distribution, for a probability in [0.5, 1).

    By bisection in theta = atan(t / sqrt(degrees)), in which the distribution of an integer number
    of degrees is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        theta = (low + high) / 2
        below = 0.5 + _inside(theta, degrees) / 2 < probability
        low, high = (theta, high) if below else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def _inside(theta: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan theta)."""
    cosine = math.cos(theta)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for j in range(3 if odd else 2, degrees, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    if not odd:
        return math.sin(theta) * total
    return 2 / math.pi * (theta + (math.sin(theta) * total if degrees > 1 else 0.0))
