"""Compute means with their intervals: Student's t, Fieller's, and the bootstrap over windows.

Student's t interval is for values that come from a handful of runs or batches, and Fieller's for
the ratio of two means of such values. The percentile bootstrap (Efron and Tibshirani 1993, section
13.3) is for metrics over many windows: windows are drawn with replacement, the metric is computed
from each resample, and the interval lies between two quantiles. Windows are drawn, not positions,
because the positions of one window are not independent.

A bootstrap over three seeds is no substitute for the first two: its 95 % interval covers the truth
in four of five experiments or fewer (`tests/evaluate/test_bootstrap.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError

CONFIDENCE = 0.95
RESAMPLES = 1000
_NUMBERS = 1 << 22  # numbers in one block of resamples, 32 MB

Statistic = Callable[[Tensor], Tensor]
"""Function from sums over the units, float64 [R, C], to one value per resample, float64 [R]."""

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value computed from independent units, with its interval.

    Args:
        mean: mean of the units, or in general the value computed from all of them.
        low: lower end of the interval; None where no finite interval can be given.
        high: upper end of the interval, None likewise.
        units: number of units.
    """

    mean: float
    low: float | None
    high: float | None
    units: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "units": self.units}


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Compute the mean and its two-sided t interval, for independent values close to normal.

    Raises:
        InvalidArgumentError: if there is no value, or `confidence` is outside (0, 1).
    """
    count = _checked(values, confidence)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, 1)
    half = t_quantile(count - 1, (1 + confidence) / 2) * math.sqrt(_covariance(values, values))
    return Estimate(mean, mean - half, mean + half, count)


def fieller_interval(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> Estimate:
    """Compute the ratio of two means and Fieller's interval around it, for paired values.

    With means a and b over n pairs and the covariances s of these means, the interval holds every
    ratio r that a t test does not reject, (a - r b)^2 <= t^2 (s_aa - 2 r s_ab + r^2 s_bb), where t
    is the quantile of Student's t with n - 1 degrees of freedom. It lies between the roots of that
    quadratic, if b differs from zero by the same test. Otherwise the set is unbounded and no finite
    interval exists. The interval is in general not symmetric around the ratio.

    Source: Fieller (1954), "Some problems in interval estimation", Journal of the Royal Statistical
    Society B 16(2), 175-185.

    Args:
        numerators: one value per unit.
        denominators: one value per unit, in the same order of units.
        confidence: coverage of the interval.

    Returns:
        The ratio of the means. Both ends are None for a single pair, and where the mean of the
        denominators is not distinguishable from zero.

    Raises:
        InvalidArgumentError: if there are no pairs, the two lengths differ, the mean of the
            denominators is zero, or `confidence` is outside (0, 1).

    Example:
        >>> found = fieller_interval([0.28, 0.40, 0.34], [0.36, 0.41, 0.47])
        >>> round(found.mean, 2), round(found.low, 2), round(found.high, 2)
        (0.82, 0.53, 1.18)
    """
    count = _checked(numerators, confidence)
    if len(denominators) != count:
        raise InvalidArgumentError(
            f"a ratio of means needs paired values; got {count} numerators and "
            f"{len(denominators)} denominators. Give one of each per unit"
        )
    above, below = math.fsum(numerators) / count, math.fsum(denominators) / count
    if not below:
        raise InvalidArgumentError(
            "the mean of the denominators is zero, so the ratio of the means does not exist. "
            "Report the difference instead"
        )
    if count == 1:
        return Estimate(above / below, None, None, 1)
    squared = t_quantile(count - 1, (1 + confidence) / 2) ** 2
    leading = below**2 - squared * _covariance(denominators, denominators)
    middle = above * below - squared * _covariance(numerators, denominators)
    last = above**2 - squared * _covariance(numerators, numerators)
    if leading <= 0:
        return Estimate(above / below, None, None, count)
    # non-negative: the quadratic is at most zero at the ratio itself
    root = math.sqrt(max(0.0, middle**2 - leading * last))
    return Estimate(above / below, (middle - root) / leading, (middle + root) / leading, count)


def _checked(values: Sequence[float], confidence: float) -> int:
    """Return the number of values, after checking the arguments of an interval."""
    if not values or not 0 < confidence < 1:
        raise InvalidArgumentError(
            f"an interval needs at least one value and a confidence in (0, 1); got {len(values)} "
            f"values and {confidence}"
        )
    return len(values)


def _covariance(first: Sequence[float], second: Sequence[float]) -> float:
    """Estimate the covariance of two means from their paired values."""
    count = len(first)
    one, other = math.fsum(first) / count, math.fsum(second) / count
    products = ((x - one) * (y - other) for x, y in zip(first, second, strict=True))
    return math.fsum(products) / (count - 1) / count


def ratio(sums: Tensor) -> Tensor:
    """Compute a mean: the first column of the sums divided by the last."""
    return sums[:, 0] / sums[:, -1]


def bootstrap_interval(
    units: Tensor,
    statistic: Statistic = ratio,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Compute a value from the sums over all units, with its percentile bootstrap interval.

    The same seed draws the same resamples for the same number of units.

    Args:
        units: float64 [W, C], contribution of each unit to each of C sums.
        statistic: computes the value; a ratio of sums for a mean over units of different sizes.
        resamples: number of resamples; a 95 % interval needs several hundred.
        seed: random seed of the resamples.
        confidence: share of the resamples inside the interval.

    Raises:
        InvalidArgumentError: if there is no unit or no resample, or `confidence` is outside (0, 1).
    """
    count = len(units)
    if not count or resamples < 1 or not 0 < confidence < 1:
        raise InvalidArgumentError(
            f"a bootstrap needs a unit, a resample and a confidence in (0, 1); got {count} units, "
            f"{resamples} resamples and {confidence}"
        )
    value = float(statistic(units.sum(0, keepdim=True)))
    if count == 1:
        return Estimate(value, None, None, 1)
    found = torch.cat([statistic(sums) for sums in _resampled(units, resamples, seed)])
    return Estimate(value, *_between(found, confidence), count)


def _resampled(units: Tensor, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield the sums of resamples of the units, float64 [R, C], in blocks of bounded memory."""
    count = len(units)
    generator = torch.Generator().manual_seed(seed)
    block = max(1, _NUMBERS // count)
    for first in range(0, resamples, block):
        chosen = torch.randint(count, (min(block, resamples - first), count), generator=generator)
        times = torch.zeros(chosen.shape, dtype=torch.float64)
        times.scatter_add_(1, chosen, torch.ones_like(times))
        yield times @ units


def _between(found: Tensor, confidence: float) -> tuple[float, float]:
    """Return the two quantiles that enclose this share of the values."""
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(found, ends).tolist()
    return low, high


def paired_interval(
    first: Tensor,
    second: Tensor,
    statistic: Statistic = ratio,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Compute the difference of two models' values, with both in every resample of the same units.

    What makes a window hard for both models cancels, so the interval is narrower than the intervals
    of the two values suggest.

    Args:
        first: float64 [W, C], see `bootstrap_interval`.
        second: float64 [W, C], in the same order of units.
        statistic: see `bootstrap_interval`, as for the other arguments.

    Raises:
        InvalidArgumentError: if the numbers of units differ, and as `bootstrap_interval` does.
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
    """A metric of several trained models, one per seed, all measured on the same windows.

    Args:
        mean: mean over the models; for a ratio, the ratio of two means over the models.
        windows: bootstrap over windows, drawn alike for all models. The models are fixed.
        seeds: Student's t over the models, Fieller's interval for a ratio. The text is fixed.
        both: covers both: Student's t (Fieller's) over the models, averaged over the resamples of
            the windows. Equal to `windows` for a single model.
    """

    mean: float
    windows: Estimate
    seeds: Estimate
    both: Estimate


def over_seeds(
    units: Tensor,
    statistic: Statistic = ratio,
    denominator: Statistic | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> SeedEstimate:
    """Compute a metric's mean over seeds, or a ratio of two such means, with its intervals.

    The interval `both` ends where the average over the resamples of P(T <= (x - m) / s) reaches 2.5
    and 97.5 %; m and s are the mean over models and its standard error in one resample, T has
    Student's t distribution. For a ratio (x - m) / s is (x b - a) / se(a - x b), as in
    `fieller_interval`. Windows that do not matter leave the t interval, models that do not differ
    leave the bootstrap over windows.

    Args:
        units: float64 [S, W, C], contribution of each window to each of C sums, per seed. For a
            metric of several models (a difference, say) their sums side by side, paired by seed.
        statistic: computes the metric for one seed, see `bootstrap_interval`.
        denominator: computes what the metric is divided by; the mean over seeds of the one is then
            divided by the mean over seeds of the other.
        resamples: number of resamples of the windows.
        seed: random seed of the resamples.

    Raises:
        InvalidArgumentError: as `bootstrap_interval` does.
    """
    models, count, sums = units.shape
    side_by_side = units.transpose(0, 1).flatten(1)

    def values(summed: Tensor) -> tuple[Tensor, Tensor]:
        """Compute numerators and denominators from sums [R, S * C], each float64 [R, S]."""
        own = torch.split(summed, sums, 1)
        above = torch.stack([statistic(one) for one in own], 1)
        if denominator is None:
            return above, torch.ones_like(above)
        return above, torch.stack([denominator(one) for one in own], 1)

    def quotient(summed: Tensor) -> Tensor:
        above, below = values(summed)
        return above.mean(1) / below.mean(1)

    windows = bootstrap_interval(side_by_side, quotient, resamples=resamples, seed=seed)
    above, below = (part[0].tolist() for part in values(side_by_side.sum(0, keepdim=True)))
    over = t_interval(above) if denominator is None else fieller_interval(above, below)
    if models == 1 or count == 1:
        both = windows
    else:
        drawn = [values(part) for part in _resampled(side_by_side, resamples, seed)]
        parts = (torch.cat(part).numpy() for part in zip(*drawn, strict=True))
        both = _over_models_and_windows(windows.mean, *parts)
    return SeedEstimate(
        windows.mean, windows, over, Estimate(windows.mean, both.low, both.high, models)
    )


def _over_models_and_windows(value: float, above: _Floats, below: _Floats) -> Estimate:
    """Find the ends of `SeedEstimate.both`, from the numerators and denominators [R, S]."""
    models = above.shape[1]
    a, b = above.mean(1), below.mean(1)
    off_a, off_b = above - a[:, None], below - b[:, None]
    pairs = ((off_a, off_a), (off_a, off_b), (off_b, off_b))
    aa, ab, bb = (np.sum(x * y, 1) / (models - 1) / models for x, y in pairs)

    def share_below(x: float) -> float:
        error = np.sqrt(np.maximum(aa - 2 * x * ab + x * x * bb, 0.0))
        theta = np.arctan2(x * b - a, error * math.sqrt(models - 1))
        return float(np.mean(0.5 + _inside(theta, models - 1) / 2))

    spread = float(np.sqrt(np.mean(aa)) + np.std(a)) / abs(float(np.mean(b)))
    step = max(spread, 1e-9 * abs(value), 1e-300)
    low = _reached(lambda x: 1 - share_below(-x), -value, step)
    high = _reached(share_below, value, step)
    if low is None or high is None:
        return Estimate(value, None, None, models)
    return Estimate(value, -low, high, models)


def _reached(rising: Callable[[float], float], start: float, step: float) -> float | None:
    """Return where a rising function reaches the upper quantile; None if it never does."""
    wanted = (1 + CONFIDENCE) / 2
    low = high = start
    for _ in range(60):
        if rising(high) >= wanted:
            break
        low, high, step = high, high + step, 2 * step
    else:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) >= wanted else (middle, high)
    return high


@cache
def t_quantile(degrees: int, probability: float) -> float:
    """Compute a quantile of Student's t distribution, for a probability in [0.5, 1).

    Bisects in theta = atan(t / sqrt(degrees)), in which the distribution for an integer number of
    degrees of freedom is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        theta = (low + high) / 2
        below = 0.5 + float(_inside(np.float64(theta), degrees)) / 2 < probability
        low, high = (theta, high) if below else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def two_sided_p(values: Sequence[float]) -> float:
    """Compute the p-value of the t test that the mean of independent values is zero.

    Raises:
        InvalidArgumentError: if there are fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise InvalidArgumentError(f"a t test needs at least two values; got {count}")
    mean, error = math.fsum(values) / count, math.sqrt(_covariance(values, values))
    theta = math.atan2(abs(mean), error * math.sqrt(count - 1))
    return 1 - float(_inside(np.float64(theta), count - 1))


def _inside(theta: _Floats | np.float64, degrees: int) -> Any:
    """Compute P(|T| < sqrt(degrees) tan theta), with the sign of theta."""
    cosine = np.cos(theta)
    odd = degrees % 2
    term = total = cosine if odd else np.ones_like(cosine)
    for j in range(3 if odd else 2, degrees, 2):
        term = term * cosine**2 * (j - 1) / j
        total = total + term
    if not odd:
        return np.sin(theta) * total
    return 2 / math.pi * (theta + (np.sin(theta) * total if degrees > 1 else 0.0))
