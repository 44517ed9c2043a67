"""Test that masked positions have no targets and do not affect the draws of the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparselogits.caching.work import DrawSettings, compute_range
from sparselogits.corpus import Window
from sparselogits.samplers import Adaptive, Sampler, StudentSignal, Systematic, Threshold, TopK
from sparselogits.teacher import TransformersTeacher
from tests.conftest import tiny_llama

SAMPLERS: list[Sampler] = [
    Systematic(9),
    Threshold(0.1),
    TopK(5),
    Adaptive(StudentSignal.of(tiny_llama(seed=1), "distance"), 6, reference=0.5),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("slice_positions", [7, 64])
def test_the_positions_that_are_left(sampler, slice_positions):
    engine = TransformersTeacher(tiny_llama(), identity={}, slice_positions=slice_positions)
    tokens = np.arange(40, dtype=np.int32) * 13 % 500
    whole = Window(index=3, tokens=tokens, document_starts=np.array([0]), mask=None)
    mask = np.arange(40) % 3 > 0
    mask[21:32] = False  # a whole slice without a position
    options = {"batch": 2, "reset_attention": False}
    draws = [DrawSettings(sampler, seed=5, temperature=1.0)]
    ((plain, masked),) = compute_range(engine, [whole, replace(whole, mask=mask)], draws, **options)
    assert masked.targets.entries_per_position[torch.from_numpy(~mask)].sum() == 0
    for position in mask.nonzero()[0]:
        one, other = (r.targets[position : position + 1] for r in (plain, masked))
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.weights, other.weights)
