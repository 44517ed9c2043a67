"""Define the interface of a document format.

A format names the files that it reads, divides a file into spans that can be read independently,
and yields the documents of a span.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.records import Fields, Record, record_pieces
from sparselogits.errors import CorpusError


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """Path relative to what the user named, with forward slashes: it stays the same when the corpus
    is moved."""
    format: Format


@dataclass(frozen=True, slots=True)
class Span:
    """A contiguous run of one file that can be read by itself, in the units of its format.

    The units are bytes for text and JSON lines, row groups for Parquet, record batches for Arrow.
    """

    file: SourceFile
    start: int
    stop: int
    size: int
    """Bytes of the run, for progress and for making portions of equal work."""
    document: int = 0
    """Position at which the document that covers `start` begins (text only)."""


@dataclass(frozen=True)
class Format:
    """A document format.

    A subclass states `name` and `suffixes` and defines `records`; the other methods have defaults
    that read a file as one span and make one document per record. Instances have no state: two of
    one class are equal.
    """

    name: ClassVar[str]
    """Name of the format; enters the fingerprint of a source."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the files that are read, in lower case: in folders and by name."""
    weak_suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes that files of other purposes often have: read if the user names the file, if its
    name puts it into a split, or if its folder holds nothing else to read."""
    named_suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of files that are read only if the user names the file."""
    holds_records: ClassVar[bool] = True
    """Whether a document is a record with named fields; else it is plain text."""
    compressible: ClassVar[bool] = False
    """Whether `.gz`, `.bz2`, `.xz` or `.zst` may follow the suffix."""
    holds_tokens: ClassVar[bool] = False
    """Whether documents are token ids, which are read by `pieces` alone."""
    binary: ClassVar[bool] = False
    """Whether the files are not text; text files that begin like an archive are refused."""

    @property
    def all_suffixes(self) -> tuple[str, ...]:
        """Suffixes of every file that is read if the user names it."""
        return (*self.suffixes, *self.weak_suffixes, *self.named_suffixes)

    def files(self, path: Path) -> tuple[Path, ...]:
        """Return the files that the content of a file is in, itself first."""
        return (path,)

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into spans of about `span_bytes`, in order.

        Args:
            file: the file.
            span_bytes: size of a span.
            fields: the fields that will be read; None for all of them.

        Raises:
            CorpusError: the file cannot be read, or lacks the fields.
        """
        size = file.path.stat().st_size
        if size:
            yield Span(file, 0, size, size)

    def records(self, span: Span, fields: Fields | None) -> Iterator[Record]:
        """Yield the records of a span, in order.

        Args:
            span: from `spans`.
            fields: the fields that will be read, for formats that can skip the others; None for
                all of them.

        Raises:
            CorpusError: the span cannot be read; names the file and the position in it.
        """
        raise NotImplementedError

    def pieces(self, span: Span, fields: Fields) -> Iterator[Piece]:
        """Yield the text of a span, in order.

        Raises:
            CorpusError: the span cannot be read, or a record holds no text where it should.
        """
        for record in self.records(span, fields):
            yield from record_pieces(record, fields)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `CorpusError` that names the file.

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
