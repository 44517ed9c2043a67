"""Test calibration against closed forms and the definition."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.calibration import BINS, measure_calibration, signed_confidence

GRID = 64  # confidences k / 64 are exact in float32

positions = st.lists(st.tuples(st.integers(1, GRID), st.booleans()), min_size=1, max_size=120)


def signed(drawn: list[tuple[int, bool]]) -> Tensor:
    return torch.tensor([k / GRID if hit else -k / GRID for k, hit in drawn])


@given(st.lists(st.integers(1, GRID), min_size=1, max_size=8), st.randoms())
def test_a_calibrated_model_has_no_error(levels, chance):
    """Of 64 positions at confidence k / 64, k are hits: in whatever order and bins."""
    drawn = [(k, i < k) for k in levels for i in range(GRID)]
    chance.shuffle(drawn)
    found = measure_calibration([signed(drawn)])
    assert found.overconfidence == pytest.approx(0, abs=1e-12)
    assert found.equal_width.ece == pytest.approx(0, abs=1e-12)
    assert found.equal_mass.ece == pytest.approx(0, abs=1e-12)


@given(positions)
def test_both_binnings_are_their_definition(drawn):
    found = measure_calibration([signed(drawn)])
    by_width: dict[int, list[tuple[float, bool]]] = {}
    by_mass: dict[int, list[tuple[float, bool]]] = {}
    for k, hit in drawn:
        width = next(b for b in range(BINS) if k * BINS <= GRID * (b + 1))
        by_width.setdefault(width, []).append((k / GRID, hit))
        mass = sum(other < k for other, _ in drawn) * BINS // len(drawn)
        by_mass.setdefault(mass, []).append((k / GRID, hit))
    for bins, own in ((by_width, found.equal_width), (by_mass, found.equal_mass)):
        error = sum(abs(sum(c - h for c, h in held)) for held in bins.values()) / len(drawn)
        assert own.ece == pytest.approx(error, abs=1e-12)
        assert [b.count for b in own.bins] == [len(bins[b]) for b in sorted(bins)]
        for b, index in zip(own.bins, sorted(bins), strict=True):
            held = bins[index]
            assert b.confidence == pytest.approx(sum(c for c, _ in held) / len(held))
            assert b.accuracy == pytest.approx(sum(h for _, h in held) / len(held))
            assert b.low <= min(c for c, _ in held) <= max(c for c, _ in held) <= b.high


@given(positions, st.randoms())
def test_neither_order_nor_windows_matter(drawn, chance):
    whole = signed(drawn)
    order = list(range(len(drawn)))
    chance.shuffle(order)
    parts = list(whole[order].split(7))
    found, other = measure_calibration([whole]), measure_calibration(parts)
    for one, two in ((found.equal_width, other.equal_width), (found.equal_mass, other.equal_mass)):
        assert two.ece == pytest.approx(one.ece, abs=1e-12)
        assert [b.count for b in two.bins] == [b.count for b in one.bins]
        assert two.gaps.shape == (len(parts), BINS)
        assert float(two.gaps.sum(0).abs().sum() / len(drawn)) == pytest.approx(one.ece, abs=1e-12)


def test_equal_mass_parts_distinct_confidences_equally():
    confidence = torch.linspace(0.1, 0.9, 15 * 4)
    bins = measure_calibration([confidence]).equal_mass.bins
    assert [b.count for b in bins] == [4] * 15


def test_the_sign_tells_too_sure_from_too_modest():
    sure = measure_calibration([torch.tensor([0.9, -0.9])])
    modest = measure_calibration([torch.tensor([0.2, 0.2])])
    assert sure.overconfidence == pytest.approx(0.4)
    assert modest.overconfidence == pytest.approx(-0.8)
    assert sure.equal_width.ece == pytest.approx(0.4)
    assert modest.equal_mass.ece == pytest.approx(0.8)
    told = json.loads(json.dumps(sure.to_json()))
    assert told["equal_width"]["bins"][0]["count"] == 2
    assert told["overconfidence"] == pytest.approx(0.4)


def test_confidence_is_the_largest_probability_and_its_sign_says_hit():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.1, 0.6]])
    found = signed_confidence(*p.log().max(1), torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([0.7, -0.6]))


def test_nothing_to_measure_is_an_error():
    with pytest.raises(InvalidArgumentError, match="0 positions"):
        measure_calibration([])
    with pytest.raises(InvalidArgumentError, match="0 bins"):
        measure_calibration([torch.tensor([0.5])], bins=0)
