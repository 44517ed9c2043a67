"""Read and write token streams on disk: a folder of Parquet parts, one row per token.

A stream is the concatenation of its parts. A window is a range of the stream and may span several
parts. Parts are therefore written independently of one another, in any order, by any number of
processes, and windows need no second pass over the tokens. Parts are compressed by zstd in row
groups of `GROUP_TOKENS` tokens; reading a random window usually decodes one or two row groups.

Columns: `token` int32; `document_start` bool; `learnt` bool (whether the token carries a target),
absent in text without a loss mask. The footer contains the part's `Counts` as JSON, and the
frequency of each id. A part is written completely or not at all (`sparselogits.files`), so a part
that exists is complete.

Packed text is distributed with a cache, so a part may be an untrusted file. The sizes claimed by
its footer and page headers are validated before Parquet's reader allocates them.
"""

from __future__ import annotations

import base64
import os
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparselogits.errors import CorpusError
from sparselogits.files import writing_whole
from sparselogits.identity import canonical_json
from sparselogits.thrift import CompactReader
from sparselogits.untrusted import open_regular, parse_json

GROUP_TOKENS = 1 << 14
"""Maximum number of tokens per row group."""

_CACHED_GROUPS = 8
_MOST_HEADERS = 1 << 14  # bytes by which headers may enlarge a compressed column
_LARGEST_FREQUENCIES = 1 << 22  # bytes: more than 262 144 ids of 12 bytes in base64
_MOST_PAGES = 64
_PLAIN, _DICTIONARY = 0, (2, 8)  # numbers of Parquet's encodings
_DICTIONARY_PAGE = 2  # number of the type of page
_CLOSING = struct.Struct("<I4s")
_COUNTS_KEY, _FREQUENCIES_KEY = "sparselogits.counts", "sparselogits.frequencies"


@dataclass
class Counts:
    """Numbers of documents, characters and tokens in one part of a stream, or in several."""

    documents: int = 0
    """Number of documents that begin in these parts; a row of token ids counts as one document."""
    blank_documents: int = 0
    """Number of documents that are not packed because they contain no text to train on."""
    characters: int = 0
    """Number of characters in the text."""
    tokens: int = 0
    """Number of tokens, including separators, beginning-of-text tokens and padding."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, astuple(self), astuple(other)))


class Tokens(NamedTuple):
    """N consecutive tokens of a stream."""

    ids: NDArray[np.int32]
    """Token ids, int32 [N]."""
    starts: NDArray[np.bool_]
    """Whether each token is the first of a document or of padding, bool [N]."""
    learnt: NDArray[np.bool_] | None
    """Whether each token carries a target, bool [N]; None in text without a loss mask."""

    def cut(self, start: int, stop: int | None = None) -> Tokens:
        """Return the tokens [start, stop), or all from `start` on, as views of these arrays."""
        learnt = None if self.learnt is None else self.learnt[start:stop]
        return Tokens(self.ids[start:stop], self.starts[start:stop], learnt)

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Concatenate tokens into new arrays; an empty sequence gives zero tokens."""
        if not parts:
            return cls(np.empty(0, np.int32), np.empty(0, np.bool_), None)
        ids, starts, learnt = zip(*parts, strict=True)
        flags = None if learnt[0] is None else np.concatenate(learnt)
        return cls(np.concatenate(ids), np.concatenate(starts), flags)


def part_name(number: int) -> str:
    """Return the file name of part `number`, of eight digits, so that names sort by number."""
    return f"part-{number:08d}.parquet"


def is_part_name(name: str) -> bool:
    """Return whether a file name is the name of a part."""
    return re.fullmatch(r"part-\d{8}\.parquet", name) is not None


@contextmanager
def writing_parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet file for writing; it appears if the block ends without an exception.

    An existing file is not replaced.
    """
    with writing_whole(path, replace=False) as handle:
        writer = pq.ParquetWriter(
            handle,
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        )
        try:
            yield writer
            writer.close()
        finally:
            with suppress(Exception):  # already closed, unless the block failed
                writer.close()


@contextmanager
def writing_part(path: Path, vocab_size: int, *, masked: bool) -> Iterator[PartWriter]:
    """Open a part for writing; the file appears if the block ends without an exception.

    Ids must be smaller than `vocab_size`, and `masked` states whether some tokens carry no target.
    """
    names = [("token", pa.int32()), ("document_start", pa.bool_())]
    schema = pa.schema([*names, ("learnt", pa.bool_())] if masked else names)
    with writing_parquet(path, schema) as file:
        writer = PartWriter(file, schema, vocab_size)
        yield writer
        writer.finish()


class PartWriter:
    """Writer of one part of a stream, which writes row groups as soon as they are complete."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema, vocab_size: int) -> None:
        self.counts = Counts()
        self._file, self._schema = file, schema
        self._frequencies = np.zeros(vocab_size, np.int64)
        self._parts: list[Tokens] = []
        self._length = 0
        self._begins = False

    def begin_document(self) -> None:
        """Count a document, and mark the next appended token as its first one."""
        self.counts.documents += 1
        self._begins = True

    def append(
        self,
        ids: NDArray[np.int64],
        *,
        learnt: NDArray[np.bool_] | bool,
        starts: NDArray[np.bool_] | None = None,
    ) -> None:
        """Append tokens.

        Args:
            ids: token ids, int64 [N].
            learnt: whether each token (bool [N]), or every token, carries a target; ignored in a
                part without a loss mask.
            starts: whether each token is the first of a document or of padding, bool [N], besides
                the one that `begin_document` marks; None if no other is.

        Raises:
            CorpusError: an id is not smaller than the vocabulary size.
        """
        if not len(ids):
            return
        vocab_size = len(self._frequencies)
        if ids.max() >= vocab_size:
            raise CorpusError(
                f"the tokenizer returned the id {ids.max()}, but the teacher's vocabulary has "
                f"{vocab_size} ids: the tokenizer does not belong to this teacher. Use the "
                "tokenizer that was published with the teacher."
            )
        starts = np.zeros(len(ids), np.bool_) if starts is None else starts.copy()
        starts[0], self._begins = starts[0] or self._begins, False
        flags = np.full(len(ids), learnt) if "learnt" in self._schema.names else None
        self._parts.append(Tokens(ids.astype(np.int32), starts, flags))
        self._length += len(ids)
        if self._length >= GROUP_TOKENS:
            self._flush(self._length // GROUP_TOKENS * GROUP_TOKENS)

    def _flush(self, length: int) -> None:
        tokens = Tokens.cat(self._parts)
        self._frequencies += np.bincount(tokens.ids[:length], minlength=len(self._frequencies))
        columns = [column for column in tokens.cut(0, length) if column is not None]
        table = pa.Table.from_arrays([pa.array(c) for c in columns], schema=self._schema)
        self._file.write_table(table, row_group_size=GROUP_TOKENS)
        # a copy, since a view would reference the memory of the whole block
        self._parts = [Tokens.cat([tokens.cut(length)])]
        self._length -= length
        self.counts.tokens += length

    def finish(self) -> None:
        """Write the remaining tokens, the counts and the frequencies."""
        if self._length:
            self._flush(self._length)
        packed = pa.compress(self._frequencies.astype("<i8").tobytes(), codec="zstd", asbytes=True)
        self._file.add_key_value_metadata(
            {
                _COUNTS_KEY: canonical_json(asdict(self.counts)).decode(),
                _FREQUENCIES_KEY: base64.b64encode(packed).decode(),
            }
        )


def read_footer(path: Path, vocab_size: int) -> tuple[Counts, NDArray[np.int64]]:
    """Return the counts of a part, and the frequency of each of the V ids in it, int64 [V].

    Raises:
        CorpusError: the part is missing or damaged.
    """
    try:
        metadata = open_part(path, 1 << 31, extra=12 * vocab_size).metadata.metadata
        counts = Counts(**parse_json(metadata[_COUNTS_KEY.encode()]))
        packed = base64.b64decode(metadata[_FREQUENCIES_KEY.encode()])
        raw = pa.decompress(packed, 8 * vocab_size, codec="zstd", asbytes=True)
        return counts, np.frombuffer(raw, "<i8").astype(np.int64)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error


class TokenStream:
    """Stream of the tokens in a folder of parts, with random access; threads may share it.

    `lengths` contains the number of tokens in each part.
    """

    def __init__(self, folder: Path, lengths: Sequence[int]) -> None:
        self._folder, self._bounds = folder, running_sums(lengths)
        self._groups: OrderedDict[tuple[int, int], Tokens] = OrderedDict()
        self._file: tuple[int, pq.ParquetFile] | None = None
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Number of tokens in the stream."""
        return int(self._bounds[-1])

    def begin(self, part: int) -> int:
        """Return the position in the stream at which a part begins."""
        return int(self._bounds[part])

    def part_at(self, position: int) -> int:
        """Return the number of the part that contains the token at a position of the stream."""
        return int(np.searchsorted(self._bounds, position, side="right")) - 1

    def path(self, part: int) -> Path:
        """Return the path of a part."""
        return self._folder / part_name(part)

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the range [start, stop); see `SelectedStream.ranges`."""
        yield start, stop

    def read(self, start: int, stop: int) -> Tokens:
        """Return the tokens [start, stop) of the stream.

        Raises:
            CorpusError: a part is missing or damaged.
        """
        ranges = []
        with self._lock:
            while start < stop:
                part = self.part_at(start)
                group, first = divmod(start - self.begin(part), GROUP_TOKENS)
                found = self._group(part, group).cut(first, first + stop - start)
                ranges.append(found)
                start += len(found.ids)
        return Tokens.cat(ranges)

    def _group(self, part: int, group: int) -> Tokens:
        key = (part, group)
        if key not in self._groups:
            self._groups[key] = self._decode(part, group)
            if len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _decode(self, part: int, group: int) -> Tokens:
        path, expected = self.path(part), self.begin(part + 1) - self.begin(part)
        try:
            if self._file is None or self._file[0] != part:
                groups = -(-expected // GROUP_TOKENS)
                self._file = part, open_part(path, groups, extra=_LARGEST_FREQUENCIES)
            table = read_group(path, self._file[1], group)
            columns = {name: table.column(name).to_numpy() for name in table.column_names}
            tokens = Tokens(columns["token"], columns["document_start"], columns.get("learnt"))
            dtypes = [str(column.dtype) for column in tokens if column is not None]
            usual = ["int32", "bool", "bool"][: len(dtypes)]
            if dtypes != usual:
                raise PartError(f"its columns are {', '.join(dtypes)}, expected {', '.join(usual)}")
        except (
            OSError,
            pa.ArrowException,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:
            raise damaged(path, error) from error
        wanted = min(GROUP_TOKENS, expected - group * GROUP_TOKENS)
        if len(tokens.ids) != wanted:
            found = f"row group {group} has {len(tokens.ids)} tokens, expected {wanted}"
            raise damaged(path, found)
        return tokens


def running_sums(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0, followed by the running sums of N lengths, int64 [N + 1]."""
    return np.append(0, np.cumsum(np.array(lengths, np.int64)))


def damaged(path: Path, error: Any) -> CorpusError:
    """Return the error for a damaged file two levels below the folder of a packed corpus."""
    return CorpusError(
        f"{path} is damaged ({error}), so packed windows cannot be read. Delete the packed corpus "
        f"({path.parents[1]}) and pack it again from its text."
    )


class PartError(ValueError):
    """Raised if a file is not a part of a packed corpus, or claims sizes that no part can have."""


def open_part(
    path: Path, groups: int, extra: int = 0, *, with_schema: bool = False
) -> pq.ParquetFile:
    """Open a part, unless its footer is too large for `groups` row groups.

    `extra` is the number of bytes by which key-value metadata may enlarge the footer, and
    `with_schema` states whether the footer may contain an Arrow schema.

    Raises:
        PartError: the file is not Parquet, or its footer is too large or has an Arrow schema.
        OSError: the file cannot be read, or is not a regular file.
        pyarrow.ArrowException: the footer is damaged.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        # a row group has more than 64 bytes, and an index may claim any number of groups
        groups = min(groups, size // 64)
        closing = os.pread(descriptor, _CLOSING.size, max(0, size - _CLOSING.size))
        if len(closing) < _CLOSING.size:
            raise PartError(f"a file of {size} bytes is too short for Parquet")
        footer, magic = _CLOSING.unpack(closing)
        allowed = (1 << 16) + (1 << 12) * groups + extra
        if magic != b"PAR1" or footer > min(size, allowed):
            raise PartError(
                f"its footer claims {footer:,} bytes and ends with {magic!r}, expected at most "
                f"{allowed:,} and b'PAR1'"
            )
        tail = os.pread(descriptor, footer, size - footer - _CLOSING.size)
        if b"ARROW:" in tail and not with_schema:
            raise PartError("its footer contains an Arrow schema, expected none")
    finally:
        os.close(descriptor)
    return pq.ParquetFile(
        path, page_checksum_verification=True, thrift_container_size_limit=max(64, groups)
    )


def read_group(
    path: Path,
    file: pq.ParquetFile,
    group: int,
    rows: int = GROUP_TOKENS,
    *,
    with_dictionaries: bool = False,
) -> pa.Table:
    """Read a row group, after validating the sizes that its pages claim.

    Args:
        path: path of the file.
        file: the opened file; see `open_part`.
        group: index of the row group.
        rows: maximum number of rows in the row group.
        with_dictionaries: whether columns may be encoded by dictionaries.

    Raises:
        PartError: the row group claims more than `rows` rows of eight columns of eight bytes.
        OSError: the file cannot be read.
        pyarrow.ArrowException: the row group is damaged.
    """
    metadata = file.metadata.row_group(group)
    if not 0 <= metadata.num_rows <= rows or metadata.num_columns > 8:
        raise PartError(
            f"row group {group} has {metadata.num_rows} rows of {metadata.num_columns} columns, "
            f"expected at most {rows} of 8"
        )
    most = _largest_column(rows) * (1 + with_dictionaries) + _MOST_HEADERS
    descriptor = open_regular(path)
    try:
        for number in range(metadata.num_columns):
            chunk = metadata.column(number)
            size, start = chunk.total_compressed_size, chunk.data_page_offset
            dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
            allowed = dictionary is None or (with_dictionaries and 0 < dictionary < start)
            if not allowed or not 0 <= size <= most:
                raise PartError(
                    f"column {number} has {size} bytes (dictionary: {dictionary is not None}), "
                    f"expected at most {most} (dictionary: {with_dictionaries})"
                )
            start = start if dictionary is None else dictionary
            try:
                _require_plausible_pages(os.pread(descriptor, size, start), rows, with_dictionaries)
            except (AttributeError, TypeError) as error:  # a field has another type
                raise PartError(f"column {number} has an invalid page header ({error})") from error
    finally:
        os.close(descriptor)
    return file.read_row_group(group)


def _largest_column(rows: int) -> int:
    """Return the maximum size in bytes of a column, whose values have at most eight bytes."""
    return 8 * rows + 1024


def _require_plausible_pages(data: bytes, rows: int, with_dictionaries: bool) -> None:
    """Validate the sizes and encodings that the pages of a column claim; `data` are its bytes."""
    largest, at, values = _largest_column(rows), 0, 0
    most = _MOST_PAGES + rows // 1024
    for _ in range(most):
        reader = CompactReader(data, at)
        header = reader.structure()
        claimed, packed = header.get(2, -1), header.get(3, -1)
        is_dictionary = with_dictionaries and header.get(1) == _DICTIONARY_PAGE
        page = header.get(7 if is_dictionary else 5, {})
        values += 0 if is_dictionary else page.get(1, 0)
        # other encodings than these claim further sizes within their data
        encodings = (_PLAIN, *_DICTIONARY) if with_dictionaries else (_PLAIN,)
        if (
            page.get(2) not in encodings
            or not 0 <= claimed <= largest
            or not 0 <= packed <= largest + _MOST_HEADERS
            or max(values, page.get(1, 0)) > rows
        ):
            raise PartError(
                f"a page claims {claimed} bytes ({packed} compressed) and {values} values in "
                f"encoding {page.get(2)}, expected at most {largest} bytes "
                f"({largest + _MOST_HEADERS} compressed) and {rows} values in encoding {_PLAIN}"
            )
        at = reader.at + packed
        if at >= len(data):
            return
    raise PartError(f"a column has too many pages, expected at most {most}")
