"""Test SparseTargets: validation, conversions, and the properties of thinning."""

import pytest
import torch
from torch import Tensor

from sparselogits import SparseTargets
from sparselogits.errors import InvalidTargetsError
from sparselogits.samplers import Multinomial, Systematic, TopK, window_uniforms
from sparselogits.targets import thinning_choices


def example() -> SparseTargets:
    return SparseTargets(
        torch.tensor([1, 4, 0, 2, 3]),
        torch.tensor([0.25, 0.75, 0.5, 0.25, 0.25]),
        torch.tensor([0, 2, 2, 5]),
        5,
        counts=torch.tensor([1, 3, 2, 1, 1], dtype=torch.int32),
        rounds=4,
    )


def drawn(sampler: Systematic | Multinomial, positions: int = 60) -> SparseTargets:
    generator = torch.Generator().manual_seed(sampler.rounds)
    logits = torch.randn(positions, 300, generator=generator) * 3
    return sampler(logits, window_uniforms(0, 0, positions, sampler.uniforms_per_position))


def test_forms():
    targets = example()
    assert len(targets) == 3
    assert targets.entries == 5
    assert targets.entries_per_position.tolist() == [2, 0, 3]
    assert targets.positions.tolist() == [0, 0, 2, 2, 2]
    assert targets.mass().tolist() == [1, 0, 1]
    ids, weights = targets.padded()
    assert ids.tolist() == [[1, 4, 0], [0, 0, 0], [0, 2, 3]]
    assert weights.tolist() == [[0.25, 0.75, 0], [0, 0, 0], [0.5, 0.25, 0.25]]
    assert targets.padded(7)[0].shape == (3, 7)
    assert targets.dense()[2].tolist() == [0.5, 0, 0.25, 0.25, 0]
    with pytest.raises(InvalidTargetsError, match="width=2"):
        targets.padded(2)


def test_slices_and_concatenation_are_inverse():
    targets = drawn(Systematic(20))
    parts = [targets[:1], targets[1:17], targets[17:17], targets[17:-3], targets[-3:]]
    for part in parts:
        part.__post_init__(True)
    again = SparseTargets.cat(parts)
    for name in ("ids", "weights", "offsets", "counts"):
        assert torch.equal(getattr(again, name), getattr(targets, name))
    assert torch.equal(targets[5:9].dense(), targets.dense()[5:9])
    assert len(targets[9:5]) == 0
    with pytest.raises(InvalidTargetsError, match="step 1"):
        targets[::2]
    with pytest.raises(InvalidTargetsError, match="nothing to concatenate"):
        SparseTargets.cat([])
    with pytest.raises(InvalidTargetsError, match="differ"):
        SparseTargets.cat([targets, drawn(Systematic(10))])


def test_empty():
    none = example()[:0]
    assert none.padded()[0].shape == (0, 0)
    assert none.dense().shape == (0, 5)
    assert none.thin(2, 0).entries == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids", [4, 1, 0, 2, 3], "position 0: id 1 is not larger than"),
        ("ids", [1, 1, 0, 2, 3], "position 0: id 1 is not larger"),
        ("ids", [1, 4, 0, 2, 5], "position 2: id 5 lies outside the vocabulary of 5"),
        ("ids", [1, 4, -1, 2, 3], "position 2: id -1 lies outside"),
        ("weights", [0.25, 0.75, 0.5, float("nan"), 0.25], "position 2: weight nan"),
        ("weights", [-0.25, 0.75, 0.5, 0.25, 0.25], "position 0: weight -0.25"),
        ("weights", [0.25], "5 ids, but 1 weights"),
        ("offsets", [0, 2, 2, 4], "offsets must start at 0 and end"),
        ("offsets", [0, 3, 2, 5], "offsets descend at position 1"),
        ("counts", [1, 2, 2, 1, 1], "position 0: counts sum to 3, expected the 4"),
        ("counts", [0, 4, 2, 1, 1], "position 0: count 0 is not positive"),
    ],
)
def test_construction_refuses(field, value, message):
    good = example()
    fields = {name: getattr(good, name) for name in ("ids", "weights", "offsets", "counts")}
    fields[field] = torch.tensor(value, dtype=fields[field].dtype)
    counts = fields.pop("counts")
    with pytest.raises(InvalidTargetsError, match=message):
        SparseTargets(**fields, vocab_size=5, counts=counts, rounds=4)


def test_construction_refuses_types_and_halves():
    good = example()
    with pytest.raises(InvalidTargetsError, match=r"ids must be a torch\.int64 vector"):
        SparseTargets(good.ids.int(), good.weights, good.offsets, 5)
    with pytest.raises(InvalidTargetsError, match="only one of counts and rounds"):
        SparseTargets(good.ids, good.weights, good.offsets, 5, rounds=4)
    with pytest.raises(InvalidTargetsError, match="vocab_size must be positive"):
        SparseTargets(good.ids[:0], good.weights[:0], good.offsets[:1], 0)


def rounds_of(targets: SparseTargets, position: int) -> Tensor:
    one = targets[position : position + 1]
    assert one.counts is not None
    return one.ids.repeat_interleave(one.counts.long())


@pytest.mark.parametrize("kept", [1, 2, 3, 8, 10, 17, 23, 24])
@pytest.mark.parametrize("sampler", [Systematic(24), Multinomial(24)], ids=str)
def test_thinning_keeps_the_rounds_it_says(sampler, kept):
    """Against the rule written out round by round, for every start."""
    targets = drawn(sampler, 12)
    choices = thinning_choices(24, kept)
    for start in range(choices):
        thin = targets.thin(kept, start)
        thin.__post_init__(True)
        chosen = [r for r in range(24) if (r * kept - 24 // choices * start) % 24 < kept]
        for position in range(12):
            expected = rounds_of(targets, position)[chosen]
            assert torch.equal(rounds_of(thin, position), expected)
        assert thin.counts is not None
        torch.testing.assert_close(thin.weights, thin.counts / kept, atol=0, rtol=2e-7)


@pytest.mark.parametrize("kept", [1, 2, 3, 8, 10, 17, 23, 24])
def test_the_starts_together_are_the_cached_target(kept):
    """Counts over all starts: the cached ones times rounds / gcd; once each for divisors."""
    targets = drawn(Systematic(24))
    choices = thinning_choices(24, kept)
    together = torch.zeros(len(targets), targets.vocab_size, dtype=torch.int64)
    for start in range(choices):
        thin = targets.thin(kept, start)
        assert thin.counts is not None
        together[thin.positions, thin.ids] += thin.counts
    times = kept * choices // 24
    assert times == 1 or 24 % kept
    assert targets.counts is not None
    assert torch.equal(together[targets.positions, targets.ids], targets.counts.long() * times)
    assert int(together.sum()) == len(targets) * 24 * times


@pytest.mark.parametrize("kept", [2, 5, 10, 25])
def test_strides_of_a_systematic_draw_are_systematic(kept):
    """Kept counts are within one of kept * p: the mark of a systematic draw."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 400, generator=generator) * 3
    cached = Systematic(50)(logits, window_uniforms(1, 0, 200, 1))
    starts = torch.randint(0, 50 // kept, (200,), generator=generator)
    counts = cached.thin(kept, starts).dense() * kept
    assert float((counts - kept * logits.softmax(-1)).abs().max()) < 1 + 1e-5


def test_importance_weights_survive_thinning():
    targets = drawn(Systematic(20))
    sampler = Systematic(20, 0.5)
    generator = torch.Generator().manual_seed(20)
    logits = torch.randn(60, 300, generator=generator) * 3
    targets = sampler(logits, window_uniforms(0, 0, 60, 1))
    mean = torch.stack([targets.thin(5, start).dense() for start in range(4)]).mean(0)
    torch.testing.assert_close(mean, targets.dense())


def test_thinning_refuses():
    targets = drawn(Systematic(24))
    with pytest.raises(InvalidTargetsError, match="cannot thin 24 rounds to 25"):
        targets.thin(25, 0)
    with pytest.raises(InvalidTargetsError, match="cannot thin 24 rounds to 0"):
        targets.thin(0, 0)
    with pytest.raises(InvalidTargetsError, match=r"starts must lie in \[0, 3\)"):
        targets.thin(8, 3)
    head = TopK(3)(torch.randn(2, 9), torch.zeros(2, 0))
    with pytest.raises(InvalidTargetsError, match="only targets drawn in rounds"):
        head.thin(1, 0)
