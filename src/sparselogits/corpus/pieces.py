"""Cut documents into bounded pieces of text that tokenise as the whole document would.

A document may be larger than memory, so it is tokenised piece by piece. Cutting text changes its
tokens near the cut (a word torn in two, a space that belonged to the next word), and some
tokenizers put a space before every text. So a piece comes with a margin: up to `MARGIN_BYTES` of
the document on either side of its own text. It is tokenised with its margins, and of the tokens
those are kept that *start* within its own text. Both neighbours of a cut see the same surroundings,
so each token at the cut is kept by exactly one of them.

This guarantees: where the tokenizer's segmentation at a point depends on at most `MARGIN_BYTES`
around it (every tokenizer that splits text into words first, as long as no word is longer than
that), the pieces' tokens are the whole document's tokens, one for one. Cuts fall between a line
break and a line that begins with text, or, in a very long line, between two words. Where
`PIECE_BYTES` / 2 hold no white space at all, the cut falls between two characters, without margins,
so that no text is lost or doubled, but a token may be split there.

Margins are tokenised twice, at most 2 * MARGIN_BYTES / PIECE_BYTES = 1.6 % of a long document and
nothing of one shorter than `PIECE_BYTES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import CorpusError

PIECE_BYTES = 64 * 1024
MARGIN_BYTES = 512
HEAD_BYTES = 64 * 1024
_SALT = b"sparselogits hold-out 1"
_WHITE = b" \t\n\r\x0b\x0c"

Read = Callable[[int, int], bytes]
"""Returns the bytes [start, stop) of a file or string, fewer at its end."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """Tokens of one row of a trainer's data."""

    ids: NDArray[np.int64]
    learnt: NDArray[np.bool_]
    """Whether each token carries a target."""
    starts: NDArray[np.bool_]
    """Whether a document begins at each token, besides the first."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one document's text, to be tokenised at once, or of its tokens.

    Pieces of a document follow one another; `opens` and `closes` mark its first and last. A
    document that spans two portions of a source is opened in one and closed in another.
    """

    text: str
    """The piece's own text with its margins."""
    start: int
    """First character of the piece's own text."""
    stop: int
    """One past the last character of the piece's own text."""
    key: int
    """Key of the document, from `document_key`; equal in all of its pieces."""
    opens: bool
    closes: bool
    carries_target: bool
    """Whether the tokens are learnt (false in the prompt of a prompt and completion)."""
    size: int
    """Bytes of the source that the piece takes, for progress."""
    learnt: tuple[tuple[int, int], ...] | None = None
    """Ranges of `text`'s characters whose tokens carry targets, ascending; None where
    `carries_target` holds for all of them."""
    rendered: bool = False
    """Whether a chat template made the text, so that no beginning-of-text token is added."""
    tokens: TokenRow | None = None
    """Tokens of a document that has no text, complete as they are; None where text is."""

    @property
    def whole(self) -> bool:
        """Whether the piece has no margins."""
        return self.start == 0 and self.stop == len(self.text)

    @property
    def blank(self) -> bool:
        """Whether the piece is a whole document of nothing but white space."""
        return self.tokens is None and self.opens and self.closes and not self.text.strip()

    @property
    def weight(self) -> int:
        """Bytes that the piece takes in memory, about."""
        return len(self.text) + (0 if self.tokens is None else 8 * len(self.tokens.ids))


def blank_piece(size: int) -> Piece:
    """Return the piece of a document that holds nothing; `size` is that of the source."""
    return Piece("", 0, 0, 0, opens=True, closes=True, carries_target=True, size=size)


def document_key(head: bytes) -> int:
    """Return the number in [0, 2^64) by which the hold-out is chosen.

    Args:
        head: first `HEAD_BYTES` bytes of the document in UTF-8 (all of a shorter one).

    Equal documents have equal keys, so copies of a document fall on the same side of the split.
    """
    return int.from_bytes(hashlib.blake2b(_SALT + head[:HEAD_BYTES], digest_size=8).digest())


def cut_pieces(
    read: Read,
    start: int,
    stop: int,
    *,
    document: tuple[int, int],
    key: int,
    name: str,
) -> Iterator[Piece]:
    """Yield the pieces of a document's bytes [start, stop).

    Args:
        read: reads bytes of the file or string that holds the document.
        start: first byte, a cut made by `next_cut` or the document's first byte.
        stop: one past the last byte, likewise.
        document: first byte of the document and one past its last; margins stay within it. The end
            may be any byte from `stop + MARGIN_BYTES` on if it lies further away.
        key: key of the document.
        name: name of the file, for errors.

    Raises:
        CorpusError: the bytes are no UTF-8; gives the offset of the first wrong byte.
    """
    first, last = document
    begin = start
    while begin < stop:
        end = next_cut(read, begin, stop)
        left, right = begin, end
        if begin > first and _clean(read, begin):
            left = max(first, begin - MARGIN_BYTES)
        if end < last and _clean(read, end):
            right = min(last, end + MARGIN_BYTES)
        raw = read(left, right)
        # the margins' outer ends may cut through a character, whose rest is dropped
        before = raw[: begin - left].decode(errors="ignore")
        after = raw[end - left :].decode(errors="ignore")
        own = _decode(raw[begin - left : end - left], begin, name)
        yield Piece(
            before + own + after,
            len(before),
            len(before) + len(own),
            key,
            opens=begin == first,
            closes=end == last,
            carries_target=True,
            size=end - begin,
        )
        begin = end


def next_cut(read: Read, start: int, stop: int) -> int:
    """Return where the piece that starts at `start` ends: at most `PIECE_BYTES` further on.

    The cut lies in the second half of that range: after the last line break that is followed by
    text, else before the last blank between two words (tokenizers count it to the word that
    follows, so no token reaches across the cut), else before any character.
    """
    if stop - start <= PIECE_BYTES:
        return stop
    block = read(start, start + PIECE_BYTES + 1)
    half = PIECE_BYTES // 2
    for white, after in ((b"\n", 1), (b" ", 0)):
        at = block.rfind(white, half, PIECE_BYTES)
        while at >= 0:
            if block[at + 1] not in _WHITE and (after or block[at - 1] not in _WHITE):
                return start + at + after
            at = block.rfind(white, half, at)
    end = PIECE_BYTES
    while end > half and block[end] & 0xC0 == 0x80:  # inside a character of UTF-8
        end -= 1
    return start + end


def _clean(read: Read, cut: int) -> bool:
    """Return whether a cut is at the edge of a word, so that margins make the neighbours agree."""
    around = read(cut - 1, cut + 1)
    return len(around) == 2 and (around[0] in _WHITE) != (around[1] in _WHITE)


def _decode(raw: bytes, offset: int, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        raise CorpusError(
            f"{name} is not UTF-8 text: byte 0x{bad:02x} at offset {offset + error.start} "
            f"({error.reason}). Convert it (for example `iconv -f LATIN1 -t UTF-8`), or leave it "
            "out if it is not text."
        ) from None
