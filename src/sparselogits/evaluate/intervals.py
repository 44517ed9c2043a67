"""Means and the intervals around them: Student's t, and the bootstrap over windows.

The t interval is for figures that come from a handful of batches. The percentile bootstrap (Efron
and Tibshirani 1993, section 13.3) is for figures over many windows: windows are drawn with
replacement, the figure is formed of each resample, and the interval lies between its quantiles.
A window is the unit because the positions of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError

CONFIDENCE = 0.95
RESAMPLES = 1000
_NUMBERS = 1 << 22  # of a block of resamples, 32 MB

Statistic = Callable[[Tensor], Tensor]
"""From sums over the units, float64 [R, C], to a figure of each of R resamples, float64 [R]."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or a figure of sums, over independent units and the interval around it.

    Args:
        mean: of the units; in general the figure itself.
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


def ratio(sums: Tensor) -> Tensor:
    """The statistic of a mean: the first column over the last."""
    return sums[:, 0] / sums[:, -1]


def bootstrap_interval(
    units: Tensor,
    statistic: Statistic = ratio,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A figure of the sums over all units, with its percentile bootstrap interval.

    The same seed draws the same resamples of equally many units.

    Args:
        units: float64 [W, C], what each unit adds to each of C sums.
        statistic: forms the figure; a ratio of sums for a mean over unequally large units.
        resamples: how many; a 95 % interval wants several hundred.
        seed: of the resamples.
        confidence: share of the resamples in the interval.

    Raises:
        InvalidArgumentError: for no units or resamples, or a confidence outside (0, 1).
    """
    count = len(units)
    if not count or resamples < 1 or not 0 < confidence < 1:
        raise InvalidArgumentError(
            f"a bootstrap needs a unit, a resample and a confidence in (0, 1); got {count} units, "
            f"{resamples} resamples and {confidence}"
        )
    figure = float(statistic(units.sum(0, keepdim=True)))
    if count == 1:
        return Estimate(figure, None, None, 1)
    generator = torch.Generator().manual_seed(seed)
    found = []
    block = max(1, _NUMBERS // count)
    for first in range(0, resamples, block):
        chosen = torch.randint(count, (min(block, resamples - first), count), generator=generator)
        times = torch.zeros(chosen.shape, dtype=torch.float64)
        times.scatter_add_(1, chosen, torch.ones_like(times))
        found.append(statistic(times @ units))
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(found), ends).tolist()
    return Estimate(figure, low, high, count)


def paired_interval(
    first: Tensor,
    second: Tensor,
    statistic: Statistic = ratio,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The first's figure minus the second's, both of the same resamples of the same units.

    What makes a window hard for both cancels, so the interval is narrower than those of the two
    figures suggest.

    Args:
        first: float64 [W, C], see `bootstrap_interval`.
        second: float64 [W, C], in the same order of units.
        statistic: see `bootstrap_interval`, as are the rest.

    Raises:
        InvalidArgumentError: where the units are not the same number, and as there.
    """
    if len(first) != len(second):
        raise InvalidArgumentError(
            f"a paired interval is over the same windows; got {len(first)} and {len(second)}"
        )
    width = first.shape[1]

    def difference(sums: Tensor) -> Tensor:
        return statistic(sums[:, :width]) - statistic(sums[:, width:])

    both = torch.cat([first, second], 1)
    return bootstrap_interval(
        both, difference, resamples=resamples, seed=seed, confidence=confidence
    )


@dataclass(frozen=True)
class SeedEstimate:
    """A figure of several trained models, one a seed, all measured on the same windows.

    Args:
        mean: of the models' figures.
        windows: bootstrap over windows, drawn alike for all models: other text, these models.
        seeds: t interval over the models' figures: other seeds, this text.
        both: bootstrap over windows and seeds at once. With a handful of seeds it is too narrow in
            what it owes to them (three leave the variance a third short); `seeds` is not.
    """

    mean: float
    windows: Estimate
    seeds: Estimate
    both: Estimate


def over_seeds(
    units: Tensor, statistic: Statistic = ratio, *, resamples: int = RESAMPLES, seed: int = 0
) -> SeedEstimate:
    """A figure's mean over seeds.

    Args:
        units: float64 [S, W, C], for every seed what each window adds to each of C sums. For a
            figure of several models (a difference, say) their sums side by side, paired by seed.
        statistic: forms one seed's figure, see `bootstrap_interval`.
        resamples: of windows and seeds.
        seed: of the resamples.

    Raises:
        InvalidArgumentError: as `bootstrap_interval` does.
    """
    models, _, sums = units.shape
    side_by_side = units.transpose(0, 1).flatten(1)

    def figures(summed: Tensor) -> Tensor:
        return torch.stack([statistic(own) for own in torch.split(summed, sums, 1)], 1)

    generator = torch.Generator().manual_seed(seed)

    def mean_of_drawn(summed: Tensor) -> Tensor:
        found = figures(summed)
        drawn = torch.randint(models, (len(found), models), generator=generator)
        return found.gather(1, drawn).mean(1)

    how = {"resamples": resamples, "seed": seed}
    windows = bootstrap_interval(side_by_side, lambda s: figures(s).mean(1), **how)
    both = windows if models == 1 else bootstrap_interval(side_by_side, mean_of_drawn, **how)
    each = figures(side_by_side.sum(0, keepdim=True))[0].tolist()
    return SeedEstimate(
        windows.mean, windows, t_interval(each), Estimate(windows.mean, both.low, both.high, models)
    )


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
