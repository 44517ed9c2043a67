"""Corruption of windows: rates and shares, whole units, special tokens, determinism.

The random tests have fixed seeds. Each compares a mean with its expectation within five standard
errors, which a right implementation exceeds for one seed in 1.7 million.
"""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparselogits.corruption import Corruption, TokenKinds
from sparselogits.errors import InvalidArgumentError
from sparselogits.objectives import IGNORE_INDEX, LEAST_RATE, Masked
from tests.corpus.trained_tokenizers import SAMPLE, metaspace_unigram, train_byte_level, word_pieces

V, SPECIAL, MASK = 50, 5, 4
SPECIALS = np.arange(V) < SPECIAL
NOTHING = np.zeros(V, np.int8)
KINDS = TokenKinds(SPECIALS, np.arange(V) % 3 != 0, NOTHING, NOTHING)
SIGMAS = 5


def objectives():
    return st.builds(
        Masked,
        mask_id=st.just(MASK),
        rate=st.none() | st.floats(0.01, 1.0),
        masked=st.floats(0, 0.5),
        random=st.floats(0, 0.5),
        units=st.sampled_from(["tokens", "words"]),
        seed=st.integers(0, 2**64 - 1),
    ) | st.builds(
        Masked,
        mask_id=st.just(MASK),
        rate=st.floats(0.01, 1.0),
        units=st.just("spans"),
        span=st.floats(1, 8),
    )


def window(seed: int, length: int = 200, special: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(SPECIAL, V, length)
    tokens[rng.random(length) < special] = rng.integers(0, SPECIAL)
    return tokens.astype(np.int32)


@given(objectives(), st.integers(0, 2**40), st.integers(0, 60))
@settings(max_examples=200)
def test_what_is_not_chosen_stays_and_special_tokens_are_never_chosen_nor_drawn(
    objective, index, length
):
    tokens = window(index % 1000, length)
    learnt = window(index % 1000 + 1, length) % 2 > 0
    made = Corruption(objective, KINDS)(tokens, index, learnt=learnt)
    assert not (made.chosen & ~learnt).any()
    made = Corruption(objective, KINDS)(tokens, index)
    assert made.inputs.dtype == np.int32
    assert made.chosen.shape == tokens.shape
    assert (made.inputs == tokens)[~made.chosen].all()
    assert not (made.chosen & SPECIALS[tokens]).any()
    drawn = made.inputs[made.inputs != tokens]
    assert ((drawn == MASK) | ~SPECIALS[drawn]).all()
    labels = objective.labels(tokens, made.chosen)
    assert (labels[made.chosen] == tokens[made.chosen]).all()
    assert (labels[~made.chosen] == IGNORE_INDEX).all()
    assert objective.rate is None or made.rate == objective.rate


@given(objectives(), st.integers(0, 2**40))
@settings(max_examples=50)
def test_it_depends_on_seed_and_window_alone(objective, index):
    tokens = window(3)
    one, other = (Corruption(objective, KINDS)(tokens, index) for _ in range(2))
    assert (one.inputs == other.inputs).all()
    assert (one.chosen == other.chosen).all()
    assert one.rate == other.rate


def test_windows_seeds_and_held_out_windows_differ():
    tokens, objective = window(3, special=0), Masked(MASK, 0.5)
    made = [
        Corruption(objective, KINDS)(tokens, 0).chosen,
        Corruption(objective, KINDS)(tokens, 1).chosen,
        Corruption(Masked(MASK, 0.5, seed=1), KINDS)(tokens, 0).chosen,
        Corruption(objective, KINDS)(tokens, 0, held_out=True).chosen,
    ]
    assert len({chosen.tobytes() for chosen in made}) == 4


@pytest.mark.parametrize(
    "objective",
    [
        Masked(MASK),
        Masked(MASK, 0.3),
        Masked(MASK, 0.15, units="words"),
        Masked(MASK, 0.15, units="spans", span=3.0),
    ],
    ids=["tokens", "30 %", "words", "spans"],
)
def test_tokens_are_chosen_at_the_rate_and_replaced_in_shares(objective):
    shares = []
    for index in range(2000):
        tokens = window(index)
        made = Corruption(objective, KINDS)(tokens, index)
        ordinary = ~SPECIALS[tokens]
        masked = made.inputs == MASK
        changed = (made.inputs != tokens) & ~masked
        shares.append([x.sum() / ordinary.sum() for x in (made.chosen, masked & ordinary, changed)])
    # windows are independent, tokens of one unit are not
    mean, error = np.mean(shares, 0), np.std(shares, 0) / math.sqrt(len(shares))
    same = 1 / (V - SPECIAL)  # a random token may be the original one
    expected = objective.rate * np.array([1, 0.8, 0.1 * (1 - same)])
    assert (abs(mean - expected) <= SIGMAS * error).all()


def test_random_rates_are_uniform_and_weigh_by_their_inverse():
    objective, length = Masked(MASK, None), 100
    rates, surplus = [], 0.0
    for index in range(3000):
        made = Corruption(objective, KINDS)(window(0, length, 0), index)
        rates.append(made.rate)
        surplus += (made.chosen.sum() - made.rate * length) / math.sqrt(length)
    rates = np.array(rates)
    assert rates.min() >= LEAST_RATE
    assert rates.max() <= 1
    variance = 1 / 12
    assert abs(rates.mean() - (1 + LEAST_RATE) / 2) <= SIGMAS * math.sqrt(variance / len(rates))
    # given the rates, the numbers chosen are binomial: their mean variance is E[t (1 - t)] = 1/6
    assert abs(surplus) <= SIGMAS * math.sqrt(len(rates) / 6 * 1.1)
    assert objective.weight(0.25) == 4.0
    assert Masked(MASK, 0.25).weight(0.25) == 1.0


def test_random_tokens_are_uniform_over_the_ordinary_ones():
    objective = Masked(MASK, 1.0, masked=0.0, random=1.0)
    drawn = np.concatenate(
        [Corruption(objective, KINDS)(window(0, 500, 0), i).inputs for i in range(40)]
    )
    counts = np.bincount(drawn, minlength=V)[SPECIAL:]
    expected = len(drawn) / (V - SPECIAL)
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), V - SPECIAL - 1
    # chi-square is approximately normal: mean f, variance 2 f
    assert abs(statistic - freedom) <= SIGMAS * math.sqrt(2 * freedom)


def test_spans_have_the_mean_length_and_one_kind_of_replacement():
    objective = Masked(MASK, 0.02, masked=0.5, random=0.5, units="spans", span=4.0)
    lengths, kinds = [], 0
    for index in range(3000):
        made = Corruption(objective, KINDS)(window(index, 200, 0), index)
        edges = np.diff(np.concatenate([[False], made.chosen, [False]]).astype(int))
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        for begin, end in zip(begins, ends, strict=True):
            if begin and end < 200:  # spans at an edge of the window are cut
                lengths.append(end - begin)
                kinds += len(set(made.inputs[begin:end] == MASK)) > 1
    error = np.std(lengths) / math.sqrt(len(lengths))
    # a chosen span is followed by another one with probability 0.02, and they count as one run
    assert abs(np.mean(lengths) - 4.0 / 0.98) <= SIGMAS * error
    assert kinds <= 0.04 * len(lengths)


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    made = {
        "byte-level": train_byte_level,
        "metaspace": metaspace_unigram,
        "word pieces": word_pieces,
        "unmarked": lambda: Tokenizer(models.WordLevel({"one": 0, "two": 1}, "one")),
    }[family]
    return PreTrainedTokenizerFast(tokenizer_object=made(), mask_token="[MASK]", pad_token="[PAD]")


@pytest.mark.parametrize("family", ["byte-level", "metaspace", "word pieces"])
def test_whole_words_are_those_of_the_tokenizer(family):
    whole = tokenizer(family)
    kinds = TokenKinds.of(whole, len(whole) + 3)
    encoding = whole(SAMPLE[:8000], add_special_tokens=False)
    tokens = np.array(encoding["input_ids"], np.int32)
    words = [np.flatnonzero(np.array(encoding.word_ids()) == w) for w in set(encoding.word_ids())]
    # runs of punctuation or white space are one word for the tokenizer, several here
    words = [w for w in words if any(c.isalnum() for c in whole.decode(tokens[w]))]
    objective = Masked(whole.mask_token_id, 0.3, units="words")
    several = apart = 0
    for index in range(20):
        chosen = Corruption(objective, kinds)(tokens, index).chosen
        for word in words:
            own = chosen[word]
            assert own.all() or not own.any(), whole.convert_ids_to_tokens(tokens[word])
            several += len(own) > 1 and own.all()
        apart += sum(chosen[one[0]] != chosen[other[0]] for one, other in itertools.pairwise(words))
    # words are chosen one by one: neighbours differ with probability 2 * 0.3 * 0.7
    pairs = 20 * (len(words) - 1)
    assert several > 100
    assert abs(apart / pairs - 0.42) < 0.05


def test_special_tokens_and_rows_without_a_token_are_special():
    whole = tokenizer("word pieces")
    kinds = TokenKinds.of(whole, len(whole) + 3)
    assert kinds.special[[whole.mask_token_id, whole.pad_token_id]].all()
    assert kinds.special[-3:].all()
    assert not kinds.special[: len(whole)].all()


def test_words_need_a_tokenizer_that_marks_them():
    kinds = TokenKinds.of(tokenizer("unmarked"), len(tokenizer("unmarked")))
    with pytest.raises(InvalidArgumentError, match="choose tokens or spans"):
        Corruption(Masked(3, units="words"), kinds)(np.zeros(4, np.int32), 0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mask_id": -1}, "mask_id"),
        ({"rate": 0.0}, "rate"),
        ({"rate": 1.5}, "rate"),
        ({"masked": 0.8, "random": 0.3}, "masked and random"),
        ({"units": "letters"}, "units"),
        ({"units": "spans"}, "span"),
        ({"span": 3.0}, "span"),
        ({"seed": -1}, "seed"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, named):
    with pytest.raises(InvalidArgumentError, match=named):
        Masked(**{"mask_id": MASK} | settings)


def test_a_mask_token_outside_the_vocabulary_is_refused():
    """As of a tokenizer to which the token was added without a row in the model."""
    with pytest.raises(InvalidArgumentError, match=f"id {V}, .* {V} ids"):
        Corruption(Masked(V), KINDS)
