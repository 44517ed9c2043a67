"""Test the contract of all samplers: determinism, batch independence, errors, identity."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from sparselogits import SparseTargets
from sparselogits.errors import InvalidArgumentError, InvalidLogitsError
from sparselogits.samplers import (
    Multinomial,
    Systematic,
    Threshold,
    TopK,
    TopP,
    Uniform,
    fit_budget,
    from_parameters,
    thinning_starts,
    window_uniforms,
)
from sparselogits.samplers.distribution import Blocks
from sparselogits.samplers.sampler import Sampler
from sparselogits.targets import thinning_choices
from tests.samplers.distributions import logits_of

ALL: list[Sampler] = [
    Systematic(21),
    Systematic(21, 0.7),
    Multinomial(21),
    Uniform(21),
    Threshold(0.07),
    TopK(9),
    TopP(0.9, 15),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "samplers" / "draws.json"


def some_logits(positions: int = 150, vocabulary: int = 500) -> torch.Tensor:
    return torch.stack([logits_of("random", vocabulary, seed) for seed in range(positions)]).float()


def draw(sampler: Sampler, logits: torch.Tensor) -> SparseTargets:
    uniforms = window_uniforms(3, 4, logits.shape[0], sampler.uniforms_per_position)
    return sampler(logits, uniforms)


def same(a: SparseTargets, b: SparseTargets) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "weights", "offsets")
    )


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_batch_split_changes_nothing(sampler):
    logits = some_logits()
    uniforms = window_uniforms(3, 4, 150, sampler.uniforms_per_position)
    whole = sampler(logits, uniforms)
    cuts = [0, 1, 63, 64, 100, 149, 150]
    parts = [sampler(logits[a:b], uniforms[a:b]) for a, b in itertools.pairwise(cuts)]
    assert same(whole, SparseTargets.cat(parts))
    assert same(whole, sampler(logits, uniforms))
    strided = torch.stack([logits, logits], 2)[:, :, 0]
    assert same(whole, sampler(strided, uniforms))


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_valid_within_its_cap_and_rebuilt_from_its_parameters(sampler):
    targets = draw(sampler, some_logits())
    targets.__post_init__(True)
    caps = (getattr(sampler, name, None) for name in ("max_entries", "rounds", "k"))
    cap = next((cap for cap in caps if cap is not None), None) or 1 / sampler.tau + 1
    assert int(targets.entries_per_position.max()) <= cap
    identity = json.loads(json.dumps({"name": sampler.name, **sampler.parameters()}))
    assert from_parameters(identity) == sampler
    assert sampler.at(torch.zeros(5, dtype=torch.int64), slice(0, 5)) is sampler
    assert len(draw(sampler, some_logits(3)[:0])) == 0


@pytest.mark.parametrize("sampler", ALL, ids=str)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"position 70: logit of id 33 is nan"),
        (float("inf"), r"position 70: logit of id 33 is inf"),
        (3e7, r"position 70: logit of id 33 is 30000000\.0, expected .* within 16,777,216 of 0"),
        (3e38, r"position 70: logit of id 33 is 3.*e\+38, expected"),
    ],
)
def test_bad_logits_are_named(sampler, value, message):
    logits = some_logits()
    logits[70, 33] = value
    with pytest.raises(InvalidLogitsError, match=message):
        draw(sampler, logits)


@pytest.mark.parametrize("offset", [2.0**24, -(2.0**24)])
def test_the_largest_logits_are_drawn_from_their_softmax(offset: float) -> None:
    steps = 2 * torch.arange(500.0)[torch.randperm(500, generator=torch.manual_seed(0))]
    logits = (offset - torch.stack([steps, (steps / 50).floor() * 2])).float()
    counts = draw(Systematic(1000), logits).dense() * 1000
    assert bool(((counts - 1000 * logits.double().softmax(-1)).abs() < 1.001).all())
    with pytest.raises(InvalidLogitsError, match="position 0: logit of id"):
        draw(Systematic(1000), logits + offset / 2)


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_values_are_drawn_from_logits_with_a_graph(sampler: Sampler) -> None:
    logits = some_logits(5)
    drawn = draw(sampler, logits.clone().requires_grad_())
    assert same(drawn, draw(sampler, logits))
    assert not drawn.weights.requires_grad


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_rows_without_tokens_and_wrong_shapes(sampler):
    logits = some_logits()
    logits[65] = -torch.inf
    with pytest.raises(InvalidLogitsError, match="position 65: every logit is -inf"):
        draw(sampler, logits)
    uniforms = window_uniforms(0, 0, 150, sampler.uniforms_per_position)
    for bad in (logits[0], logits.long(), logits[:, :0]):
        with pytest.raises(InvalidLogitsError, match="logits must be"):
            sampler(bad, uniforms)
    with pytest.raises(InvalidLogitsError, match="uniforms must have shape"):
        sampler(some_logits(), uniforms[:-1])


def test_uniforms_outside_the_unit_interval():
    uniforms = torch.full((3, 1), 0.5, dtype=torch.float64)
    uniforms[2, 0] = 1.0
    with pytest.raises(InvalidLogitsError, match=r"position 2: uniform 0 is 1\.0"):
        Systematic(5)(some_logits(3), uniforms)


@pytest.mark.parametrize(
    "parameters",
    [
        {"name": "sistematic"},
        {"name": "systematic", "round": 5},
        {"name": "systematic", "rounds": 0},
        {"name": "systematic", "proposal_exponent": 2.5},
        {"name": "threshold", "tau": 0.0},
        {"name": "topk", "k": 0},
        {"name": "topp", "p": 1.5},
        {"name": ["topk"]},
        {"name": "topk", "k": "9"},
        {"name": "topk", "k": True},
        {"name": "topk", "k": None},
        {"name": "topk", "k": 9.0},
        {"name": "systematic", "proposal_exponent": float("nan")},
        {"name": "adaptive", "student": "s", "reference": 10**400},
        {"name": "adaptive", "student": {}},
        {"name": "adaptive"} | {"self": 1},
    ],
)
def test_bad_parameters(parameters):
    with pytest.raises(InvalidArgumentError):
        from_parameters(parameters)


def test_heads_keep_raw_probabilities():
    logits = some_logits(20)
    p = logits.double().softmax(-1)
    top = p.topk(9, -1)
    assert torch.equal(TopK(9)(logits, torch.zeros(20, 0)).padded()[0], top.indices.sort(-1).values)
    torch.testing.assert_close(
        TopK(9)(logits, torch.zeros(20, 0)).mass().double(), top.values.sum(-1), atol=0, rtol=1e-6
    )
    values, ids = Blocks.of(logits).largest(600)
    assert torch.equal(values[:, :500], logits.sort(descending=True).values)
    assert torch.equal(logits.gather(1, ids[:, :500]), values[:, :500])
    nucleus = TopP(0.5, 500)(logits, torch.zeros(20, 0))
    short = nucleus.mass() - nucleus.padded()[1].masked_fill(nucleus.padded()[1] == 0, 2).amin(-1)
    assert bool((nucleus.mass() >= 0.5 - 1e-6).all())
    assert bool((short < 0.5).all())
    masked = torch.full((1, 10), -torch.inf)
    masked[0, 3] = 0
    assert TopK(4)(masked, torch.zeros(1, 0)).ids.tolist() == [3]


def test_uniform_stream_is_fixed_for_ever():
    assert (window_uniforms(7, 9, 2, 2) * 2**53).long().tolist() == golden()["uniforms_7_9"]
    whole, part = window_uniforms(7, 9, 5, 3), window_uniforms(7, 9, 2, 3)
    assert torch.equal(whole[:2], part)
    assert not torch.equal(window_uniforms(7, 10, 2, 2), window_uniforms(7, 9, 2, 2))
    with pytest.raises(InvalidArgumentError):
        window_uniforms(-1, 0, 1, 1)


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_golden_draws(sampler):
    targets = draw(sampler, golden_logits())
    expected = golden()[str(sampler)]
    assert targets.ids.tolist() == expected["ids"]
    assert targets.offsets.tolist() == expected["offsets"]
    torch.testing.assert_close(targets.weights, torch.tensor(expected["weights"]))


def golden_logits() -> torch.Tensor:
    """Made of integers, so that no platform's transcendental functions enter."""
    ids, rows = torch.arange(200), torch.arange(4)[:, None]
    return ((ids * ids * 7919 + rows * 104_729) % 1009).float() / 128


def golden() -> dict[str, object]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("stride", [1, 2, 5, 12, 50])
def test_starts_visit_every_stride_once(stride):
    for begin in (0, 3):
        starts = torch.stack(
            [thinning_starts(1, begin + epoch, 2, 40, stride) for epoch in range(stride)]
        )
        assert torch.equal(starts.sort(0).values, torch.arange(stride)[:, None].expand(-1, 40))


def test_starts_are_uniform():
    """Chi-square with 9 degrees of freedom; 49 is exceeded once in six million runs."""
    starts = thinning_starts(11, 4, 0, 20_000, 10)
    observed = starts.bincount(minlength=10).double()
    assert float(((observed - 2000) ** 2 / 2000).sum()) < 49


@pytest.mark.parametrize(
    "sampler", [Systematic(9), Systematic(9, 0.5), Multinomial(9), Uniform(9), Threshold(0.5)]
)
@pytest.mark.parametrize("budget", [2.0, 5.0, 12.0])
def test_budget_is_met(sampler, budget):
    """Mean entries of 150 positions x 8 draws within half an entry, a round's step, and 4 %."""
    logits = some_logits()
    fitted = fit_budget(sampler, [logits[:70], logits[70:]], budget)
    drawn = sum(
        fitted(logits, window_uniforms(0, w, 150, fitted.uniforms_per_position)).entries
        for w in range(8)
    )
    assert drawn / 1200 == pytest.approx(budget, rel=0.04, abs=0.5)
    changed = {k for k, v in fitted.parameters().items() if v != sampler.parameters()[k]}
    assert changed <= {sampler.budget_parameter}


def test_budget_out_of_reach():
    for budget in (0.5, math.nan, math.inf, True):
        with pytest.raises(InvalidArgumentError, match=r"budget is .* finite .* at least 1"):
            fit_budget(Systematic(), [], budget)
    with pytest.raises(InvalidArgumentError, match="out of reach"):
        fit_budget(Systematic(), [some_logits()], 501.0)
    with pytest.raises(InvalidArgumentError, match="no pilot positions"):
        fit_budget(Systematic(), [], 5)
    with pytest.raises(InvalidArgumentError, match="give its parameters instead"):
        fit_budget(TopP(), [some_logits()], 5)
    limited = type("Limited", (TopK,), {"largest_size": 100})
    with pytest.raises(InvalidArgumentError, match=r"stores at most 100\.0"):
        fit_budget(limited(), [some_logits()], 300)
    assert thinning_choices(50, 15) == 10


if __name__ == "__main__":  # writes the golden file; run only when a draw is meant to change
    content: dict[str, object] = {
        "uniforms_7_9": (window_uniforms(7, 9, 2, 2) * 2**53).long().tolist()
    }
    for each in ALL:
        drawn = draw(each, golden_logits())
        content[str(each)] = {
            name: getattr(drawn, name).tolist() for name in ("ids", "offsets", "weights")
        }
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
