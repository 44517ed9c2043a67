"""Read formats in which each line is a record, plain or compressed; JSON lines is one.

A plain file is divided into ranges of bytes that are read independently; a line belongs to the
range in which it begins. A compressed file cannot be entered in the middle: it is one span, read by
one process. Memory is bounded by the longest line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sparselogits.corpus.formats.compression import is_compressed, open_decompressed
from sparselogits.corpus.formats.format import Format, SourceFile, Span
from sparselogits.corpus.records import Fields, Record, Where
from sparselogits.errors import CorpusError

LONGEST_LINE = 1 << 30
"""Bytes that a line of a compressed file may have; a few bytes can decompress to more."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineFormat(Format):
    """A format in which each line is a record. A subclass defines `record`."""

    compressible = True

    def record(self, line: bytes, where: Where) -> Mapping[str, Any]:
        """Return the fields of a line that is not blank.

        Raises:
            CorpusError: the line is no record; `where()` names the file and the line.
        """
        raise NotImplementedError

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into ranges of bytes; a compressed file is one range."""
        size = file.path.stat().st_size
        step = max(size, 1) if is_compressed(file.path) else span_bytes
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield Span(file, start, stop, stop - start)

    def records(self, span: Span, fields: Fields | None) -> Iterator[Record]:
        """Yield the records of the lines that begin within a span."""
        lines = _compressed_lines if is_compressed(span.file.path) else _plain_lines
        for line, where, size in lines(span):
            if not line.isspace():
                yield Record(self.record(line, where), where, size)


class JsonLines(LineFormat):
    """JSON lines: each line is a JSON object."""

    name = "json"
    suffixes = (".jsonl", ".ndjson")
    weak_suffixes = (".json",)

    def record(self, line: bytes, where: Where) -> Mapping[str, Any]:
        """Return the object of a line."""
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


def _plain_lines(span: Span) -> Iterator[tuple[bytes, Where, int]]:
    """Yield the lines that begin within a span, a function that names each, and their bytes."""
    path, name = span.file.path, span.file.name
    with path.open("rb") as handle:
        handle.seek(max(span.start - 1, 0))
        if span.start:
            handle.readline()  # the rest of a line that belongs to the span before
        while (offset := handle.tell()) < span.stop:
            line = handle.readline()
            yield line, partial(_place_of_byte, path, name, offset), len(line)


def _compressed_lines(span: Span) -> Iterator[tuple[bytes, Where, int]]:
    """Yield the lines of a compressed file as `_plain_lines`, with compressed sizes."""
    path, name = span.file.path, span.file.name
    done = number = 0
    with path.open("rb") as raw:
        lines = open_decompressed(path, name, raw)
        while line := lines.readline(LONGEST_LINE):
            number += 1
            size, done = raw.tell() - done, raw.tell()
            where = partial("{}, line {}".format, name, number)
            if len(line) == LONGEST_LINE:
                raise CorpusError(
                    f"{where()} is longer than {LONGEST_LINE >> 20} MiB; each line must hold one "
                    "record, so divide it into several"
                )
            yield line, where, size


def _place_of_byte(path: Path, name: str, offset: int) -> str:
    """Name the line that begins at a byte; costs a pass over the file up to there."""
    number, left = 1, offset
    with path.open("rb") as handle:
        while left and (block := handle.read(min(left, 1 << 20))):
            number += block.count(b"\n")
            left -= len(block)
    return f"{name}, line {number}"
