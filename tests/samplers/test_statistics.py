"""Test loss and entropy of a distribution, which are computed with the draw."""

import pytest
import torch

from sparselogits.errors import InvalidLogitsError
from sparselogits.samplers import (
    DistributionStatistics,
    Multinomial,
    Systematic,
    Threshold,
    TopK,
    draw_with_statistics,
    window_uniforms,
)
from tests.samplers.distributions import KINDS, logits_of

SAMPLERS = [Systematic(20), Multinomial(20), Systematic(20, 0.7), Threshold(0.05), TopK(12)]


@pytest.mark.parametrize("vocabulary", [2, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_a_float64_softmax(kind, vocabulary):
    exact = torch.stack([logits_of(kind, vocabulary, seed) for seed in range(70)])
    logits = exact.float()
    log_p = logits.double().log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    found = DistributionStatistics.of(logits)
    torch.testing.assert_close(
        found.log_normaliser, logits.double().logsumexp(-1), rtol=1e-9, atol=1e-6
    )
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_statistics_do_not_change_what_is_drawn(sampler):
    logits = torch.stack([logits_of("zipf", 1000, seed) for seed in range(70)]).float()
    uniforms = window_uniforms(0, 0, 70, sampler.uniforms_per_position)
    alone = sampler(logits, uniforms)
    drawn, statistics = draw_with_statistics(sampler, logits.clone().requires_grad_(), uniforms)
    assert torch.equal(drawn.ids, alone.ids)
    assert torch.equal(drawn.weights, alone.weights)
    assert torch.equal(drawn.offsets, alone.offsets)
    torch.testing.assert_close(statistics.entropy, DistributionStatistics.of(logits).entropy)


def test_what_is_no_distribution_is_refused():
    logits = torch.zeros(3, 70)
    logits[1, 5] = torch.nan
    with pytest.raises(InvalidLogitsError, match="position 1: logit of id 5 is nan"):
        DistributionStatistics.of(logits)
