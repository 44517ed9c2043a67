"""Read text files, each of which is one document unless separator lines divide it.

A line that consists of `<|endoftext|>` separates two documents, as in many published corpora of
plain text; it belongs to neither of them. Form feeds do not separate documents, because they mark
pages in old plain text and in source code.

Large files are divided into spans that can be read independently. A span that begins in the middle
of a document contains the offset at which the document begins.
"""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import NoReturn

from sparselogits.corpus.formats.format import Format, SourceFile, Span
from sparselogits.corpus.pieces import (
    HEAD_BYTES,
    MARGIN_BYTES,
    Piece,
    Read,
    cut_pieces,
    document_key,
    next_cut,
)
from sparselogits.corpus.records import Fields
from sparselogits.errors import CorpusError

SEPARATOR = b"<|endoftext|>"
"""Content of a line that separates two documents."""

_LINE = re.compile(re.escape(SEPARATOR) + rb"(\r?\n|\Z)")
_SCAN_BYTES = 1 << 20


class Text(Format):
    """Format of plain text files in UTF-8."""

    name = "text"
    suffixes = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
    holds_records = False

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into ranges of about `span_bytes` bytes, between words if possible."""
        with file.path.open("rb") as handle:
            read = partial(_read, handle.fileno())
            size = file.path.stat().st_size
            start = document = _first_byte(read)
            separators = document_separators(read, start, size)
            following = next(separators, None)
            while size - start > span_bytes:
                cut = next_cut(read, start + span_bytes, size)
                if cut == size:
                    break
                yield Span(file, start, cut, cut - start, document)
                while following is not None and following[1] <= cut:
                    document, following = following[1], next(separators, None)
                start = cut
            if start < size:
                yield Span(file, start, size, size - start, document)

    def records(self, span: Span, fields: Fields | None) -> NoReturn:
        """Raise a `CorpusError`, because plain text has no records."""
        raise CorpusError(
            f"{span.file.name} contains plain text; expected records. Give a file of records"
        )

    def pieces(self, span: Span, fields: Fields) -> Iterator[Piece]:
        """Yield the pieces of a span's text, in order.

        Raises:
            CorpusError: the bytes are not text in UTF-8.
        """
        path, name = span.file.path, span.file.name
        with path.open("rb") as handle:
            read = partial(_read, handle.fileno())
            at = read(0, HEAD_BYTES).find(b"\0") if span.start == span.document else -1
            if at >= 0:
                raise CorpusError(
                    f"{name} is not a text file: it has a zero byte at offset {at}. If it is "
                    "UTF-16, convert it to UTF-8 (`iconv -f UTF-16 -t UTF-8`); if it is not text, "
                    "remove it."
                )
            # the end of the last document limits the right margin
            ahead = min(span.stop + MARGIN_BYTES + 1, path.stat().st_size)
            document, begin = span.document, span.start
            ends = document_separators(read, begin, ahead)
            for end, following in chain(ends, [(ahead, ahead)]):
                stop = min(end, span.stop)
                if begin < stop:
                    key = document_key(_head(read, document))
                    yield from cut_pieces(
                        read, begin, stop, document=(document, end), key=key, name=name
                    )
                if following >= span.stop:
                    return
                document = begin = following


def document_separators(read: Read, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield (first byte, byte after) for each separator line that begins in [start, stop)."""
    position, first = start, _first_byte(read)
    while position < stop:
        block_stop = min(position + _SCAN_BYTES, stop)
        # include the byte before (a possible line break) and the line break after a separator
        origin = max(position - 1, 0)
        block = read(origin, block_stop + len(SEPARATOR) + 2)
        for found in _LINE.finditer(block, position - origin):
            at, after = found.span()
            if at >= block_stop - origin:
                break
            if origin + at == first or block[at - 1 : at] == b"\n":
                yield origin + at, origin + after
        if len(block) < block_stop - origin:
            return  # the file is shorter than `stop`
        position = block_stop


def _head(read: Read, document: int) -> bytes:
    """Return the first `HEAD_BYTES` bytes of a document, or all bytes of a shorter one."""
    head = read(document, document + HEAD_BYTES + len(SEPARATOR) + 3)
    end = next(document_separators(read, document, document + HEAD_BYTES), None)
    return head[: HEAD_BYTES if end is None else end[0] - document]


def _first_byte(read: Read) -> int:
    """Return the offset at which the text begins: after the byte order mark, if there is one."""
    return len(BOM_UTF8) if read(0, len(BOM_UTF8)) == BOM_UTF8 else 0


def _read(descriptor: int, start: int, stop: int) -> bytes:
    return os.pread(descriptor, max(0, stop - start), start)
