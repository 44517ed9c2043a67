"""Test speculative acceptance: properties of the expectation, the emitted tokens, agreement.

Statistical tests are at a false-alarm rate of 1e-6 each, over fresh seeds and up to the normal and
chi-square approximations; seeds are fixed, so a run that passes keeps passing.
"""

import itertools
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparselogits.data import TextDataset
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate import draft_from_prefixes, evaluate
from sparselogits.evaluate.acceptance import Round, draft_and_verify, expected_acceptance
from sparselogits.evaluate.passes import teacher_slices, without_padding
from sparselogits.teacher import TransformersTeacher, load_teacher
from tests.conftest import tiny_llama

FALSE_ALARM = 1e-6

logits = st.lists(st.floats(-30, 30), min_size=6, max_size=6).map(
    lambda x: torch.tensor([x], dtype=torch.float64)
)


@given(logits, logits)
def test_the_expectation_is_one_minus_total_variation_and_symmetric(p, s):
    log_p, log_s = p.log_softmax(1), s.log_softmax(1)
    found = expected_acceptance(log_p, log_s)
    variation = (log_p.exp() - log_s.exp()).abs().sum(1) / 2
    torch.testing.assert_close(found, 1 - variation)
    torch.testing.assert_close(found, expected_acceptance(log_s, log_p))
    assert float(expected_acceptance(log_p, log_p)) == pytest.approx(1)


def test_ids_that_only_one_has_are_never_accepted():
    s = torch.tensor([[0.5, 0.3, 0.2]])
    p = torch.tensor([[0.5, 0.5]])
    assert float(expected_acceptance(p.log(), s.log())) == pytest.approx(0.8)
    barred = torch.tensor([[0.5, 0.5, 0.0]])  # log 0 = -inf
    assert float(expected_acceptance(barred.log(), s.log())) == pytest.approx(0.8)


# -- the rule --------------------------------------------------------------------------------------


def markov(seed: int, ids: int, known: int) -> Tensor:
    """Logits [known, ids] of the next token by the last one, far from even."""
    return torch.randn(known, ids, generator=torch.Generator().manual_seed(seed)) * 1.5


def one_round(p: Tensor, s: Tensor, draft: int, generator: torch.Generator, last: int) -> Round:
    """Of two Markov chains; a token the teacher has not leaves it at token 0, unread."""
    return draft_and_verify(
        torch.tensor([last]),
        lambda tokens: s[tokens[-1]],
        lambda tokens, count: p[torch.where(tokens < len(p), tokens, 0)[-count:]],
        draft,
        generator,
    )


def passes_chi_square(counts: Tensor, expected: Tensor) -> bool:
    """Pearson's test of counts [C] at FALSE_ALARM; all expected are to be 5 or more."""
    assert float(expected.min()) >= 5
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2)) > FALSE_ALARM


def emitted(p: Tensor, s: Tensor, draft: int, samples: int, length: int) -> Tensor:
    """Counts [V ** length] of the first tokens that rounds of drafting emit, from token 0 on."""
    generator = torch.Generator().manual_seed(draft)
    counts = torch.zeros([p.shape[1]] * length, dtype=torch.float64)
    for _ in range(samples):
        tokens = [0]
        while len(tokens) <= length:
            tokens += one_round(p, s, draft, generator, tokens[-1]).tokens
        counts[tuple(tokens[1 : length + 1])] += 1
    return counts.flatten()


@pytest.mark.parametrize("draft", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, 1], ids=["same ids", "student has one more"])
def test_emitted_tokens_are_distributed_as_the_teachers(draft, extra):
    """Three tokens in a row, all 27 combinations, whatever round emitted them."""
    p, s = markov(0, 3, 3), markov(1, 3 + extra, 3 + extra)
    samples = 2000
    law = three_tokens(p)
    likely = law * samples >= 5  # the rest is one cell
    counts = emitted(p, s, draft, samples, length=3)
    assert passes_chi_square(pooled(counts, likely), pooled(law * samples, likely))
    # and the test would notice the student's own tokens
    own = pooled(three_tokens(s[:3, :3]) * samples, likely)
    assert not passes_chi_square(own, pooled(law * samples, likely))


def three_tokens(chain: Tensor) -> Tensor:
    """Probabilities [27] of three tokens after token 0."""
    p = chain.double().softmax(1)
    every = itertools.product(range(3), repeat=3)
    return torch.stack([p[0, a] * p[a, b] * p[b, c] for a, b, c in every])


def pooled(counts: Tensor, likely: Tensor) -> Tensor:
    """The likely cells, and one of all the rest."""
    rest = counts[~likely].sum()[None]
    return counts if bool(likely.all()) else torch.cat([counts[likely], rest])


def test_a_student_that_is_the_teacher_is_never_rejected():
    p = markov(3, 5, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        found = one_round(p, p, 4, generator, 0)
        assert (found.accepted, found.verified) == (4, 4)
        assert len(found.tokens) == 5


def test_what_the_teacher_never_says_is_rejected_at_once():
    p, s = torch.full((4, 4), -torch.inf), torch.full((4, 4), -torch.inf)
    p[:, 0], s[:, 1] = 0.0, 0.0
    found = one_round(p, s, 3, torch.Generator().manual_seed(0), 0)
    assert found.tokens == (0,)
    assert found.acceptances.tolist() == [0.0]


# -- held-out prefixes -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["attention kept", "attention reset"])
def windows(request, packed_text) -> TextDataset:
    corpus = packed_text(24, holdout=0.2, reset_attention=request.param)
    return TextDataset(corpus, limit=40)


@pytest.fixture
def teacher(teacher_folder, tokenizer) -> TransformersTeacher:
    return load_teacher(str(teacher_folder), tokenizer=tokenizer, slice_positions=10)


def test_realised_acceptance_is_the_expected_one(windows, teacher):
    student = tiny_llama(seed=4, initializer_range=0.05)
    found = draft_from_prefixes(student, windows, teacher, draft=3, prefixes=4)
    assert found.drafts == 160
    assert found.drafts <= found.verified <= 3 * found.drafts
    limit = -NormalDist().inv_cdf(FALSE_ALARM / 2)
    assert abs(found.acceptance - found.expected) < limit * found.error
    assert 0.05 < found.expected < 0.95
    assert found.tokens_per_pass == 1 + found.accepted / 160
    again = draft_from_prefixes(student, windows, teacher, draft=3, prefixes=4)
    assert again == found


class Padded(TextDataset):
    """Windows whose tokens after the first twelve are padding."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"attention_mask": (torch.arange(len(item["input_ids"])) < 12).long()}


@pytest.mark.parametrize("kind", [TextDataset, Padded])
def test_the_expectation_on_prefixes_is_that_of_whole_windows(windows, teacher, kind):
    """A draft of one token visits positions of the text itself, in one slice or the next."""
    student = tiny_llama(seed=4)
    few = kind(windows.corpus, limit=4)
    ends = 11 if kind is Padded else 23
    found = draft_from_prefixes(student, few, teacher, draft=1, prefixes=ends)
    expected = []
    for index in range(4):
        item = without_padding(few[index])
        taught = torch.cat([own for _, own in teacher_slices(teacher, item) if own is not None])
        inputs = {k: v[None] for k, v in item.items() if k != "shift_labels"}
        drafts = student(**inputs).logits[0].detach()
        expected.append(expected_acceptance(taught.log_softmax(1), drafts.log_softmax(1))[:ends])
    assert found.verified == 4 * ends
    assert found.expected == pytest.approx(float(torch.cat(expected).mean()), abs=1e-5)


def test_held_out_acceptance_is_the_plain_mean(windows, teacher):
    student, few = tiny_llama(seed=4), TextDataset(windows.corpus, limit=3)
    found = evaluate({"student": student}, few, teacher)
    total, count = 0.0, 0
    for index in range(3):
        item = few[index]
        counted = item["shift_labels"] != -100
        taught = torch.cat([own for _, own in teacher_slices(teacher, item) if own is not None])
        inputs = {k: v[None] for k, v in item.items() if k != "shift_labels"}
        s = student(**inputs).logits[0].detach().double().softmax(1)
        total += float(torch.minimum(taught.double().softmax(1), s)[counted].sum())
        count += int(counted.sum())
    assert found["student"].acceptance == pytest.approx(total / count, abs=1e-6)
    assert found["teacher"].acceptance == pytest.approx(1, abs=1e-6)


def test_the_students_mode_is_left_alone_and_more_ids_are_no_harm(windows, teacher):
    student = tiny_llama(seed=4, vocab_size=900, attention_dropout=0.5).train()
    found = draft_from_prefixes(student, TextDataset(windows.corpus, limit=4), teacher)
    assert student.training
    assert found.expected < 0.7  # nearly half of the ids are none of the teacher's


def test_mistakes_say_what_to_do(windows, teacher):
    with pytest.raises(InvalidArgumentError, match="longer than a draft"):
        draft_from_prefixes(tiny_llama(), windows, teacher, draft=24)
    with pytest.raises(InvalidArgumentError, match="0 windows"):
        draft_from_prefixes(tiny_llama(), TextDataset(windows.corpus, limit=0), teacher)
    with pytest.raises(InvalidArgumentError, match="fewer than the teacher"):
        draft_from_prefixes(tiny_llama(vocab_size=515), windows, teacher)
