"""Read formats with one record per line, such as JSON lines, plain or compressed.

A plain file is divided into ranges of bytes that are read independently; a line belongs to the
range in which it begins. A compressed file cannot be read from the middle, so it is one span that
one process reads. Memory is bounded by the longest line.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sparselogits.corpus.formats.compression import is_compressed, open_decompressed
from sparselogits.corpus.formats.format import Format, SourceFile, Span
from sparselogits.corpus.records import Fields, Record, Where
from sparselogits.errors import CorpusError

LONGEST_LINE = 1 << 30
"""Length in bytes from which a line in a compressed file is rejected. Without a limit, a small file
could exhaust the memory."""


class LineFormat(Format):
    """Format with one record per line; a subclass implements `record`.

    docs/extending.md has an example.
    """

    compressible = True

    def record(self, line: bytes, where: Where) -> Mapping[str, Any]:
        """Return the values of a line by field name.

        Args:
            line: a line that is not blank, with its line break if it has one.
            where: function that returns the file name and the number of the line, for errors.

        Raises:
            CorpusError: the line is not a record.
        """
        raise NotImplementedError

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into ranges of `span_bytes` bytes; a compressed file is one range."""
        size = file.path.stat().st_size
        step = max(size, 1) if is_compressed(file.path) else span_bytes
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield Span(file, start, stop, stop - start)

    def records(self, span: Span, fields: Fields | None) -> Iterator[Record]:
        """Yield the records of the lines that begin within a span; blank lines are skipped."""
        lines = _compressed_lines if is_compressed(span.file.path) else _plain_lines
        for line, where, size in lines(span):
            if not line.isspace():
                yield Record(self.record(line, where), where, size)


class JsonLines(LineFormat):
    """Format of JSON lines, in which each line is a JSON object."""

    name = "json"
    suffixes = (".jsonl", ".ndjson")
    weak_suffixes = (".json",)

    def record(self, line: bytes, where: Where) -> Mapping[str, Any]:
        """Return the JSON object of a line; see `LineFormat.record`."""
        advice = "each line must be one JSON object"
        if line.lstrip()[:1] == b"[":
            advice += "; convert a JSON array to lines with `jq -c '.[]'`"
        start = line[:40].decode(errors="replace").strip()
        try:
            record = json.loads(line.removeprefix(BOM_UTF8))
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{where()} is not UTF-8 text: byte 0x{error.object[error.start]:02x} "
                f"({error.reason}). Convert the file (for example `iconv -f LATIN1 -t UTF-8`)"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where()} is not JSON ({error}): {start!r}; {advice}") from None
        if not isinstance(record, dict):
            raise CorpusError(f"{where()} is not an object with named fields: {start!r}; {advice}")
        return record


def _plain_lines(span: Span) -> Iterator[tuple[bytes, Where, int]]:
    """Yield (line, function that returns its position, length in bytes) per line of a span."""
    path, name = span.file.path, span.file.name
    with path.open("rb") as handle:
        handle.seek(max(span.start - 1, 0))
        if span.start:
            handle.readline()  # the rest of a line of the previous span
        while (offset := handle.tell()) < span.stop:
            line = handle.readline()
            yield line, partial(_line_at, path, name, offset), len(line)


def _compressed_lines(span: Span) -> Iterator[tuple[bytes, Where, int]]:
    """Yield lines as `_plain_lines` does; the length is the number of compressed bytes read."""
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
                    f"{where()} is longer than {LONGEST_LINE >> 20} MiB; expected one record per "
                    "line. Divide the record into several"
                )
            yield line, where, size


def _line_at(path: Path, name: str, offset: int) -> str:
    """Return the file name and line number at a byte offset, by counting the lines before it."""
    number, remaining = 1, offset
    with path.open("rb") as handle:
        while remaining and (block := handle.read(min(remaining, 1 << 20))):
            number += block.count(b"\n")
            remaining -= len(block)
    return f"{name}, line {number}"
