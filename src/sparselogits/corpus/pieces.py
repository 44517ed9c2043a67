"""Cut documents into bounded pieces whose tokens are, if possible, those of the whole document.

A document may be larger than memory, so it is tokenised in pieces. A cut changes the tokens near it
(a split word, a space that belonged to the next word), and some tokenizers add a space before every
text. Therefore a piece is tokenised with margins: up to `MARGIN_BYTES` of the document before and
after the piece (together up to 1.6 % of `PIECE_BYTES`). Only the tokens that *start* between the
margins are used. Both neighbours of a cut are tokenised with the same text around the cut, so
exactly one of them uses each token there.

The tokens equal those of the whole document if the tokenizer's segmentation at a point depends on
at most `MARGIN_BYTES` around it, as in tokenizers that split text into words first. Text without
white space is cut between two characters without margins, so a token may be split there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import CorpusError

PIECE_BYTES = 64 * 1024
"""Maximum size of a piece without its margins, in bytes; a conversation may be a larger piece."""
MARGIN_BYTES = 512
"""Maximum size of a margin, in bytes."""
HEAD_BYTES = 64 * 1024
"""Number of bytes at the beginning of a document that determine its key."""
_SALT = b"sparselogits hold-out 1"
_WHITE = b" \t\n\r\x0b\x0c"

Read = Callable[[int, int], bytes]
"""Function that returns the bytes [start, stop) of a file or string, fewer at its end."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """N tokens of a row of token ids, which may contain several documents, and padding."""

    ids: NDArray[np.int64]
    """Token ids, int64 [N]."""
    learnt: NDArray[np.bool_]
    """Whether each token carries a target, bool [N]."""
    starts: NDArray[np.bool_]
    """Whether each token after the first begins another document or the padding, bool [N]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of one document: consecutive characters that are tokenised at once, or token ids."""

    text: str
    """Text of the piece with its margins."""
    start: int
    """Index in `text` of the first character after the left margin."""
    stop: int
    """Index in `text` of the first character of the right margin."""
    key: int
    """Key of the document, from `document_key`; the key of the first piece applies."""
    opens: bool = True
    """Whether this is the first piece of its document."""
    closes: bool = True
    """Whether this is the last piece of its document."""
    carries_target: bool = True
    """Whether the tokens carry targets; false for a prompt if only completions do."""
    size: int = 0
    """Number of bytes of the source that are counted with the piece, for progress."""
    learnt: tuple[tuple[int, int], ...] | None = None
    """Ascending ranges [start, stop) of characters in `text`; their tokens carry targets. None if
    `carries_target` applies to all tokens."""
    rendered: bool = False
    """Whether a chat template rendered the text; if so, no beginning-of-text token is added."""
    tokens: TokenRow | None = None
    """Tokens of a row of token ids, to which no special tokens are added; None for text."""
    label: str | None = None
    """Label of the document, see `Fields.label`; None for a document without a label."""

    @property
    def whole(self) -> bool:
        """Whether the piece has no margins."""
        return self.start == 0 and self.stop == len(self.text)

    @property
    def blank(self) -> bool:
        """Whether the piece is a whole document that is empty or only white space."""
        return self.tokens is None and self.opens and self.closes and not self.text.strip()

    @property
    def weight(self) -> int:
        """Approximate number of bytes that the piece occupies in memory."""
        return len(self.text) + (0 if self.tokens is None else 8 * len(self.tokens.ids))


def blank_piece(size: int) -> Piece:
    """Return the piece of a document without text that occupies `size` bytes in the source."""
    return Piece("", 0, 0, 0, size=size)


def document_key(head: bytes) -> int:
    """Return the hash in [0, 2^64) of a document's first `HEAD_BYTES` bytes (UTF-8, or int32 ids).

    With the hold-out rule "documents", the hash determines whether the document is held out, so
    copies of a document are on one side.
    """
    return int.from_bytes(hashlib.blake2b(_SALT + head[:HEAD_BYTES], digest_size=8).digest())


def cut_pieces(
    read: Read, start: int, stop: int, *, document: tuple[int, int], key: int, name: str
) -> Iterator[Piece]:
    """Yield the pieces of a document's bytes [start, stop); `next_cut` determines their ends.

    Margins stay within `document`, the offsets of the document's first byte and of the byte after
    its last one. The latter may be any offset beyond `stop + MARGIN_BYTES` if the end is unknown.

    Raises:
        CorpusError: the bytes are not UTF-8; the message contains the offset of the first invalid
            byte.
    """
    first, last = document
    begin = start
    while begin < stop:
        end = next_cut(read, begin, stop)
        left, right = begin, end
        if begin > first and _is_word_edge(read, begin):
            left = max(first, begin - MARGIN_BYTES)
        if end < last and _is_word_edge(read, end):
            right = min(last, end + MARGIN_BYTES)
        raw = read(left, right)
        # the outer ends of the margins may split a character, which is then ignored
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
            size=end - begin,
        )
        begin = end


def next_cut(read: Read, start: int, stop: int) -> int:
    """Return the end of the piece that starts at `start`, in a document that ends at `stop`.

    The end is `stop` if at most `PIECE_BYTES` bytes remain. Otherwise it lies in the second half of
    the next `PIECE_BYTES` bytes: after the last line break that is followed by text; if there is
    none, before the last space between two words (most tokenizers join the space with the next
    word, so no token crosses the cut); otherwise between two characters.
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


def _is_word_edge(read: Read, cut: int) -> bool:
    """Return whether a cut lies between white space and text, as margins require."""
    around = read(cut - 1, cut + 1)
    return len(around) == 2 and (around[0] in _WHITE) != (around[1] in _WHITE)


def _decode(raw: bytes, offset: int, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        raise CorpusError(
            f"{name} is not UTF-8 text: byte 0x{bad:02x} at offset {offset + error.start} "
            f"({error.reason}). Convert it (for example `iconv -f LATIN1 -t UTF-8`), or remove "
            "it if it is not text."
        ) from None
