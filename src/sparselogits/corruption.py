"""Corrupt the input of a window for a masked language model, as a function of seed and window.

A window is divided into units: tokens, words, or spans of geometric length. Each unit is chosen
with a probability equal to the window's rate, whatever the units are. One share of the chosen
tokens is replaced by the mask token, one share by random tokens, and the rest is not replaced.
Special tokens, padding, and tokens that are not trained on are never chosen; random tokens are
never special tokens.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import InvalidArgumentError
from sparselogits.identity import Identity
from sparselogits.objectives import LEAST_RATE, MASK_RATE, MASK_SPAN, Masked
from sparselogits.samplers.uniforms import corruption_uniforms

_CONTINUES = "##"  # prefix of WordPiece tokens that continue a word
_SENTENCE_PIECE, _BYTE_LEVEL = "\u2581", "\u0120"  # the space before a word
_NOT_OF_WORDS = frozenset(string.punctuation + string.whitespace + "\u010a\u0109\u010d")


@dataclass(frozen=True, eq=False)
class TokenKinds:
    """Properties of a vocabulary's tokens that determine how the tokens are corrupted.

    A word begins at a token whose `begins` is true, and at a token whose `head` differs from the
    previous token's `tail`, unless that tail is -1. Head and tail of all tokens are 0 for WordPiece
    tokenizers, where `begins` is true for punctuation as well, and for SentencePiece tokenizers,
    where punctuation belongs to the word before.

    Args:
        special: bool [V], true for special tokens and for ids that are not tokens.
        begins: bool [V], true for tokens that always begin a word; None if the tokenizer does not
            mark words.
        head: int8 [V], 1 for tokens that begin with punctuation or white space, except the space
            before a word, else 0.
        tail: int8 [V], 1 for tokens that end with punctuation or white space, -1 for the token that
            is only the space before a word, else 0.
    """

    special: NDArray[np.bool_]
    begins: NDArray[np.bool_] | None
    head: NDArray[np.int8]
    tail: NDArray[np.int8]

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> TokenKinds:
        """Return the properties of a tokenizer's tokens, for a teacher of `vocab_size` ids."""
        texts = [""] * vocab_size
        special = np.ones(vocab_size, np.bool_)
        for text, token in tokenizer.get_vocab().items():
            if token < vocab_size:
                texts[token], special[token] = text, False
        known = [i for i in tokenizer.all_special_ids if i < vocab_size]
        special[known] = True
        for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
            if added.special and token < vocab_size:
                special[token] = True
        none = np.zeros(vocab_size, np.int8)
        if any(text.startswith(_CONTINUES) and len(text) > len(_CONTINUES) for text in texts):
            begins = np.array([not text.startswith(_CONTINUES) for text in texts])
            return cls(special, begins, none, none)
        begins = np.array([text.startswith(_SENTENCE_PIECE) for text in texts])
        if begins.any():
            return cls(special, begins, none, none)
        begins = np.array([text.startswith(_BYTE_LEVEL) for text in texts])
        words = [text.removeprefix(_BYTE_LEVEL) for text in texts]
        head = np.array([word[:1] in _NOT_OF_WORDS for word in words], np.int8)
        tail = np.array([word[-1:] in _NOT_OF_WORDS if word else -1 for word in words], np.int8)
        return cls(special, begins if begins.any() else None, head, tail)


def masked_objective(tokenizer: Any, **settings: Any) -> Masked:
    """Create a masked objective with a tokenizer's mask token and further fields of `Masked`.

    Raises:
        InvalidArgumentError: the tokenizer has no mask token, or a value is out of its range.
    """
    if tokenizer.mask_token_id is None:
        raise InvalidArgumentError(
            f"the tokenizer ({type(tokenizer).__name__}) has no mask token, which the input of a "
            "masked language model needs; expected the tokenizer that the model was trained with. "
            "Check the tokenizer files of the teacher"
        )
    return Masked(int(tokenizer.mask_token_id), **settings)


def objective_as_given(
    tokenizer: Any,
    *,
    mask_rate: float | str | None = None,
    mask_units: str | None = None,
    mask_span: float | None = None,
    seed: int = 0,
) -> Masked:
    """Create the masked objective that options of a command or keys of a recipe describe.

    Args:
        tokenizer: the teacher's tokenizer.
        mask_rate: share of the tokens to predict, or "random" for a random rate per window; None
            for `MASK_RATE`.
        mask_units: see `Masked.units`; None for tokens.
        mask_span: see `Masked.span`; None for `MASK_SPAN` if the units are spans.
        seed: see `Masked.seed`.

    Raises:
        InvalidArgumentError: the tokenizer has no mask token, or a value is out of its range.
    """
    units = mask_units or "tokens"
    if units == "spans" and mask_span is None:
        mask_span = MASK_SPAN
    rate = MASK_RATE if mask_rate is None else None if mask_rate == "random" else mask_rate
    return masked_objective(tokenizer, rate=rate, units=units, span=mask_span, seed=seed)


@dataclass(frozen=True, eq=False)
class Corrupted:
    """Corrupted input of a window.

    Args:
        inputs: int32 [L], token ids of the model's input.
        chosen: bool [L], true where the model predicts the original token.
        rate: probability with which each unit was chosen.
    """

    inputs: NDArray[np.int32]
    chosen: NDArray[np.bool_]
    rate: float


@dataclass(frozen=True, eq=False)
class Corruption:
    """Function that corrupts windows for a masked objective and one vocabulary.

    Args:
        objective: rate, shares, units and seed of the corruption.
        kinds: properties of the vocabulary's tokens.

    Raises:
        InvalidArgumentError: the mask token is not in the vocabulary.

    Examples:
        >>> ordinary = np.zeros(9, np.int8)
        >>> kinds = TokenKinds(np.arange(9) < 2, None, ordinary, ordinary)
        >>> corruption = Corruption(Masked(mask_id=1, rate=1.0, masked=1.0, random=0.0), kinds)
        >>> corruption(np.array([0, 5, 6], np.int32), window_index=0).inputs.tolist()
        [0, 1, 1]
    """

    objective: Masked
    kinds: TokenKinds

    def __post_init__(self) -> None:
        mask_id, vocab_size = self.objective.mask_id, len(self.kinds.special)
        if mask_id >= vocab_size:
            raise InvalidArgumentError(
                f"the mask token has the id {mask_id}, but the teacher's vocabulary has "
                f"{vocab_size} ids: the token was added to the tokenizer alone. Use the tokenizer "
                "that the model was trained with, or resize and train the model's embeddings"
            )

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, vocab_size: int, **settings: Any) -> Corruption:
        """Create a corruption that uses a tokenizer's mask token.

        Args:
            tokenizer: the teacher's tokenizer.
            vocab_size: number V of the teacher's logits per position.
            settings: fields of `Masked`, without `mask_id`.

        Raises:
            InvalidArgumentError: the tokenizer has no mask token, the mask token is not in the
                vocabulary, or a setting is out of range.
        """
        objective = masked_objective(tokenizer, **settings)
        return cls(objective, TokenKinds.of(tokenizer, vocab_size))

    @classmethod
    def of_identity(cls, identity: Identity, tokenizer: Any | None) -> Corruption | None:
        """Return the corruption of a cache; None for a cache of a causal language model.

        Args:
            identity: identity of the cache.
            tokenizer: tokenizer of the cache; may be None for a causal language model.

        Raises:
            InvalidArgumentError: this library does not know the cache's objective; or the cache is
                of a masked language model, and `tokenizer` is None or the id of the mask token is
                not below `identity.vocab_size`.
        """
        objective = identity.predicts
        if not isinstance(objective, Masked):
            return None
        if tokenizer is None:
            raise InvalidArgumentError(
                "evaluating a masked language model hides tokens of the text, which needs the "
                "cache's tokenizer, and none was found; give the teacher's folder by --tokenizer"
            )
        return cls(objective, TokenKinds.of(tokenizer, identity.vocab_size))

    def __call__(
        self,
        tokens: NDArray[np.int32],
        window_index: int,
        *,
        learnt: NDArray[np.bool_] | None = None,
        held_out: bool = False,
    ) -> Corrupted:
        """Corrupt one window.

        Args:
            tokens: int32 [L], original token ids.
            window_index: index of the window. The random numbers are a function of the seed,
                `window_index` and `held_out`.
            learnt: bool [L], false for padding and for tokens that are not trained on, which are
                never chosen; None if there are none.
            held_out: whether `window_index` counts held-out windows instead of training windows.

        Raises:
            InvalidArgumentError: the units are words, but the tokenizer does not mark words.
        """
        objective, kinds, length = self.objective, self.kinds, len(tokens)
        drawn = corruption_uniforms(objective.seed, window_index, 1 + 4 * length, held_out=held_out)
        rate = objective.rate
        if rate is None:
            rate = LEAST_RATE + (1 - LEAST_RATE) * float(drawn[0])
        choice, kind, replacement, border = drawn[1:].reshape(4, length)
        allowed = ~kinds.special[tokens]
        if learnt is not None:
            allowed &= learnt
        unit = _units(tokens, allowed, border, objective, kinds)
        chosen = allowed & (choice[unit] < rate)
        # all tokens of a span are replaced alike, as in SpanBERT; those of a word independently
        kind = kind[unit] if objective.units == "spans" else kind
        inputs = tokens.copy()
        inputs[chosen & (kind < objective.masked)] = objective.mask_id
        above = kind - objective.masked
        randomised = chosen & (above >= 0) & (above < objective.random)
        ordinary = np.flatnonzero(~kinds.special).astype(np.int32)
        inputs[randomised] = ordinary[(replacement[randomised] * len(ordinary)).astype(np.int64)]
        return Corrupted(inputs, chosen, rate)


def _units(
    tokens: NDArray[np.int32],
    allowed: NDArray[np.bool_],
    border: NDArray[np.float64],
    objective: Masked,
    kinds: TokenKinds,
) -> NDArray[np.int64]:
    """Return, for each position, the position at which its unit begins, int64 [L]."""
    if objective.units == "tokens":
        return np.arange(len(tokens))
    if objective.units == "spans":
        begins = border < 1 / float(objective.span or 1)
    elif kinds.begins is None:
        raise InvalidArgumentError(
            "whole words cannot be chosen: no token of the tokenizer is marked as the beginning "
            "(\u0120, \u2581) or the rest (##) of a word; choose tokens or spans"
        )
    else:
        begins = kinds.begins[tokens]
        head, tail = kinds.head[tokens[1:]], kinds.tail[tokens[:-1]]
        begins[1:] |= (head != tail) & (tail >= 0)
    begins[:1] = True
    begins |= ~allowed
    begins[1:] |= ~allowed[:-1]
    unit: NDArray[np.int64] = np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))
    return unit
