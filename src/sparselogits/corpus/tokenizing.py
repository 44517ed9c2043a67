"""The teacher's tokenizer: what it does to documents, and what names it.

Special tokens that are spelt out in the text (`<|endoftext|>` in the middle of a line, say) become
what the tokenizer makes of them, as in any script that calls it: their ids, unless it was loaded
with `split_special_tokens=True`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.windows import Packing
from sparselogits.errors import CorpusError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|endofdocument|>")
"""Names under which tokenizers keep a token that ends a document, the commonest first."""


class Encoder:
    """Turns pieces of text into tokens; pickles without its compiled tokenizer.

    Args:
        tokenizer: a transformers tokenizer. With a fast one, long documents tokenise as if they
            were in one piece; a slow one, which does not say where its tokens stand in the text,
            tokenises each piece for itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        fast = getattr(tokenizer, "is_fast", False)
        self._slow = None if fast else tokenizer
        self._json: str = tokenizer.backend_tokenizer.to_str() if fast else ""
        self._split_special = bool(getattr(tokenizer, "split_special_tokens", False))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_fast"}

    @cached_property
    def _fast(self) -> Tokenizer:
        from tokenizers import Tokenizer

        fast = Tokenizer.from_str(self._json)
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = self._split_special
        return fast

    def encode(self, pieces: Sequence[Piece]) -> list[NDArray[np.int64]]:
        """The tokens that belong to each piece, int64, without any the tokenizer adds by itself."""
        if self._slow is not None:
            own = [piece.text[piece.start : piece.stop] for piece in pieces]
            return [_ids(self._slow.encode(text, add_special_tokens=False)) for text in own]
        tokens: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(pieces)
        for whole in (True, False):
            chosen = [i for i, piece in enumerate(pieces) if piece.whole is whole]
            # the fast variant leaves out where tokens stand, which only margins need
            encode = self._fast.encode_batch_fast if whole else self._fast.encode_batch
            texts = [pieces[i].text for i in chosen]
            for i, encoding in zip(chosen, encode(texts, add_special_tokens=False), strict=True):
                tokens[i] = _ids(encoding.ids if whole else _own_ids(encoding, pieces[i]))
        return tokens


def _own_ids(encoding: Encoding, piece: Piece) -> list[int]:
    """Ids of the tokens that start within the piece's own text."""
    offsets = encoding.offsets
    first = bisect_left(offsets, piece.start, key=lambda span: span[0])
    last = bisect_left(offsets, piece.stop, key=lambda span: span[0])
    if piece.start == 0:
        first = 0
    if piece.stop == len(piece.text):
        last = len(offsets)
    return encoding.ids[first:last]


def _ids(ids: list[int]) -> NDArray[np.int64]:
    return np.array(ids, dtype=np.int64)


def packing_for(
    tokenizer: Any,
    *,
    window_length: int,
    separator_id: int | None = None,
    holdout: float = 0.0,
    reset_attention: bool = False,
) -> Packing:
    """The packing that suits a tokenizer.

    The separator is, in this order: the one given; the tokenizer's end-of-sequence token if its
    name is one of `END_OF_TEXT`; the first special token of its vocabulary whose name is; its
    end-of-sequence token whatever its name. Chat models end a *turn* with their end-of-sequence
    token (`<|im_end|>`, `<|eot_id|>`), while the base model they were made from learnt documents
    that end with end-of-text; hence that order. The padding token is never considered.

    A beginning-of-text token is put before documents only if the tokenizer puts one before text.

    Args:
        tokenizer: a transformers tokenizer.
        window_length: tokens a window.
        separator_id: the end-of-text id, where the rule above is not wanted.
        holdout: share of the documents kept aside.
        reset_attention: recorded in the packing.

    Raises:
        CorpusError: no token that could separate documents, or a tokenizer that puts more than one
            token before text.
    """
    if separator_id is None:
        separator_id = _separator(tokenizer)
    bos = bos_id(tokenizer)
    return Packing(window_length, separator_id, bos, reset_attention, holdout)


def _separator(tokenizer: Any) -> int:
    added = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items()}
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    if eos_id is not None and eos in END_OF_TEXT:
        return int(eos_id)
    for name in END_OF_TEXT:
        if name in added:
            return added[name]
    if eos_id is None:
        raise CorpusError(
            "the tokenizer has no end-of-text token to separate documents with: pass separator_id, "
            "the id of the token that the teacher saw between documents"
        )
    return int(eos_id)


def bos_id(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before text by itself; None where it puts none.

    Raises:
        CorpusError: it puts more than one.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    extra = len(full) - len(plain)
    leading = next((n for n in range(extra + 1) if full[n : n + len(plain)] == plain), 0)
    if leading > 1:
        raise CorpusError(
            f"the tokenizer puts {leading} tokens before text ({full[:leading]}); a document is "
            "begun by one at most: make a Packing(...) that says which"
        )
    return int(full[0]) if leading else None
