"""Tokenise documents, and select the packing for a tokenizer.

Special tokens that occur as text (such as `<|endoftext|>` in the middle of a line) are tokenised as
by a direct call of the tokenizer, to the ids of the special tokens, unless the tokenizer was loaded
with `split_special_tokens=True`.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.windows import Packing, PackingKind
from sparselogits.errors import CorpusError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|endofdocument|>")
"""Names of tokens that end a document, in order of preference."""

BATCH_SECONDS = 30
"""Maximum time to tokenise a batch of about a megabyte, in seconds; a second is typical.

The batch fails once both its wall time and the processor time of the process exceed this limit.
"""


class Encoded(NamedTuple):
    """Tokens of a piece."""

    ids: NDArray[np.int64]
    """Token ids, int64 [N]."""
    learnt: NDArray[np.bool_] | bool
    """Whether each token (bool [N]), or every token, carries a target."""


class Encoder:
    """Tokenizer for pieces of text; a pickled copy compiles its tokenizer again.

    Args:
        tokenizer: a transformers tokenizer. With a fast tokenizer, the tokens of a long document
            usually do not depend on how it is cut into pieces; a slow tokenizer returns no
            character offsets, so it tokenises each piece independently.
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

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """Return the tokens of each piece, without the special tokens that the tokenizer adds.

        Raises:
            CorpusError: a fast tokenizer fails on a text, or takes longer than `BATCH_SECONDS`.
        """
        encoded = {
            i: Encoded(row.ids, row.learnt)
            for i, piece in enumerate(pieces)
            if (row := piece.tokens) is not None
        }
        texts = [i for i in range(len(pieces)) if i not in encoded]
        if self._slow is not None:
            encoded |= {i: _encode_without_offsets(self._slow, pieces[i]) for i in texts}
            return [encoded[i] for i in range(len(pieces))]
        # only margins and masks need offsets, which encode_batch_fast does not compute
        needs_offsets = [not piece.whole or piece.learnt is not None for piece in pieces]
        for offsets in (True, False):
            chosen = [i for i in texts if needs_offsets[i] is offsets]
            encode = self._fast.encode_batch if offsets else self._fast.encode_batch_fast
            given = [pieces[i].text for i in chosen]
            for i, encoding in zip(chosen, _encode_in_time(encode, given), strict=True):
                encoded[i] = (
                    _without_margins(encoding, pieces[i])
                    if offsets
                    else Encoded(_ids(encoding.ids), pieces[i].carries_target)
                )
        return [encoded[i] for i in range(len(pieces))]


def _without_margins(encoding: Encoding, piece: Piece) -> Encoded:
    """Return the tokens that start between the margins of a piece."""
    offsets = encoding.offsets
    first = bisect_left(offsets, piece.start, key=lambda span: span[0])
    last = bisect_left(offsets, piece.stop, key=lambda span: span[0])
    if piece.start == 0:
        first = 0
    if piece.stop == len(piece.text):
        last = len(offsets)
    ids = _ids(encoding.ids[first:last])
    if piece.learnt is None:
        return Encoded(ids, piece.carries_target)
    return Encoded(ids, _token_mask(offsets[first:last], piece.learnt))


def _token_mask(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    """Return whether each token, given by its range of characters, belongs to one of `spans`.

    As in transformers' `assistant_masks`, the tokens of a span begin with the first one that
    contains the span's first character, and end with the first one that contains the last. If no
    token contains such a character (some tokenizers drop white space), the nearest token within the
    span is used.
    """
    learnt = np.zeros(len(offsets), np.bool_)
    if not len(offsets):
        return learnt
    begins, ends = np.array(offsets, dtype=np.int64).T
    ends = np.maximum.accumulate(ends)
    for start, stop in spans:
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop - 1, side="right"))
        beyond = last == len(ends) or begins[last] >= stop
        learnt[first : last if beyond else last + 1] = True
    return learnt


def _encode_without_offsets(tokenizer: Any, piece: Piece) -> Encoded:
    """Return a piece's tokens from a tokenizer that returns no character offsets."""
    text = piece.text[piece.start : piece.stop]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if piece.learnt is None:
        return Encoded(_ids(ids), piece.carries_target)
    learnt = np.zeros(len(ids), np.bool_)
    for start, stop in piece.learnt:
        edges = (max(start - piece.start, 0), max(stop - piece.start, 0))
        first, last = (_tokens_before(tokenizer, text[:edge], ids) for edge in edges)
        learnt[first[0] : last[1]] = True
    return Encoded(_ids(ids), learnt)


def _tokens_before(tokenizer: Any, prefix: str, ids: list[int]) -> tuple[int, int]:
    """Estimate how many tokens of `ids` lie completely, and at least partly, in a text's prefix."""
    before = tokenizer.encode(prefix, add_special_tokens=False)
    pairs = enumerate(zip(before, ids, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(ids)))
    return same, min(len(ids), same + (same < len(before)))


def _ids(ids: list[int]) -> NDArray[np.int64]:
    return np.array(ids, dtype=np.int64)


def _encode_in_time(encode: Callable[..., list[Encoding]], texts: list[str]) -> list[Encoding]:
    """Return the encodings of texts; raise CorpusError on a failure or after `BATCH_SECONDS`.

    The regular expressions of a tokenizer are untrusted and may take exponential time. Python
    cannot stop a running one, so its thread is abandoned and ends with the process.
    """
    if not texts:
        return []
    results: list[list[Encoding]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(encode(texts, add_special_tokens=False))
        except BaseException as error:  # a panic of compiled code is not an Exception
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    began, used = time.monotonic(), time.process_time()
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
        # processor time counts as well, so that a busy machine causes no error
        if min(time.monotonic() - began, time.process_time() - used) > BATCH_SECONDS:
            break
    if results:
        return results[0]
    reason = f"did not finish within {BATCH_SECONDS} s"
    if failures:
        if len(texts) > 1:
            return [encoding for text in texts for encoding in _encode_in_time(encode, [text])]
        if not isinstance(failures[0], Exception) and "Panic" not in type(failures[0]).__name__:
            raise failures[0]
        reason = f"failed ({failures[0]})"
    start = f", which begins {texts[0][:60]!r}" if len(texts) == 1 else ""
    raise CorpusError(
        f"the tokenizer {reason} on a batch of {len(texts)} texts{start}; a regular expression in "
        "its tokenizer.json probably backtracks. Use the tokenizer of the model's publisher, or "
        "remove texts with very long runs of one kind of character"
    )


def packing_for(
    tokenizer: Any,
    *,
    window_length: int,
    separator_id: int | None = None,
    holdout: float = 0.0,
    reset_attention: bool = False,
    kind: PackingKind = "joined",
) -> Packing:
    """Return the packing for a tokenizer, with its separator and beginning-of-text token.

    The separator is the first of these that exists: the given `separator_id`; for the kind
    "documents", the token that the tokenizer adds after text; if there is no end-of-sequence token,
    the separator token (BERT's [SEP]); the end-of-sequence token, if its name is in `END_OF_TEXT`;
    the first of `END_OF_TEXT` that is an added token; the end-of-sequence token. The reason for
    this order: chat models end a *turn* with their end-of-sequence token (`<|im_end|>`,
    `<|eot_id|>`), while their base models were trained on documents that end with an end-of-text
    token. Windows of the kind "documents" are padded with the padding token, or with the separator
    if there is none.

    Documents begin with a beginning-of-text token only if the tokenizer adds one to text.

    Args:
        tokenizer: a transformers tokenizer.
        window_length: number of tokens per window.
        separator_id: id of the separator; None for the rule above.
        holdout: share of the tokens that is held out, in [0, 1).
        reset_attention: whether attention restarts at document starts.
        kind: kind of packing: "joined" or "documents", see `Packing`.

    Raises:
        CorpusError: the tokenizer has no token that could separate documents; it adds more than
            one token before text; or, for the kind "documents" without `separator_id`, after text.
        InvalidArgumentError: an argument is out of range; see `Packing`.
    """
    before, after = added_tokens(tokenizer)
    if separator_id is None and kind == "documents" and after:
        if len(after) > 1:
            raise CorpusError(
                f"the tokenizer adds {len(after)} tokens after text ({after}), expected at most "
                "one; give the id of the token that ends a window as separator_id"
            )
        separator_id = after[0]
    if separator_id is None:
        separator_id = _separator(tokenizer)
    if len(before) > 1:
        raise CorpusError(
            f"the tokenizer adds {len(before)} tokens before text ({before}), expected at most "
            "one; give the id of the token before documents as bos_id of a Packing(...)"
        )
    bos = int(before[0]) if before else None
    if kind == "joined":
        return Packing(window_length, separator_id, bos, reset_attention, holdout)
    pad = tokenizer.pad_token_id
    padding = separator_id if pad is None else int(pad)
    return Packing(window_length, separator_id, bos, reset_attention, holdout, kind, padding)


def _separator(tokenizer: Any) -> int:
    added = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items()}
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    if eos_id is None and tokenizer.sep_token_id is not None:
        return int(tokenizer.sep_token_id)  # BERT's tokenizers end a text with [SEP]
    if eos_id is not None and eos in END_OF_TEXT:
        return int(eos_id)
    for name in END_OF_TEXT:
        if name in added:
            return added[name]
    if eos_id is None:
        raise CorpusError(
            "the tokenizer has no end-of-text token to separate documents; pass separator_id, "
            "the id of the token that separated documents in the teacher's training"
        )
    return int(eos_id)


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the tokens that a tokenizer adds before and after text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full: list[int] = tokenizer.encode("a")
    extra = len(full) - len(plain)
    before = next((n for n in range(extra + 1) if full[n : n + len(plain)] == plain), 0)
    return full[:before], full[before + len(plain) :]
