"""Define the interface of a document format.

A format declares the suffixes of files that it reads, divides a file into spans that can be read
independently, and yields the documents of a span.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.records import Fields, Record, record_pieces
from sparselogits.errors import CorpusError


@dataclass(frozen=True)
class SourceFile:
    """File from which a source reads documents."""

    path: Path
    """Path of the file on this machine."""
    name: str
    """Path relative to the folder that the user named, or that begins a pattern; otherwise the
    file's name. It has forward slashes, and does not change when the folder is moved."""
    format: Format
    """Format in which the file is read."""


@dataclass(frozen=True, slots=True)
class Span:
    """Contiguous range of one file that can be read independently, in units of the file's format.

    The unit is a byte for text and JSON lines, a row group for Parquet, a record batch for Arrow,
    and a window or a sequence for token ids.
    """

    file: SourceFile
    """File that contains the range."""
    start: int
    """Index in the file of the span's first unit."""
    stop: int
    """Index in the file of the unit after the span's last unit."""
    size: int
    """Approximate size of the range in bytes, for progress and for division into portions."""
    document: int = 0
    """Byte offset in the file at which the document at `start` begins (text only)."""


@dataclass(frozen=True)
class Format:
    """Base class of the document formats.

    A subclass sets `name` and `suffixes` and implements `records`; the other methods read a file as
    one span and yield one document per record. Instances have no state, so all instances of one
    class are equal. docs/extending.md has an example.
    """

    name: ClassVar[str]
    """Name of the format; part of a source's fingerprint."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes, in lower case, of files that are read in folders and by name."""
    weak_suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes that files of other kinds often have, too; such a file, if it is not compressed, is
    read if the user names it, if its name assigns it to a split, or if the named folder contains no
    other text."""
    named_suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of files that are read if the user names them, but ignored in folders."""
    holds_records: ClassVar[bool] = True
    """Whether files contain records with named fields, or token ids, instead of plain text."""
    compressible: ClassVar[bool] = False
    """Whether `.gz`, `.bz2`, `.xz` or `.zst` may follow the suffix."""
    holds_tokens: ClassVar[bool] = False
    """Whether documents are token ids; only `pieces` reads these."""
    binary: ClassVar[bool] = False
    """Whether the files are binary; text files that begin like an archive are rejected."""

    @property
    def all_suffixes(self) -> tuple[str, ...]:
        """All suffixes by which a file that the user names is assigned to this format."""
        return (*self.suffixes, *self.weak_suffixes, *self.named_suffixes)

    def files(self, path: Path) -> tuple[Path, ...]:
        """Return a file's path, followed by the paths of files that contain more of its content."""
        return (path,)

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into consecutive spans of about `span_bytes` bytes.

        Args:
            file: file to divide.
            span_bytes: size of a span, in bytes.
            fields: names of the fields that will be read; None for all fields.

        Raises:
            CorpusError: the file cannot be read, or lacks the fields.
        """
        size = file.path.stat().st_size
        if size:
            yield Span(file, 0, size, size)

    def records(self, span: Span, fields: Fields | None) -> Iterator[Record]:
        """Yield the records of a span, in order.

        Args:
            span: span from `spans`.
            fields: names of the fields to read, for formats that can skip the others; None for all
                fields.

        Raises:
            CorpusError: the span cannot be read; the message contains the file.
        """
        raise NotImplementedError

    def pieces(self, span: Span, fields: Fields) -> Iterator[Piece]:
        """Yield the pieces of a span's text, in order.

        Args:
            span: span from `spans`.
            fields: names of the fields that contain text.

        Raises:
            CorpusError: the span cannot be read, or a record cannot be converted to text or tokens.
        """
        for record in self.records(span, fields):
            for piece in record_pieces(record, fields):
                if fields.label is None:
                    yield piece
                else:
                    label = fields.label_of(record.values, record.where)
                    yield replace(piece, label=label)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Convert an `OSError` in a block to a `CorpusError` that contains the path.

    Raises:
        CorpusError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"cannot read {path}: {error.strerror or error}; check the file, its permissions and "
            "its disk"
        ) from error
