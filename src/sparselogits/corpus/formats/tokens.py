"""Read the binary files of token ids of several trainers.

- `.ds` of datatrove, for nanotron: ids in uint16 or uint32. The folder may also contain
  `.ds.metadata` (its first line is `NAME|BYTES` with the bytes per id), `.ds.index` (uint64 ends of
  documents) and `.ds.loss` (one byte per id, 0 for an id that carries no target).
- `.bin` of llm.c and modded-nanogpt: 256 int32, then ids. The first int32 is 20240520 for uint16
  or 20240801 for uint32, the second a version, the third the number of ids. NeMo AutoModel writes
  278895051 first, and the bytes per id as the fourth.
- `.idx` of Megatron-LM: magic, version 1, type of the ids, numbers of sequences and of documents;
  then int32 lengths and int64 first bytes of the sequences in `.bin`, and int64 ends of documents.

The first two are streams of ids. Each file is cut into windows from its beginning, as its trainer
does; an incomplete window at the end is not read. In the third, each sequence is a row
(`token_rows`).

The files are untrusted: the sizes that a file claims are compared with its size before it is read,
and memory is bounded by a window, or by `_BLOCK` ids or sequences in the third.
"""

from __future__ import annotations

import os
import struct
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sparselogits.corpus.formats.format import Format, SourceFile, Span
from sparselogits.corpus.pieces import Piece, blank_piece
from sparselogits.corpus.records import Fields
from sparselogits.corpus.token_rows import TokenReading, require_fitting, token_piece
from sparselogits.errors import CorpusError, SparseLogitsWarning
from sparselogits.untrusted import open_regular
from sparselogits.wording import counted

_Array = NDArray[Any]
_BLOCK = 1 << 20
_LARGEST_METADATA = 1 << 12
_HEADER = struct.Struct("<256i")
_SHARD_KINDS = {(20240520, 1): "<u2", (20240801, 7): "<u4", (20240801, 1): "<u4"}
_SHARD_KINDS_OF_NEMO = {2: "<u2", 4: "<u4"}
_NEMO = 278895051
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_KINDS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class TokenFormat(Format):
    """Base class of token-id formats; a subclass implements `spans` and `pieces`."""

    holds_tokens = True
    binary = True

    def records(self, span: Span, fields: Fields | None) -> NoReturn:
        """Raise a `CorpusError`, because files of token ids have no records."""
        raise CorpusError(
            f"{span.file.name} contains token ids; expected records with named fields. Give other "
            "files"
        )


@dataclass(frozen=True)
class _Layout:
    """Position and type of the ids in a file, and the files that belong to it."""

    kind: str  # NumPy's name for the data type of the ids
    first: int  # offset of the first id, in bytes
    count: int  # number of ids
    ends: Path | None = None  # file with the ends of documents
    learnt: Path | None = None  # file with the loss mask, one byte per id


class _Stream(TokenFormat):
    """Base class of formats with one stream of ids per file; the unit of a span is a window.

    A subclass implements `_layout`.
    """

    def _layout(self, file: SourceFile) -> _Layout:
        """Return the layout of a file after validating its size."""
        raise NotImplementedError

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into spans of consecutive windows."""
        layout, length = self._layout(file), _reading(fields).settled.window_length
        size = np.dtype(layout.kind).itemsize * length
        step, windows = max(span_bytes // size, 1), layout.count // length
        for start in range(0, windows, step):
            stop = min(start + step, windows)
            yield Span(file, start, stop, (stop - start) * size)

    def pieces(self, span: Span, fields: Fields) -> Iterator[Piece]:
        """Yield the windows of a span as pieces, in order."""
        file, reading, layout = span.file, _reading(fields), self._layout(span.file)
        length, size = reading.settled.window_length, np.dtype(layout.kind).itemsize
        with (
            _opened(file.path) as ids,
            _opened(layout.ends) as ends,
            _opened(layout.learnt) as mask,
        ):
            for window in range(span.start, span.stop):
                where = partial("{}, window {}".format, file.name, window)
                begin = window * length
                found = _read(ids, layout.first + begin * size, length, layout.kind, file.name)
                learnt = starts = None
                if mask is not None:
                    learnt = _read(mask, begin, length, "u1", f"{file.name}.loss") != 0
                if ends is not None:
                    starts = _ends_within(ends, begin, begin + length, f"{file.name}.index") - begin
                else:
                    starts = self._starts(found, reading)
                yield token_piece(
                    *(found, where, reading, length * size), learnt=learnt, starts=starts
                )

    def _starts(self, ids: _Array, reading: TokenReading) -> _Array | None:
        """Return the positions after 0 at which documents begin, for a file without `ends`.

        The result is None if the ids do not mark documents.
        """
        return None


class Datatrove(_Stream):
    """Format of datatrove's `.ds` files; nanotron reads windows of its sequence length plus one."""

    name = "datatrove"
    weak_suffixes = (".ds",)

    def files(self, path: Path) -> tuple[Path, ...]:
        """Return the paths of the file and of the files that datatrove wrote next to it."""
        others = (Path(f"{path}.{name}") for name in ("metadata", "index", "loss"))
        return (path, *(other for other in others if other.is_file()))

    def _layout(self, file: SourceFile) -> _Layout:
        size = file.path.stat().st_size
        found = {path.suffix: path for path in self.files(file.path)[1:]}
        ends, learnt = found.get(".index"), found.get(".loss")
        last = _last_end(ends, file.name) if ends is not None else None
        width = _width(found.get(".metadata")) or (size // last if last else None)
        if width not in (2, 4):
            raise CorpusError(
                f"{file.name}: the bytes per id are unknown. Copy {file.name}.metadata or "
                f"{file.name}.index next to it, or write the former: its first line is `NAME|2` "
                "for uint16 or `NAME|4` for uint32"
            )
        count, rest = divmod(size, width)
        if rest or (last is not None and last != count):
            expected = f"{last} ids" if last is not None else "a whole number of ids"
            raise CorpusError(
                f"{file.name} has {size:,} bytes, expected {expected} of {width} bytes, so the "
                "file, its index or its metadata is damaged or of another file; download all again"
            )
        if learnt is not None and learnt.stat().st_size != count:
            raise CorpusError(
                f"{file.name}.loss has {learnt.stat().st_size:,} bytes, expected one per id, "
                f"{count:,}; download it again, or remove it to train on all tokens"
            )
        return _Layout(f"<u{width}", 0, count, ends, learnt)


class TokenShard(_Stream):
    """Format of llm.c and modded-nanogpt, in which a separator begins each document."""

    name = "token-shard"
    weak_suffixes = (".bin",)

    def _layout(self, file: SourceFile) -> _Layout:
        with _opened(file.path) as handle:
            size = os.fstat(handle).st_size
            header = os.pread(handle, _HEADER.size, 0)
        whole = len(header) == _HEADER.size
        magic, version, count, width, *_ = _HEADER.unpack(header) if whole else (None, None, 0, 0)
        kind = _SHARD_KINDS.get((magic, version))
        if (magic, version) == (_NEMO, 1):
            kind = _SHARD_KINDS_OF_NEMO.get(width)
        if kind is None and magic in {_NEMO, *(known for known, _ in _SHARD_KINDS)}:
            raise CorpusError(
                f"{file.name} is a token shard ({magic}) of version {version} whose fourth number "
                f"is {width}; expected version 1 (of 20240801 also 7), and for {_NEMO} 2 or 4 "
                "bytes per id there. Write the file again with a version of its program that does"
            )
        if kind is None:
            advice = (
                "give files that begin with 256 numbers, the first of them 20240520, 20240801 or "
                f"{_NEMO}"
            )
            if file.path.with_suffix(".idx").exists():
                advice = f"it belongs to {file.path.with_suffix('.idx').name}, so give that file"
            raise CorpusError(
                f"{file.name} begins with {magic if whole else header[:4]!r}, so it is not a token "
                f"shard; {advice}"
            )
        expected = _HEADER.size + count * np.dtype(kind).itemsize
        if count < 0 or size != expected:
            raise CorpusError(
                f"{file.name} claims {count:,} ids of version {version}, {expected:,} bytes, but "
                f"has {size:,}, so it is incomplete or damaged; download it again"
            )
        return _Layout(kind, _HEADER.size, count)

    def _starts(self, ids: _Array, reading: TokenReading) -> _Array:
        return np.flatnonzero(ids[1:] == reading.settled.separator_id) + 1


class Megatron(TokenFormat):
    """Format of Megatron-LM's indexed datasets; the unit of a span is a sequence, one per row."""

    name = "megatron"
    weak_suffixes = (".idx",)

    def files(self, path: Path) -> tuple[Path, ...]:
        """Return the paths of the index and of the file with the ids.

        Raises:
            CorpusError: the file with the ids is missing.
        """
        ids = path.with_suffix(".bin")
        if not ids.is_file():
            raise CorpusError(
                f"{path.name} is an index, but the file of its ids, {ids.name}, is missing next to "
                "it; download both"
            )
        return path, ids

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into spans of sequences, and validate the position of every sequence."""
        index, ids = self.files(file.path)
        kind, count = self._open_index(file)
        width, size = np.dtype(kind).itemsize, ids.stat().st_size
        start = held = end = last = 0
        with _opened(index) as handle:
            for first, lengths, begins in _sequences(handle, 0, count, count, file.name):
                stops = begins + lengths.astype(np.int64) * width
                before = np.append(end, stops[:-1])
                wrong = np.flatnonzero((lengths < 0) | (begins != before) | (stops > size))
                if len(wrong):
                    at = int(wrong[0])
                    raise CorpusError(
                        f"{file.name}: sequence {first + at} claims {lengths[at]:,} ids of {width} "
                        f"bytes from byte {begins[at]:,} on, but the sequence before it ends at "
                        f"byte {before[at]:,}, and {ids.name} has {size:,} bytes. Expected "
                        "sequences one after another: the two files do not belong together, one "
                        "is incomplete, or they are of a program with other dtype codes "
                        "(DeepSpeed's); write both again with Megatron-LM's preprocessing"
                    )
                end, last = int(stops[-1]), int(begins[-1])
                for at, length in enumerate(lengths.tolist(), first + 1):
                    held += length * width
                    if held >= span_bytes:
                        yield Span(file, start, at, held)
                        start, held = at, 0
        if end != size:  # Megatron-LM accepts an index that was cut to its first sequences
            found = (
                f"{file.name}: the last sequence ends at byte {end:,}, but {ids.name} has {size:,} "
                "bytes"
            )
            if not last:  # no second sequence confirms the bytes per id
                raise CorpusError(
                    f"{found}, so the two files do not belong together or the index is incomplete; "
                    "download or write both again"
                )
            warnings.warn(
                f"{found}. Only the {counted(count, 'sequence')} of the index are read; if the "
                "index should list all ids, download or write both files again",
                SparseLogitsWarning,
                stacklevel=2,
            )
        if start < count:
            yield Span(file, start, count, held)

    def pieces(self, span: Span, fields: Fields) -> Iterator[Piece]:
        """Yield the sequences of a span as pieces, in order; a long joined sequence in blocks."""
        file, reading = span.file, _reading(fields)
        index, ids = self.files(file.path)
        kind, count = self._open_index(file)
        width = np.dtype(kind).itemsize
        block = _BLOCK if reading.joined else reading.settled.window_length
        with _opened(index) as handle, _opened(ids) as tokens:
            runs = _sequences(handle, span.start, span.stop, count, file.name)
            for first, lengths, begins in runs:
                for at, (length, begin) in enumerate(
                    zip(lengths.tolist(), begins.tolist(), strict=True), first
                ):
                    where = partial("{}, sequence {}".format, file.name, at)
                    if not length:
                        yield blank_piece(0)
                    require_fitting(length, where, reading)
                    for start in range(0, length, block):
                        part = min(block, length - start)
                        found = _read(tokens, begin + start * width, part, kind, ids.name)
                        yield token_piece(
                            *(found, where, reading, part * width),
                            opens=start == 0,
                            closes=start + part == length,
                        )

    def _open_index(self, file: SourceFile) -> tuple[str, int]:
        """Return the type of the ids and the number of sequences, from a validated header."""
        with _opened(file.path) as handle:
            size = os.fstat(handle).st_size
            header = os.pread(handle, _INDEX_HEADER.size, 0)
        if len(header) < _INDEX_HEADER.size or not header.startswith(_INDEX_MAGIC):
            raise CorpusError(
                f"{file.name} is not an index of Megatron-LM: it begins with {header[:9]!r}, "
                f"expected {_INDEX_MAGIC!r}; give the .idx file of an indexed dataset"
            )
        _, version, code, sequences, documents = _INDEX_HEADER.unpack(header)
        if version != 1 or code not in _INDEX_KINDS:
            raise CorpusError(
                f"{file.name} has index version {version} and dtype code {code}; expected index "
                "version 1 and an integer dtype (1: uint8, 2: int8, 3: int16, 4: int32, 5: int64, "
                "8: uint16). Create the index again with Megatron-LM's preprocessing"
            )
        expected = _INDEX_HEADER.size + 12 * sequences + 8 * documents
        if size == expected + sequences and sequences:
            raise CorpusError(
                f"{file.name} is a multimodal dataset, with a mode for each sequence; give a "
                "dataset of text"
            )
        if size != expected:
            raise CorpusError(
                f"{file.name} claims {sequences:,} sequences and {documents:,} documents, "
                f"{expected:,} bytes, but has {size:,}, so it is incomplete or damaged; download "
                "it again"
            )
        return _INDEX_KINDS[code], sequences


def _reading(fields: Fields | None) -> TokenReading:
    assert fields is not None
    assert fields.tokens is not None  # validated by `open_source`
    return fields.tokens


@contextmanager
def _opened(path: Path | None) -> Iterator[Any]:
    """Open a regular file during a block and yield its descriptor; yield None if `path` is None."""
    if path is None:
        yield None
        return
    handle = open_regular(path)
    try:
        yield handle
    finally:
        os.close(handle)


def _read(handle: int, first: int, count: int, kind: str, name: str) -> _Array:
    """Return `count` numbers of type `kind` from byte `first` of a file, as int64."""
    size = count * np.dtype(kind).itemsize
    data = os.pread(handle, size, first)
    while 0 < len(data) < size and (more := os.pread(handle, size - len(data), first + len(data))):
        data += more
    if len(data) != size:
        raise CorpusError(
            f"{name} ends at byte {first + len(data):,}, expected {size:,} bytes from byte "
            f"{first:,} on, so it became shorter while it was read; download it again"
        )
    return np.frombuffer(data, kind).astype(np.int64)


def _sequences(
    handle: int, start: int, stop: int, count: int, name: str
) -> Iterator[tuple[int, _Array, _Array]]:
    """Yield (index of the first sequence, lengths, first bytes) for blocks in [start, stop).

    `count` is the number of all sequences in the index.
    """
    for first in range(start, stop, _BLOCK):
        many = min(_BLOCK, stop - first)
        lengths = _read(handle, _INDEX_HEADER.size + 4 * first, many, "<i4", name)
        begins = _INDEX_HEADER.size + 4 * count + 8 * first
        yield first, lengths, _read(handle, begins, many, "<i8", name)


def _width(path: Path | None) -> int | None:
    """Return the bytes per id in datatrove's metadata; None without metadata or a valid number."""
    if path is None:
        return None
    with path.open("rb") as handle:
        line = handle.read(_LARGEST_METADATA).partition(b"\n")[0].strip()
    _, bar, width = line.rpartition(b"|")
    return int(width) if bar and width.isdigit() and len(width) < 4 else None


def _last_end(path: Path, name: str) -> int:
    """Return the end of the last document in an index, in tokens."""
    with _opened(path) as handle:
        count, rest = divmod(os.fstat(handle).st_size, 8)
        if rest or not count:
            raise CorpusError(
                f"{name}.index has {8 * count + rest} bytes, expected 8 per document; download it "
                "again, or remove it"
            )
        return int(_read(handle, 8 * (count - 1), 1, "<u8", f"{name}.index")[0])


def _ends_within(handle: int, start: int, stop: int, name: str) -> _Array:
    """Return the ends of documents in (start, stop), at which the next documents start."""

    def end_of(document: int) -> int:
        return int(_read(handle, 8 * document, 1, "<u8", name)[0])

    documents = range(os.fstat(handle).st_size // 8)
    first = bisect_right(documents, start, key=end_of)
    last = bisect_left(documents, stop, key=end_of)
    many = min(max(last - first, 0), stop - start)
    found = _read(handle, 8 * first, many, "<u8", name)
    if many != last - first or (np.diff(found) < 0).any():
        raise CorpusError(
            f"{name}: the ends of documents do not ascend at document {first}; download the file "
            "again, or remove it"
        )
    return found
