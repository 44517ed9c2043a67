"""Token streams on disk: a folder of Parquet parts, one row a token, windows cut on reading.

A stream is the concatenation of its parts. A window is a range of the stream, whichever parts it
lies in: so parts are made independently of one another, in any order, by any number of processes,
and windows need no second pass over the tokens. Parts are compressed by zstd in row groups of
`GROUP_TOKENS` tokens; reading a random window decodes one or two of them.

Columns: `token` int32; `document_start` bool; `learnt` bool, only where some tokens are not to be
learnt. The footer holds what the part counted, as JSON, and how often each id occurs. A part is
written whole (`sparselogits.files`): a part that exists is complete.
"""

from __future__ import annotations

import base64
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparselogits.corpus.parts import PartError, open_part, require_modest_group
from sparselogits.errors import CorpusError
from sparselogits.files import writing_whole
from sparselogits.identity import canonical_json
from sparselogits.untrusted import parse_json

GROUP_TOKENS = 1 << 14
_GROUPS_KEPT = 8
_LARGEST_FREQUENCIES = 1 << 22  # bytes: 262 144 ids of 12 bytes in base64, and then some
_COUNTS_KEY, _FREQUENCIES_KEY = "sparselogits.counts", "sparselogits.frequencies"


@dataclass
class Counts:
    """What a part of a stream, or several, holds."""

    documents: int = 0
    """Documents that begin in it."""
    blank_documents: int = 0
    """Documents left out because they hold no text."""
    characters: int = 0
    tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Counts(**sums)


class Tokens(NamedTuple):
    """A range of a stream."""

    ids: NDArray[np.int32]
    starts: NDArray[np.bool_]
    """Whether a token is the first of a document."""
    learnt: NDArray[np.bool_] | None


def part_name(number: int) -> str:
    """File name of a part; parts sort by name."""
    return f"part-{number:08d}.parquet"


def is_part_name(name: str) -> bool:
    """Return whether a file name is that of a part."""
    return re.fullmatch(r"part-\d{8}\.parquet", name) is not None


class PartFile:
    """Writes a Parquet file under a temporary name, and renames it once it is whole."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema

    def open(self) -> None:
        """Begin the temporary file."""
        self._file = ExitStack()
        handle = self._file.enter_context(writing_whole(self._path, replace=False))
        self._writer = pq.ParquetWriter(
            handle,
            self._schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        )

    def write(self, table: pa.Table, row_group_size: int) -> None:
        """Append rows."""
        self._writer.write_table(table, row_group_size=row_group_size)

    def describe(self, metadata: dict[str, str]) -> None:
        """Add key-values to the footer."""
        self._writer.add_key_value_metadata(metadata)

    def close(self, finish: Callable[[], None] | None) -> None:
        """Run `finish` and commit the file, or remove it where `finish` is None or fails."""
        with suppress(_AbandonedError), self._file:
            try:
                if finish is None:
                    raise _AbandonedError
                finish()
                self._writer.close()
            finally:
                with suppress(Exception):  # already closed, unless what went wrong came before
                    self._writer.close()


class _AbandonedError(Exception):
    """A file is not to be committed."""


class PartWriter:
    """Writes one part of a stream in memory that does not grow with it.

    Used as a context: leaving it in order commits the part, leaving it by an exception removes
    what was written.
    """

    def __init__(self, path: Path, vocab_size: int, *, masked: bool) -> None:
        self.counts = Counts()
        self._masked = masked
        self._frequencies = np.zeros(vocab_size, np.int64)
        names = [("token", pa.int32()), ("document_start", pa.bool_())]
        self._schema = pa.schema([*names, ("learnt", pa.bool_())] if masked else names)
        self._file = PartFile(path, self._schema)
        self._parts: list[Tokens] = []
        self._waiting = 0
        self._begins = False

    def __enter__(self) -> PartWriter:
        self._file.open()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._file.close(self._finish if failure is None else None)

    def begin_document(self) -> None:
        """The next token, whenever it comes, is the first of a document."""
        self.counts.documents += 1
        self._begins = True

    def append(self, ids: NDArray[np.int64], *, learnt: NDArray[np.bool_] | bool) -> None:
        """Add tokens of one document.

        Raises:
            CorpusError: for an id outside the vocabulary.
        """
        if not len(ids):
            return
        vocab_size = len(self._frequencies)
        if ids.max() >= vocab_size:
            raise CorpusError(
                f"the tokenizer made the id {ids.max()}, but the teacher's vocabulary has "
                f"{vocab_size} ids: the tokenizer does not belong to this teacher. Use the "
                "tokenizer that was published with it."
            )
        starts = np.zeros(len(ids), np.bool_)
        starts[0], self._begins = self._begins, False
        flags = np.full(len(ids), learnt) if self._masked else None
        self._parts.append(Tokens(ids.astype(np.int32), starts, flags))
        self._waiting += len(ids)
        if self._waiting >= GROUP_TOKENS:
            self._flush(self._waiting // GROUP_TOKENS * GROUP_TOKENS)

    def _flush(self, length: int) -> None:
        tokens = concatenate(self._parts)
        self._frequencies += np.bincount(tokens.ids[:length], minlength=len(self._frequencies))
        columns = [column[:length] for column in tokens if column is not None]
        table = pa.Table.from_arrays([pa.array(c) for c in columns], schema=self._schema)
        self._file.write(table, GROUP_TOKENS)
        # copies, since a view would keep the whole block alive
        rest = (None if column is None else column[length:].copy() for column in tokens)
        self._parts = [Tokens(*rest)]  # type: ignore[arg-type]
        self._waiting -= length
        self.counts.tokens += length

    def _finish(self) -> None:
        if self._waiting:
            self._flush(self._waiting)
        packed = pa.compress(self._frequencies.astype("<i8").tobytes(), codec="zstd", asbytes=True)
        self._file.describe(
            {
                _COUNTS_KEY: canonical_json(asdict(self.counts)).decode(),
                _FREQUENCIES_KEY: base64.b64encode(packed).decode(),
            }
        )


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Ranges of a stream, one after another; an empty sequence is an empty range."""
    if not parts:
        return Tokens(np.empty(0, np.int32), np.empty(0, np.bool_), None)
    ids, starts, learnt = zip(*parts, strict=True)
    flags = None if learnt[0] is None else np.concatenate(learnt)
    return Tokens(np.concatenate(ids), np.concatenate(starts), flags)


def read_footer(path: Path, vocab_size: int) -> tuple[Counts, NDArray[np.int64]]:
    """What a part counted, and how often each id occurs in it, int64 [V].

    Raises:
        CorpusError: for a damaged part.
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
    """Random access to a stream of tokens; safe to share between threads.

    Args:
        folder: of its parts.
        lengths: tokens of each part, in order.
    """

    def __init__(self, folder: Path, lengths: Sequence[int]) -> None:
        self._folder = folder
        self._ends = np.cumsum(np.array(lengths, np.int64))
        self._groups: OrderedDict[tuple[int, int], Tokens] = OrderedDict()
        self._file: tuple[int, pq.ParquetFile] | None = None
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Length of the stream."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def begin(self, part: int) -> int:
        """Return the number of the first token of a part."""
        return int(self._ends[part - 1]) if part else 0

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        return self._folder / part_name(part)

    def read(self, start: int, stop: int) -> Tokens:
        """Return the tokens [start, stop) of the stream.

        Raises:
            CorpusError: for a damaged part.
        """
        ranges = []
        with self._lock:
            while start < stop:
                part = int(np.searchsorted(self._ends, start, side="right"))
                begins = int(self._ends[part - 1]) if part else 0
                group, first = divmod(start - begins, GROUP_TOKENS)
                tokens = self._group(part, group)
                last = min(len(tokens.ids), first + stop - start)
                ranges.append(
                    Tokens(*(None if c is None else c[first:last] for c in tokens))  # type: ignore[arg-type]
                )
                start += last - first
        return concatenate(ranges)

    def _group(self, part: int, group: int) -> Tokens:
        key = (part, group)
        if key not in self._groups:
            self._groups[key] = self._decode(part, group)
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _decode(self, part: int, group: int) -> Tokens:
        path = self._folder / part_name(part)
        expected = self._ends[part] - (self._ends[part - 1] if part else 0)
        try:
            if self._file is None or self._file[0] != part:
                groups = int(-(-expected // GROUP_TOKENS))
                self._file = part, open_part(path, groups, extra=_LARGEST_FREQUENCIES)
            require_modest_group(path, self._file[1], group, GROUP_TOKENS)
            table = self._file[1].read_row_group(group)
            columns = {name: table.column(name).to_numpy() for name in table.column_names}
            tokens = Tokens(columns["token"], columns["document_start"], columns.get("learnt"))
            if tokens.ids.dtype != np.int32 or tokens.starts.dtype != np.bool_:
                raise PartError(f"its tokens are {tokens.ids.dtype}, expected int32")
        except (OSError, pa.ArrowException, KeyError, ValueError, IndexError) as error:
            raise damaged(path, error) from error
        if len(tokens.ids) != min(GROUP_TOKENS, expected - group * GROUP_TOKENS):
            raise damaged(path, f"row group {group} holds {len(tokens.ids)} tokens")
        return tokens


def damaged(path: Path, error: Any) -> CorpusError:
    """Return the error for a file of a packed corpus that cannot be read."""
    return CorpusError(
        f"{path} is damaged ({error}): packed windows are lost with it. Delete the packed corpus "
        f"({path.parents[1]}) and pack it again from its text."
    )
