"""JSON lines, plain or compressed: a line is a record.

A plain file is divided into ranges of bytes that are read independently; a line belongs to the
range in which it begins. A compressed file (.gz, .bz2, .xz, .zst) cannot be entered in the middle:
it is one span, read by one process. Memory is bounded by the longest line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparselogits.corpus.compressed import COMPRESSION, LONGEST_LINE, open_lines
from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.records import Fields, Where, record_pieces
from sparselogits.corpus.spans import Span
from sparselogits.errors import CorpusError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def spans(path: Path, file: int, span_bytes: int) -> Iterator[Span]:
    """Byte ranges of a file of JSON lines; a compressed file is one range."""
    size = path.stat().st_size
    step = max(size, 1) if path.suffix.lower() in COMPRESSION else span_bytes
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield Span(file, start, stop, stop - start)


def pieces(path: Path, name: str, span: Span, fields: Fields) -> Iterator[Piece]:
    """The documents of the lines that begin within a span. Errors are those of `records`."""
    for record, where, size in records(path, name, span):
        yield from record_pieces(record, fields, where, size)


def records(path: Path, name: str, span: Span) -> Iterator[tuple[dict[str, Any], Where, int]]:
    """The lines that begin within a span: the record, what names its place, bytes read for it.

    Raises:
        CorpusError: naming file and line, for a line that is no JSON object.
    """
    if path.suffix.lower() in COMPRESSION:
        yield from _compressed_records(path, name)
        return
    with path.open("rb") as handle:
        handle.seek(max(span.start - 1, 0))
        if span.start:
            handle.readline()  # the rest of a line that belongs to the span before
        while (offset := handle.tell()) < span.stop:
            line = handle.readline()

            def where(offset: int = offset) -> str:
                return f"{name}, line {_line_number(path, offset)}"

            if not line.isspace():
                yield _record(line, where), where, len(line)


def _compressed_records(path: Path, name: str) -> Iterator[tuple[dict[str, Any], Where, int]]:
    done = 0
    with path.open("rb") as raw:
        lines = open_lines(path, name, raw)
        number = 0
        while line := lines.readline(LONGEST_LINE):
            number += 1
            # compressed bytes read since the last record
            size, done = raw.tell() - done, raw.tell()

            def where(number: int = number) -> str:
                return f"{name}, line {number}"

            if len(line) == LONGEST_LINE:
                raise CorpusError(
                    f"{where()} is longer than {LONGEST_LINE >> 20} MiB; each line must hold one "
                    "JSON object, so divide it into several"
                )
            if not line.isspace():
                yield _record(line, where), where, size


def _record(line: bytes, where: Where) -> dict[str, Any]:
    advice = "each line must hold one JSON object"
    if line.lstrip()[:1] == b"[":
        advice += "; convert a JSON array to lines with `jq -c '.[]'`"
    start = line[:40].decode(errors="replace").strip()
    try:
        record = json.loads(line.removeprefix(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where()} is not JSON ({error}): {start!r}; {advice}") from None
    if not isinstance(record, dict):
        raise CorpusError(f"{where()} is not an object with named fields: {start!r}; {advice}")
    return record


def _line_number(path: Path, offset: int) -> int:
    lines, left = 1, offset
    with path.open("rb") as handle:
        while left and (block := handle.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
