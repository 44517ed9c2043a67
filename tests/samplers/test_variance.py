"""Test the variances of docs/theory.md: exactly by breakpoints, or by a z-test at |z| < 6.

A z-test of this file raises a false alarm in fewer than one run in 10 million with new seeds if
means of 4 096 draws are Gaussian. Seeds are fixed, so a run that passes keeps passing.
"""

import pytest
import torch
from torch import Tensor

from sparselogits.samplers import Multinomial, Systematic, Threshold, window_uniforms
from tests.samplers.distributions import KINDS, logits_of

DRAWS = 4096
ROUNDS = 17


def squared_noise(weights: Tensor, p: Tensor, unembedding: Tensor) -> Tensor:
    """float64 [P]: ||U^T (t - p)||^2 of each draw."""
    return ((weights.double() - p) @ unembedding).square().sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [1.0, 0.8])
def test_independent_rounds_in_hidden_space(kind, exponent):
    """E ||U^T (t - p)||^2 = (sum_i p_i^2 / q_i ||U_i||^2 - ||sum_i p_i U_i||^2) / N."""
    logits = logits_of(kind, 90, seed=5)
    p, q = logits.softmax(-1), (exponent * logits).softmax(-1)
    generator = torch.Generator().manual_seed(1)
    unembedding = torch.randn(90, 8, generator=generator, dtype=torch.float64)
    second = torch.where(p > 0, p * p / q.clamp_min(1e-300), 0) @ unembedding.square().sum(-1)
    expected = (second - (p @ unembedding).square().sum()) / ROUNDS
    uniforms = window_uniforms(7, 0, DRAWS, ROUNDS)
    targets = Multinomial(ROUNDS, exponent)(logits.expand(DRAWS, -1), uniforms)
    noise = squared_noise(targets.dense(), p, unembedding)
    error = float((noise.mean() - expected).abs())
    assert error < 6 * float(noise.std()) / DRAWS**0.5 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_systematic_counts_vary_least_of_all_integers(kind):
    """Var n_i = f (1 - f), f the fractional part of N p_i: exact, over the uniform's breakpoints.

    No integer-valued count of that mean varies less, independent rounds' N p (1 - p) least of all.
    """
    logits = logits_of(kind, 90, seed=6)
    p = logits.softmax(-1)
    breaks = torch.cat([torch.tensor([0.0, 1.0]).double(), (-ROUNDS * p.cumsum(-1)) % 1.0])
    edges = torch.cat([breaks.clamp(0, 1 - 2**-53).unique(), torch.ones(1).double()])
    length, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
    middle = middle.clamp_max(1 - 2**-53)[:, None]
    counts = Systematic(ROUNDS)(logits.expand(len(middle), -1), middle).dense().double() * ROUNDS
    mean = length @ counts
    variance = length @ (counts - mean).square()
    fraction = (ROUNDS * p) % 1.0
    torch.testing.assert_close(variance, fraction * (1 - fraction), atol=1e-6, rtol=0)
    assert bool((variance <= ROUNDS * p * (1 - p) + 1e-6).all())


@pytest.mark.parametrize("kind", ["peaked", "zipf", "random", "ties"])
def test_threshold_inclusion_is_optimal(kind):
    """Of inclusion probabilities with one sum, min(1, p / tau) has the least sum of variances.

    That sum is sum_i p_i^2 / pi_i - p_i^2. Convex in pi, so that no step towards any other feasible
    point lowers it; the feasible points tried are the inclusion probabilities of other powers of p.
    """
    p = logits_of(kind, 200, seed=8).softmax(-1)
    tau = Threshold(0.07).tau
    optimal = (p / tau).clamp_max(1)
    least = (p * p / optimal).sum()
    for power in (0.3, 0.6, 0.9, 1.1, 1.4):
        shape = p**power
        low, high = torch.tensor(0.0).double(), 1e6 / shape.max()
        for _ in range(200):  # the factor that gives the same expected number of entries
            middle = (low + high) / 2
            small = (middle * shape).clamp_max(1).sum() < optimal.sum()
            low, high = (middle, high) if small else (low, middle)
        other = (high * shape).clamp_max(1)
        torch.testing.assert_close(other.sum(), optimal.sum())
        assert float((p * p / other).sum()) > float(least)


def test_systematic_noise_is_less_than_independent_noise():
    """In hidden space with unrelated rows, on every kind of distribution with likely tokens."""
    generator = torch.Generator().manual_seed(2)
    unembedding = torch.randn(90, 64, generator=generator, dtype=torch.float64)
    for kind in ("peaked", "random", "zipf", "ties"):
        logits = logits_of(kind, 90, seed=9)
        noise = {}
        for sampler in (Systematic(ROUNDS), Multinomial(ROUNDS)):
            uniforms = window_uniforms(8, 0, DRAWS, sampler.uniforms_per_position)
            drawn = sampler(logits.expand(DRAWS, -1), uniforms)
            noise[sampler.name] = squared_noise(drawn.dense(), logits.softmax(-1), unembedding)
        gap = noise["multinomial"] - noise["systematic"]
        assert float(gap.mean()) > 6 * float(gap.std()) / DRAWS**0.5
