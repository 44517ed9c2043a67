"""Compute means and ratios with intervals: Student's t, Fieller's, and the bootstrap over windows.

Student's t interval is for the mean of values from a few runs or batches, and Fieller's interval
for the ratio of two such means. The percentile bootstrap (Efron and Tibshirani 1993, section 13.3)
is for metrics over many windows, because the positions of one window are not independent. The
bootstrap is not suitable for three seeds: its 95 % interval covers the true mean in at most 80 % of
experiments (`tests/evaluate/test_bootstrap.py`).
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
"""Default coverage of an interval."""
RESAMPLES = 1000
"""Default number of bootstrap resamples."""
_BLOCK_SIZE = 1 << 22
"""Approximate number of float64 values (32 MiB) in one block of resamples."""

Statistic = Callable[[Tensor], Tensor]
"""Function from sums over units, float64 [R, C], to one value per resample, float64 [R]."""

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Value computed from independent units, with its interval.

    Args:
        mean: the value computed from all units.
        low: lower end of the interval; None if no finite interval exists.
        high: upper end of the interval; None if no finite interval exists.
        units: number of units.
    """

    mean: float
    low: float | None
    high: float | None
    units: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "units": self.units}


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Compute the mean of independent, approximately normal values and its two-sided t interval.

    Args:
        values: one value per unit; both ends are None for a single value.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        InvalidArgumentError: there is no value, or `confidence` is outside (0, 1).

    Examples:
        >>> found = t_interval([1.0, 2.0, 3.0])
        >>> found.mean, round(found.low, 2), round(found.high, 2)
        (2.0, -0.48, 4.48)
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
    """Compute the ratio of the means of paired values, with Fieller's interval.

    With means a and b over n pairs and the covariances s of these means, the interval contains
    every ratio r that a t test does not reject, (a - r b)^2 <= t^2 (s_aa - 2 r s_ab + r^2 s_bb),
    where t is the quantile of Student's t with n - 1 degrees of freedom. The ends are the roots of
    that quadratic, if b differs from zero by the same test. Otherwise the set is unbounded and no
    finite interval exists. The interval is in general not symmetric around the ratio.

    Source: Fieller (1954), "Some problems in interval estimation", Journal of the Royal Statistical
    Society B 16(2), 175-185.

    Args:
        numerators: one value per unit.
        denominators: one value per unit, in the same order of units.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        The ratio of the means. Both ends are None for a single pair, and if the mean of the
        denominators is not distinguishable from zero.

    Raises:
        InvalidArgumentError: there are no pairs, the two lengths differ, the mean of the
            denominators is zero, or `confidence` is outside (0, 1).

    Examples:
        >>> found = fieller_interval([0.28, 0.40, 0.34], [0.36, 0.41, 0.47])
        >>> round(found.mean, 2), round(found.low, 2), round(found.high, 2)
        (0.82, 0.5, 1.22)
    """
    count = _checked(numerators, confidence)
    if len(denominators) != count:
        raise InvalidArgumentError(
            f"found {count} numerators and {len(denominators)} denominators, expected one of each "
            "per unit. Give paired values"
        )
    a, b = math.fsum(numerators) / count, math.fsum(denominators) / count
    if not b:
        raise InvalidArgumentError(
            "the mean of the denominators is zero, so the ratio of the means does not exist. "
            "Report the difference instead"
        )
    if count == 1:
        return Estimate(a / b, None, None, 1)
    squared = t_quantile(count - 1, (1 + confidence) / 2) ** 2
    leading = b**2 - squared * _covariance(denominators, denominators)
    middle = a * b - squared * _covariance(numerators, denominators)
    last = a**2 - squared * _covariance(numerators, numerators)
    if leading <= 0:
        return Estimate(a / b, None, None, count)
    # negative only by rounding: the quadratic is at most zero at the ratio a / b
    root = math.sqrt(max(0.0, middle**2 - leading * last))
    return Estimate(a / b, (middle - root) / leading, (middle + root) / leading, count)


def _checked(values: Sequence[float], confidence: float) -> int:
    """Validate the arguments of an interval function, and return the number of values."""
    if not values or not 0 < confidence < 1:
        raise InvalidArgumentError(
            f"found {len(values)} values and the confidence {confidence}; give at least one value "
            "and a confidence in (0, 1), such as 0.95"
        )
    return len(values)


def _covariance(first: Sequence[float], second: Sequence[float]) -> float:
    """Estimate the covariance of two means from their paired values."""
    count = len(first)
    one, other = math.fsum(first) / count, math.fsum(second) / count
    products = ((x - one) * (y - other) for x, y in zip(first, second, strict=True))
    return math.fsum(products) / (count - 1) / count


def ratio(sums: Tensor) -> Tensor:
    """Divide the first column of sums, float64 [R, C], by the last; return the ratios [R]."""
    return sums[:, 0] / sums[:, -1]


def bootstrap_interval(
    units: Tensor,
    statistic: Statistic = ratio,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Compute a value from sums over units, with its percentile bootstrap interval.

    Calls with the same seed and numbers of units and resamples draw the same resamples.

    Args:
        units: contribution of each of W units to each of C sums, float64 [W, C]; both ends are None
            for a single unit.
        statistic: function that computes the value from the sums; the default computes a mean over
            units of different sizes.
        resamples: number of resamples; a 95 % interval needs several hundred.
        seed: random seed for the resamples.
        confidence: share of the resamples inside the interval, in (0, 1).

    Raises:
        InvalidArgumentError: there is no unit or no resample, or `confidence` is outside (0, 1).
    """
    count = len(units)
    if not count or resamples < 1 or not 0 < confidence < 1:
        raise InvalidArgumentError(
            f"found {count} units, {resamples} resamples and the confidence {confidence}; give at "
            "least one unit and one resample, and a confidence in (0, 1), such as 0.95"
        )
    value = float(statistic(units.sum(0, keepdim=True)))
    if count == 1:
        return Estimate(value, None, None, 1)
    found = torch.cat([statistic(sums) for sums in _resampled(units, resamples, seed)])
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(found, ends).tolist()
    return Estimate(value, low, high, count)


def _resampled(units: Tensor, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield the sums over resampled units, float64 [R, C], in blocks of bounded memory."""
    count = len(units)
    generator = torch.Generator().manual_seed(seed)
    block = max(1, _BLOCK_SIZE // count)
    for first in range(0, resamples, block):
        chosen = torch.randint(count, (min(block, resamples - first), count), generator=generator)
        times = torch.zeros(chosen.shape, dtype=torch.float64)
        times.scatter_add_(1, chosen, torch.ones_like(times))
        yield times @ units


def paired_interval(
    first: Tensor,
    second: Tensor,
    statistic: Statistic = ratio,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Compute the first model's value minus the second's, with a paired bootstrap interval.

    Both models are resampled together, so the difficulty of a unit, which is common to both models,
    largely cancels in the difference.

    Args:
        first: contribution of each unit to each of the first model's C sums, float64 [W, C].
        second: the same for the second model, in the same order of units.
        statistic: as in `bootstrap_interval`; so are the remaining arguments.

    Raises:
        InvalidArgumentError: the numbers of units differ, or `bootstrap_interval` raises it.
    """
    if len(first) != len(second):
        raise InvalidArgumentError(
            f"the models were measured on {len(first)} and {len(second)} windows; measure both on "
            "the same windows"
        )
    both, difference = torch.cat([first, second], 1), difference_of(statistic)
    return bootstrap_interval(
        both, difference, resamples=resamples, seed=seed, confidence=confidence
    )


def difference_of(statistic: Statistic) -> Statistic:
    """Return the function that computes a statistic of one model minus that of another.

    The sums of the two models are side by side, float64 [R, 2 C].
    """

    def difference(sums: Tensor) -> Tensor:
        one, other = sums.chunk(2, 1)
        return statistic(one) - statistic(other)

    return difference


@dataclass(frozen=True)
class SeedEstimate:
    """Metric of several trained models, one per seed, on the same windows, with intervals.

    Args:
        mean: mean over the models; for a ratio, the ratio of two means over the models.
        windows: bootstrap interval over windows, with the same resamples for all models; the
            models are fixed.
        seeds: Student's t interval over the models, Fieller's for a ratio; the text is fixed.
        both: interval over models and windows: Student's t (Fieller's) over the models, averaged
            over the resamples of the windows. The ends are those of `windows` if there is only one
            model or one window.
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

    The ends of the interval `both` are the values x at which the average of P(T <= (x - m) / s)
    over the resamples is 2.5 % and 97.5 %; m and s are the mean over models and its standard error
    in one resample, T has Student's t distribution. For a ratio a / b, (x - m) / s is replaced by
    (x b - a) / se(a - x b), as in `fieller_interval`. If all windows are equal, the interval is
    that of `seeds`; if all models are equal, it is about that of `windows`.

    Args:
        units: contribution of each window to each of C sums, per seed, float64 [S, W, C], S at
            least 1. For a metric of several models, such as a difference, C counts the sums of all
            of them.
        statistic: function that computes the metric of one seed, see `bootstrap_interval`.
        denominator: function that computes the denominator of one seed; the result is then the
            ratio of the two means over seeds. None for the mean of `statistic`.
        resamples: number of bootstrap resamples of the windows.
        seed: random seed for the resamples.

    Raises:
        InvalidArgumentError: there is no window or no resample, or the mean denominator is zero.
    """
    models, count, sums = units.shape
    side_by_side = units.transpose(0, 1).flatten(1)

    def values(summed: Tensor) -> tuple[Tensor, Tensor]:
        """Compute numerators and denominators, float64 [R, S] each, from sums [R, S * C]."""
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
    """Compute `SeedEstimate.both` from numerators and denominators, float64 [R, S]."""
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
    """Search upwards from `start` for where a distribution function is (1 + CONFIDENCE) / 2.

    The step is doubled, up to 60 times, until the value is passed; None if it never is.
    """
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

    `degrees` is the number of degrees of freedom, at least 1. The quantile is found by bisection in
    theta = atan(t / sqrt(degrees)), in which the distribution is a finite sum (Abramowitz and
    Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        theta = (low + high) / 2
        below = 0.5 + float(_inside(np.float64(theta), degrees)) / 2 < probability
        low, high = (theta, high) if below else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def two_sided_p(values: Sequence[float]) -> float:
    """Compute the two-sided p-value of the t test that the mean of independent values is zero.

    Raises:
        InvalidArgumentError: there are fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise InvalidArgumentError(f"found {count} values for a t test; give at least two")
    mean, error = math.fsum(values) / count, math.sqrt(_covariance(values, values))
    theta = math.atan2(abs(mean), error * math.sqrt(count - 1))
    return 1 - float(_inside(np.float64(theta), count - 1))


def _inside(theta: _Floats | np.float64, degrees: int) -> Any:
    """Compute P(|T| < sqrt(degrees) |tan theta|) of Student's t, with the sign of theta."""
    cosine = np.cos(theta)
    odd = degrees % 2
    term = total = cosine if odd else np.ones_like(cosine)
    for j in range(3 if odd else 2, degrees, 2):
        term = term * cosine**2 * (j - 1) / j
        total = total + term
    if not odd:
        return np.sin(theta) * total
    return 2 / math.pi * (theta + (np.sin(theta) * total if degrees > 1 else 0.0))
