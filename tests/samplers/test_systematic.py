"""Test systematic rounds against their definition, by the breakpoints of the uniform."""

import pytest
import torch
from torch import Tensor

from sparselogits.samplers import Systematic, Threshold, window_uniforms
from sparselogits.samplers.distribution import Blocks
from tests.samplers.distributions import KINDS, logits_of


def exact_counts(probabilities: Tensor, rounds: int, uniform: Tensor) -> Tensor:
    """floor(N C_i + u) - floor(N C_{i-1} + u), float64 [U, V] for uniforms [U, 1]."""
    after = (rounds * probabilities.cumsum(-1) + uniform).floor()
    return after.diff(dim=-1, prepend=torch.zeros_like(after[:, :1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounds", [1, 7, 50])
def test_inclusion_probabilities_by_breakpoints(kind, rounds):
    """Counts change only where N C_i + u is an integer; between breakpoints the draw is constant.

    The mean count over all intervals, weighed by their lengths, is the marginal: it must be N p_i.
    """
    logits = logits_of(kind, 150, seed=rounds)
    p = logits.softmax(-1)
    breaks = torch.cat([torch.tensor([0.0, 1.0]).double(), (-rounds * p.cumsum(-1)) % 1.0])
    breaks = breaks.clamp(0, 1 - 2**-53).unique()
    edges = torch.cat([breaks, torch.ones(1, dtype=torch.float64)])
    length, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
    usable = length > 0
    middle, length = middle[usable].clamp_max(1 - 2**-53)[:, None], length[usable]
    draws = Systematic(rounds)(logits.expand(len(middle), -1), middle)
    draws.__post_init__(True)
    mean = (draws.dense().double() * length[:, None]).sum(0)
    included = ((draws.dense() > 0) * length[:, None]).sum(0)
    # weights are float32: 2**-24 of rounding a count / N
    torch.testing.assert_close(mean, p, atol=1e-9, rtol=2**-23)
    torch.testing.assert_close(included, (rounds * p).clamp_max(1), atol=rounds * 1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_follow_the_formula(kind):
    logits = logits_of(kind, 1000, seed=3).expand(64, -1)
    uniforms = window_uniforms(5, 7, 64, 1)
    drawn = Systematic(50)(logits, uniforms)
    expected = exact_counts(logits.softmax(-1), 50, uniforms)
    # A breakpoint within 1e-9 of the uniform may fall on either side: none does for this seed.
    assert torch.equal((drawn.dense() * 50).round().double(), expected)
    assert drawn.counts is not None
    assert torch.equal(drawn.weights, drawn.counts.float() / 50)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.8, 1.0, 1.3, 2.0])
def test_counts_sum_to_rounds_and_weights_are_importance_weights(exponent):
    logits = logits_of("zeros", 999, seed=4).expand(32, -1)
    sampler = Systematic(37, exponent)
    drawn = sampler(logits, window_uniforms(0, 0, 32, 1))
    drawn.__post_init__(True)
    p = logits[0].softmax(-1)
    q = (
        (logits[0] > -torch.inf).double() / (logits[0] > -torch.inf).sum()
        if exponent == 0
        else (exponent * logits[0]).softmax(-1)
    )
    assert drawn.counts is not None
    expected = drawn.counts / 37 * (p / q)[drawn.ids]
    torch.testing.assert_close(drawn.weights.double(), expected, atol=0, rtol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("offset", [3.3, -100.0, 100.0])
def test_marginals_within_1e_9_at_large_vocabularies(dtype, scale, offset):
    generator = torch.Generator().manual_seed(int(scale * 100))
    logits = (torch.randn(6, 100_003, generator=generator) * scale + offset).to(dtype)
    blocks = Blocks.of(logits)
    p = logits.double().softmax(-1)
    padded = torch.nn.functional.pad(p, (0, -p.shape[1] % 64)).view(6, -1, 64)
    in_block = padded.sum(-1)
    # Within a block the marginals are exact shares of the block's own.
    worst = padded.amax(-1) * (blocks.sums / blocks.total / in_block.clamp_min(1e-300) - 1).abs()
    assert float(worst.max()) < 1e-9
    edges, _ = blocks.edges()
    fixed = edges.diff(dim=-1, prepend=torch.zeros_like(edges[:, :1])) / edges[:, -1:].double()
    assert float((fixed - blocks.sums / blocks.total).abs().max()) < 1e-15


def test_marginals_within_1e_9_with_a_hundred_thousand_ties():
    logits = torch.full((2, 131_072), 0.3)
    logits[:, 7] = 0.3 + torch.tensor(131_071.0).log()
    blocks = Blocks.of(logits)
    share = blocks.sums / blocks.total
    exact = logits.double().softmax(-1).view(2, -1, 64).sum(-1)
    assert float((share - exact).abs().max()) < 1e-9


def test_vocabulary_of_262144_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 262_144, generator=generator) * 4).bfloat16()
    uniforms = window_uniforms(1, 1, 3, 1)
    drawn = Systematic(50)(logits, uniforms)
    drawn.__post_init__(True)
    expected = exact_counts(logits.double().softmax(-1), 50, uniforms)
    assert torch.equal((drawn.dense() * 50).round().double(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1.0, 0.3, 0.05])
def test_threshold_inclusion_probabilities_by_breakpoints(kind, tau):
    logits = logits_of(kind, 150, seed=11)
    p = logits.softmax(-1)
    light = torch.where(p < tau * (1 - 1e-12), p, 0)
    breaks = torch.cat([torch.zeros(1).double(), (-light.cumsum(-1) / tau) % 1.0]).unique()
    edges = torch.cat([breaks, torch.ones(1, dtype=torch.float64)])
    length, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
    usable = length > 0
    middle, length = middle[usable].clamp_max(1 - 2**-53)[:, None], length[usable]
    drawn = Threshold(tau)(logits.expand(len(middle), -1), middle)
    drawn.__post_init__(True)
    mean = (drawn.dense().double() * length[:, None]).sum(0)
    included = ((drawn.dense() > 0) * length[:, None]).sum(0)
    torch.testing.assert_close(mean, p, atol=1e-9, rtol=2**-23)
    torch.testing.assert_close(included, (p / tau).clamp_max(1), atol=1e-8, rtol=1e-9)
    assert int(drawn.entries_per_position.max()) <= 1 / tau + 1


def test_masked_ids_are_never_drawn():
    """Levels at both ends of the unit interval, masked ids at both ends of the vocabulary."""
    logits = torch.full((2, 300), -torch.inf)
    logits[:, 100:200] = 0.0
    uniforms = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64)
    for sampler in (Systematic(400), Systematic(400, 0.0), Threshold(0.02), Threshold(0.005)):
        drawn = sampler(logits, uniforms)
        assert int(drawn.ids.min()) >= 100
        assert int(drawn.ids.max()) < 200
