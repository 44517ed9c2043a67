"""Test that the mean of every unbiased sampler, with every option, is the distribution.

A z-test per id over 4 096 independent draws, for ids drawn at least 20 times; ids drawn less often
are pooled into one. The largest |z| of a case is compared with 1.25 times the two-sided Gaussian
quantile at 1e-6 divided by the number of all tests of this file. The quantile alone would give one
false alarm in a million runs with new seeds if means were Gaussian; means of ids drawn a few dozen
times are skewed, which the factor of 1.25 accounts for. Seeds are fixed, so a run that passes keeps
passing.
"""

from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from sparselogits.samplers import Multinomial, Systematic, Threshold, Uniform, window_uniforms
from sparselogits.samplers.sampler import Sampler
from tests.samplers.distributions import KINDS, logits_of

DRAWS = 4096
SAMPLERS: list[Sampler] = [
    Systematic(1),
    Systematic(12),
    Systematic(50),
    Systematic(12, 0.0),
    Systematic(12, 0.8),
    Systematic(12, 1.2),
    Systematic(12, 2.0),
    Multinomial(1),
    Multinomial(12),
    Multinomial(12, 0.8),
    Multinomial(12, 2.0),
    Uniform(12),
    Threshold(1.0),
    Threshold(0.2),
    Threshold(0.03),
]


def largest_z(weights: Tensor, p: Tensor) -> tuple[float, int]:
    """Largest |z| over ids that were expected often enough, and the number of tests."""
    hits = (weights > 0).sum(0)
    often = hits >= 20
    groups = torch.cat([weights[:, often], weights[:, ~often].sum(1, keepdim=True)], 1)
    expected = torch.cat([p[often], p[~often].sum()[None]])
    frequent = (groups > 0).sum(0) >= 20
    mean, spread = groups.mean(0), groups.std(0) / DRAWS**0.5
    error = (mean - expected).abs() - 2.0**-23 * expected
    z = torch.where(error > 0, error / spread.clamp_min(1e-300), 0)[frequent]
    return (float(z.max()) if z.numel() else 0.0), int(frequent.sum())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mean_is_the_teacher(sampler, kind):
    assert sampler.unbiased
    logits = logits_of(kind, 90, seed=hash_of(kind))
    uniforms = window_uniforms(2024, 0, DRAWS, sampler.uniforms_per_position)
    targets = sampler(logits.expand(DRAWS, -1), uniforms)
    targets.__post_init__(True)
    z, tests = largest_z(targets.dense().double(), logits.softmax(-1))
    family = 1e-6 / (tests * len(SAMPLERS) * len(KINDS)) if tests else 1e-6
    assert z < 1.25 * NormalDist().inv_cdf(1 - family / 2)


def test_the_test_can_fail():
    """The same z-test sees a bias of a tenth of the default's noise at once."""
    logits = logits_of("random", 90, seed=1)
    targets = Systematic(12)(logits.expand(DRAWS, -1), window_uniforms(0, 0, DRAWS, 1))
    weights = targets.dense().double()
    z, _ = largest_z(weights / weights.amax(1, keepdim=True) * weights.amax(), logits.softmax(-1))
    assert z > 20


def hash_of(kind: str) -> int:
    return sum(kind.encode())
