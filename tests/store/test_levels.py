"""Test rounded weights: the table, its error, unbiasedness, and bytes of a resumed build."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselogits.errors import InvalidTargetsError
from sparselogits.identity import Identity
from sparselogits.samplers import Adaptive, Sampler, Systematic, Threshold, TopK, TopP, Uniform
from sparselogits.samplers.uniforms import rounding_uniforms, window_uniforms
from sparselogits.store import Cache, WindowRecord, codec_for
from sparselogits.store.bounds import DamageError
from sparselogits.store.codec import TargetCodec
from sparselogits.store.codec.levels import LARGEST_STEP, indices_of, levels, levels_at, rounded
from sparselogits.targets import SparseTargets
from tests.store.draws import identity, record
from tests.store.plain_reader import level_table

V, LENGTH = 700, 40
LEAST = float(np.float32(2.0**-126))

weights = st.lists(
    st.one_of(st.floats(LEAST, 1, width=32), st.floats(0, 2.0**97, width=32)), min_size=1
).map(lambda values: np.array(values, np.float32))


def neighbours(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The levels below (or at) and above some weights, found one by one in the specified table."""
    table = np.array(level_table())
    last = len(table) - 2
    below = np.array([min(int((table <= x).sum()) - 1, last) for x in w.astype(np.float64)])
    return table[below], table[below + 1]


def test_the_table_is_the_specification_s():
    """The oracle computes every level with 50 decimal digits."""
    assert levels().tolist() == level_table()
    assert bool((np.diff(levels()) > 0).all())
    steps = levels()[2:].astype(np.float64) / levels()[1:-1] - 1
    assert steps.max() < LARGEST_STEP * (1 + 1e-4)


@settings(max_examples=200)
@given(weights)
def test_the_nearest_level_is_within_half_a_step(w):
    below, above = neighbours(w)
    made = rounded(w, None).astype(np.float64)
    assert np.array_equal(np.abs(made - w), np.minimum(w - below, above - w.astype(np.float64)))
    normal = w >= LEAST
    assert bool((np.abs(made - w)[normal] <= w[normal] * LARGEST_STEP / 2 * (1 + 1e-4)).all())
    inside = (w >= 0.5) & (w <= 1 - 2.0**-16)
    rest = 1 - w[inside].astype(np.float64)
    assert bool((np.abs(made[inside] - w[inside]) <= rest * LARGEST_STEP / 2 * (1 + 1e-2)).all())


@settings(max_examples=200)
@given(weights)
def test_stochastic_rounding_has_the_weight_as_its_expectation(w):
    """By enumeration: the set of uniforms that round up is an interval [0, share)."""
    below, above = neighbours(w)
    share = (w - below) / (above - below)
    just_below = np.clip(np.ceil(share * 2.0**53) - 1, 0, 2.0**53 - 1) * 2.0**-53
    assert np.array_equal(rounded(w, just_below), np.where(share > 0, above, below))
    at_share = rounded(w, np.minimum(share, 1 - 2.0**-53))
    assert np.array_equal(at_share, np.where(share < 1, below, above))
    mean = above * share + below * (1 - share)
    assert np.allclose(mean, w.astype(np.float64), rtol=1e-15, atol=0)  # float32: 0 for small w


@settings(max_examples=100)
@given(weights, st.integers(0, 2**32))
def test_levels_stay_and_return(w, seed):
    uniforms = np.random.default_rng(seed).random(len(w))
    made = rounded(w, uniforms)
    assert np.array_equal(rounded(made, uniforms), made)
    assert np.array_equal(rounded(made, None), made)
    assert np.array_equal(levels_at(indices_of(made)), made)


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf, 2.0**98])
def test_weights_that_cannot_be_rounded_are_refused(bad):
    with pytest.raises(InvalidTargetsError, match="rounded weights stores 0 to"):
        rounded(np.array([0.5, bad], np.float32), None)


def test_a_weight_between_levels_is_not_encoded_and_an_index_behind_the_table_not_read():
    with pytest.raises(InvalidTargetsError, match=r"a weight is 0.3, which is not a level"):
        indices_of(np.array([0.5, 0.3], np.float32))
    with pytest.raises(DamageError, match="expected a level below 7587"):
        levels_at(np.array([0, 7587], np.uint32))


def targets_of(sampler: Sampler, scale: float = 2.0) -> SparseTargets:
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(LENGTH, V, generator=generator)
    return sampler(logits, window_uniforms(0, 0, LENGTH, sampler.uniforms_per_position))


@pytest.mark.parametrize(
    "sampler",
    [TopK(12), TopP(0.9, 40), Threshold(0.05), Systematic(50, proposal_exponent=0.8), Uniform(9)],
    ids=str,
)
def test_the_rounding_follows_from_the_sampler_s_bias(sampler):
    told = codec_for(sampler)
    assert told["rounding"] == ("stochastic" if sampler.unbiased else "nearest")
    codec, targets = TargetCodec.from_identity(told, V), targets_of(sampler)
    made = [codec.rounded(targets, 0, window).weights for window in range(3)]
    assert torch.equal(made[0], codec.rounded(targets, 0, 0).weights)
    assert torch.equal(made[0], made[1]) is not sampler.unbiased
    error = (made[0] / targets.weights - 1).abs().max()
    assert float(error) <= LARGEST_STEP * (1 if sampler.unbiased else 0.5) * (1 + 1e-4)
    if isinstance(sampler, Threshold):
        light = targets.weights == torch.tensor(sampler.tau)
        assert bool(light.any())
        assert torch.equal(made[0][light], targets.weights[light])


def test_an_adaptive_cache_is_rounded_stochastically():
    sampler = Adaptive.of({"student": "s", "nominal_rounds": 5, "reference": 1.0})
    assert codec_for(sampler)["rounding"] == "stochastic"


def test_rounding_uniforms_average_to_the_weights():
    """Mean over 4 000 windows; fails by chance once in 10^7 runs (400 means, 6.5 deviations)."""
    codec = TargetCodec.from_identity(codec_for(Uniform(10)), V)
    w = targets_of(Uniform(10))[:LENGTH]
    draws = 4000
    total = np.zeros(w.entries)
    for window in range(draws):
        total += codec.rounded(w, 7, window).weights.numpy().astype(np.float64)
    below, above = neighbours(w.weights.numpy())
    share = (w.weights.numpy() - below) / (above - below)
    deviation = (above - below) * np.sqrt(share * (1 - share) / draws)
    assert bool((np.abs(total / draws - w.weights.numpy()) <= 6.5 * deviation + 1e-12).all())


def test_rounding_uniforms_are_a_stream_of_their_own():
    draws = window_uniforms(3, 5, 100, 1).view(-1).numpy()
    assert not np.array_equal(rounding_uniforms(3, 5, 100), draws)
    assert np.array_equal(rounding_uniforms(3, 5, 10), rounding_uniforms(3, 5, 100)[:10])


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0, 30.0])
@pytest.mark.parametrize("k", [1, 12, 50])
def test_the_mass_that_is_not_stored_keeps_its_accuracy(k, scale):
    """What docs/format.md promises of the ghost token's mass."""
    codec = TargetCodec.from_identity(codec_for(TopK(k)), V)
    exact = targets_of(TopK(k), scale)
    found = codec.rounded(exact, 0, 0)
    error = (found.mass().double() - exact.mass().double()).abs()
    largest = exact.weights.view(LENGTH, -1).max(1).values.double()
    bound = LARGEST_STEP * torch.minimum(exact.mass().double() / 2, 1 - largest)
    assert bool((error <= bound * 1.01 + 2.0**-17).all())


def test_a_committed_window_reads_back_rounded_and_twice_alike(tmp_path):
    plain, kind = record("float32", 0), identity("float32-rounded")
    caches = [Cache.create(tmp_path / name, kind) for name in "ab"]
    for cache in caches:
        cache.commit([plain], {})
    files = [next((tmp_path / name / "shards").iterdir()).read_bytes() for name in "ab"]
    assert files[0] == files[1]
    found = caches[0].read(0).targets.weights
    expected = rounded(plain.targets.weights.numpy(), None)
    assert np.array_equal(found.numpy(), expected)
    assert not torch.equal(found, plain.targets.weights)


def test_the_seed_of_the_cache_decides_the_rounding(tmp_path):
    def committed(name: str, kind: Identity, made: WindowRecord) -> np.ndarray:
        cache = Cache.create(tmp_path / name, kind)
        cache.commit([made], {})
        return cache.read(0).targets.weights.numpy()

    plain, kind = record("counts+float32", 0), identity("counts+float32-rounded")
    first = committed("a", kind, plain)
    assert np.array_equal(first, committed("b", kind, plain))
    assert not np.array_equal(first, committed("c", replace(kind, seed=1), plain))
