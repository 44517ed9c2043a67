"""Compare mapped targets with brute force on vocabularies of a few tokens.

.venv/bin/pytest tests/caching/test_pushforward.py

The teacher is a random Markov chain over a handful of byte strings, so that the distribution of
every text can be enumerated. Expectations are exact: the systematic draw of a position is constant
between the breakpoints of its uniform, and the choice of the rounds that continue a draw has as
many values as there are rounds. No test is statistical.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from experiments.pushforward_bias import (
    Chain,
    followed_image,
    pairs,
    tokenizer_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselogits.caching.pushforward import Retokenizer
from sparselogits.corpus.token_bytes import TokenBytes
from sparselogits.samplers import Multinomial, Systematic, TopK
from sparselogits.targets import SparseTargets

TEACHER = ["a", "b", " ", "ab", " a"]
STUDENT = ["a", "b", " ", "ba", "aa", " b"]


def retokenizer(followed: int, elsewhere: str = "text") -> Retokenizer:
    """Return a conversion from `TEACHER` to `STUDENT`, whose ids are their places in the lists."""
    teacher, student = (TokenBytes(tokenizer_of(own)) for own in (TEACHER, STUDENT))
    return Retokenizer(teacher, student, {}, followed=followed, elsewhere=elsewhere)  # type: ignore[arg-type]


def systematic_draws(p: list[Fraction], rounds: int) -> Iterator[tuple[Fraction, list[int]]]:
    """Yield every systematic draw of a distribution with its probability."""
    cumulative = [sum(p[: i + 1], Fraction(0)) for i in range(len(p))]
    edges = sorted({Fraction(0), Fraction(1), *((-rounds * c) % 1 for c in cumulative)})
    for low, high in pairwise(edges):
        u = (low + high) / 2
        levels = [0, *(int(rounds * c + u) for c in cumulative)]
        yield high - low, [b - a for a, b in pairwise(levels)]


def targets_of(counts: list[list[int]], rounds: int) -> SparseTargets:
    """Return targets with the given counts per position and token."""
    table = torch.tensor(counts)
    positions, ids = table.nonzero(as_tuple=True)
    drawn = table[positions, ids].to(torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (table > 0).sum(1).cumsum(0)])
    return SparseTargets(ids, drawn / rounds, offsets, table.shape[1], counts=drawn, rounds=rounds)


@pytest.mark.parametrize("followed", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_expectation_is_the_image_of_the_followed_text(followed: int, seed: int) -> None:
    chain = Chain(TEACHER, seed)
    convert = retokenizer(followed)
    text, rounds = [3, 0, 4, 1, 2, 0], 2
    aligned = convert.align(text, [])
    assert (aligned.source[:-1] >= 0).sum() >= 2
    levels = [Fraction(i, rounds) for i in range(rounds)]
    for place in np.flatnonzero(aligned.source >= 0).tolist():
        at = int(aligned.source[place])
        used = range(at, min(len(text) - 1, at + followed + 1))
        expected = followed_image(chain, convert, aligned, text, place)
        mean: dict[int, Fraction] = {}
        draws = [list(systematic_draws(chain.after(text[j]), rounds)) for j in used]
        shifts = list(product(levels, repeat=len(used) - 1))
        for chosen in product(*draws):
            weight = Fraction(1)
            counts = [[rounds if t == text[0] else 0 for t in range(len(TEACHER))] for _ in text]
            for j, (probability, own) in zip(used, chosen, strict=True):
                weight *= probability
                counts[j] = own
            given_targets = targets_of(counts, rounds)
            for shift in shifts:
                uniforms = np.zeros((len(aligned.tokens), max(1, followed)))
                uniforms[place, : len(shift)] = [float(own) for own in shift]
                made = convert.targets(aligned, text, given_targets, uniforms)
                ids, weights = made[place]
                for i, own in zip(ids.tolist(), weights.tolist(), strict=True):
                    share = Fraction(own).limit_denominator(rounds) * weight / len(shifts)
                    mean[i] = mean.get(i, Fraction(0)) + share
        assert {i: float(own) for i, own in mean.items() if own} == pytest.approx(
            {i: own for i, own in expected.items() if own}, abs=1e-12
        )


def test_following_reduces_the_bias_within_its_bound() -> None:
    totals = np.zeros((2, 2))
    for pair in pairs(count=4):
        one, many = pair.measured(0), pair.measured(3)
        for own in (one, many):
            assert own.bias <= own.bound + 1e-12
        assert one.positions == many.positions > 0
        totals += [[one.bias, one.bound], [many.bias, many.bound]]
    assert (totals[1] < 0.8 * totals[0]).all(), totals
    assert totals[0, 0] > 0.1, "the pairs have no bias that could be reduced"


@given(seed=st.integers(0, 2**32), followed=st.integers(0, 3), elsewhere=st.booleans())
@settings(max_examples=60)
def test_mapped_targets_are_valid_counts(seed: int, followed: int, elsewhere: bool) -> None:
    """Every kind of draw keeps its rounds and its mass, whatever the text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, len(TEACHER), (12,), generator=generator).tolist()
    convert = retokenizer(followed, "text" if elsewhere else "none")
    aligned = convert.align(text, [])
    logits = torch.randn(12, len(TEACHER), generator=generator)
    data = b"".join(convert.teacher.bytes_of[t] for t in text)
    spelled = b"".join(convert.student.bytes_of[t] for t in aligned.tokens.tolist())
    assert data.startswith(spelled)
    assert len(data) - len(spelled) == aligned.left_out
    uniforms = convert.uniforms(aligned, 0, seed)
    for sampler in (Systematic(7), Multinomial(5), Systematic(6, proposal_exponent=0.7), TopK(5)):
        shape = 12, sampler.uniforms_per_position
        drawn = sampler(logits, torch.rand(shape, generator=generator, dtype=torch.float64))
        made = convert.targets(aligned, text, drawn, uniforms)  # the constructor validates counts
        carried = torch.from_numpy(convert.carries(aligned))
        assert torch.equal(made.entries_per_position > 0, carried)
        if not isinstance(sampler, TopK) and sampler.proposal_exponent != 1:
            continue  # the mass of importance weights is one in expectation only
        assert made.mass()[carried].sub(1).abs().max() < 1e-5
        exact = carried & torch.from_numpy(aligned.source < 0)
        labels = torch.from_numpy(np.append(aligned.tokens[1:], -1))
        for place in exact.nonzero().flatten().tolist():
            assert made[place].ids.tolist() == [labels[place]]


def joined(*words: str) -> list[str]:
    """Return a vocabulary with these words, and their letters and prefixes, which BPE needs."""
    letters = sorted({letter for word in words for letter in word})
    prefixes = [word[:i] for word in words for i in range(2, len(word) + 1)]
    return list(dict.fromkeys([*letters, *prefixes]))


@pytest.mark.parametrize(
    ("followed", "expected"),
    [(0, {" wash": 9, " clean": 3}), (4, {" washed": 6, " wash": 3, " clean": 3})],
)
def test_the_example_of_the_page(followed: int, expected: dict[str, int]) -> None:
    """Of docs/retokenize.md, as the sum over all twelve choices of the rounds that continue."""
    theirs, ours = joined(" wash", " clean", "ed", "ing"), joined(" washed", " clean", "ed", "ing")
    teacher, student = (TokenBytes(tokenizer_of(own)) for own in (theirs, ours))
    convert = Retokenizer(teacher, student, {}, followed=followed)
    text = [theirs.index(own) for own in (" clean", " wash", "ed", " clean", " clean")]
    aligned = convert.align(text, [])
    assert [ours[t] for t in aligned.tokens.tolist()[:3]] == [" clean", " washed", " clean"]
    drawn = [{" wash": 9, " clean": 3}, {"ed": 8, "ing": 4}, *[{" clean": 12}] * 3]
    given_targets = targets_of([[row.get(own, 0) for own in theirs] for row in drawn], rounds=12)
    mean: dict[str, float] = {}
    for start in range(12):
        uniforms = np.full((len(aligned.tokens), max(1, followed)), start / 12)
        own, weights = convert.targets(aligned, text, given_targets, uniforms)[0]
        for i, weight in zip(own.tolist(), weights.tolist(), strict=True):
            mean[ours[i]] = mean.get(ours[i], 0.0) + weight
    assert mean == pytest.approx({name: float(own) for name, own in expected.items()}, abs=1e-5)


def test_ids_that_are_no_tokens_count_for_the_text() -> None:
    """A head may have more columns than the tokenizer has tokens; imported lists contain them."""
    convert = replace(retokenizer(2), width=len(TEACHER) + 3)
    text = [3, 0, 4, 1, 2, 0]
    aligned = convert.align(text, [])
    ids = torch.tensor([[t, convert.width - 1] for t in [*text[1:], 0]]).flatten()
    drawn = torch.ones(len(ids), dtype=torch.int32)
    offsets = torch.arange(0, len(ids) + 1, 2)
    own = SparseTargets(ids, drawn / 2, offsets, convert.width, counts=drawn, rounds=2)
    made = convert.targets(aligned, text, own, convert.uniforms(aligned, 0, 0))
    carried = torch.from_numpy(convert.carries(aligned))
    assert made.mass().tolist() == carried.float().tolist()
