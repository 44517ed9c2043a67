"""Select the windows that are held out for evaluation, and read training and held-out tokens.

All documents are packed into one stream of tokens. The hold-out is selected after all lengths are
known: the requested share is rounded to whole windows, such that at least one is held out and at
least one is not. There are two rules:

- *documents*: hold out whole documents, in the order of their keys (a salted hash of the first
  bytes), until they fill the requested windows. Held-out tokens beyond these windows are dropped.
- *windows*: if the documents are too few or too long for that, hold out the last windows of the
  text, after a gap of one window (no gap in texts of fewer than ten windows, or if it would leave
  no window for training). One document may have tokens on both sides.

No token is written twice: training and held-out tokens are selections of the stream. The tables in
`holdout/` contain the length of each document.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.streams import (
    Tokens,
    TokenStream,
    damaged,
    open_part,
    part_name,
    read_group,
    running_sums,
    writing_parquet,
)
from sparselogits.untrusted import shown

HoldoutRule = Literal["documents", "windows"]
"""Name of a rule that selects the hold-out; see the module's docstring."""

Extents = NDArray[np.int64]
"""Token ranges [start, stop) within one part, int64 [N, 2], ascending and disjoint."""

_SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),
        ("tokens", pa.int64()),
        ("characters", pa.int64()),
        ("opens", pa.bool_()),
    ]
)
_ROWS = 1 << 14  # number of rows per row group of a table
_BIN_BITS = 16
_CACHED_PARTS = 4
_WINDOWS_FOR_A_GAP = 10  # shorter texts have no gap before the hold-out
_DROPPED_SHARE = 0.02  # the rule "documents" may drop this share of the tokens, or one window


class DocumentTable:
    """Writer of a part's document table: key, number of tokens and of characters per document.

    A document that spans several parts has a row in the table of each; `opens` is true only in the
    first.
    """

    def __init__(self, file: pq.ParquetWriter) -> None:
        self._file = file
        self._rows: list[list[int]] = []

    def add(self, piece: Piece, tokens: int) -> None:
        """Add a piece, which has the given number of tokens, to the row of its document.

        The pieces of a document must be consecutive.
        """
        if piece.opens or not self._rows:
            if len(self._rows) >= _ROWS:
                self.flush()
            self._rows.append([piece.key, 0, 0, piece.opens])
        self._rows[-1][1] += tokens
        self._rows[-1][2] += piece.stop - piece.start

    def extend(self, tokens: int) -> None:
        """Add a number of tokens to the row of the last document."""
        self._rows[-1][1] += tokens

    def flush(self) -> None:
        """Write the buffered rows to the file."""
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)]
            table = pa.Table.from_arrays(arrays, schema=_SCHEMA)
            self._file.write_table(table, row_group_size=_ROWS)
            self._rows = []


@contextmanager
def writing_table(path: Path) -> Iterator[DocumentTable]:
    """Open a document table for writing; it appears if the block ends without an exception."""
    with writing_parquet(path, _SCHEMA) as file:
        table = DocumentTable(file)
        yield table
        table.flush()


@dataclass(frozen=True)
class Split:
    """Division of a stream into training tokens and held-out tokens by a rule of this module."""

    rule: HoldoutRule
    windows: int  # number of held-out windows
    # with the rule "documents":
    up_to: int = 0  # largest key of a held-out document
    held: tuple[int, ...] = ()  # number of held-out tokens in each part
    # with the rule "windows":
    training_windows: int = 0  # number of training windows, which are the first ones
    first: int = 0  # index of the first held-out window

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as written to index.json."""
        common = {"rule": self.rule, "windows": self.windows}
        if self.rule == "documents":
            return {**common, "up_to": f"{self.up_to:016x}", "held": list(self.held)}
        return {**common, "training_windows": self.training_windows, "first": self.first}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Split:
        """Return the split for a JSON object from `to_json`.

        Raises:
            KeyError, TypeError, ValueError: a value is missing, invalid or out of range.
        """
        windows = int(value["windows"])
        if value["rule"] == "documents":
            up_to, held = int(value["up_to"], 16), tuple(int(n) for n in value["held"])
            split, sound = cls("documents", windows, up_to, held), up_to < 1 << 64
        elif value["rule"] == "windows":
            training, first = int(value["training_windows"]), int(value["first"])
            split, sound = cls("windows", windows, 0, (), training, first), training <= first
        else:
            raise ValueError("the rule of the hold-out is neither documents nor windows")
        if not sound or min(windows, split.up_to, split.training_windows, *split.held) < 0:
            raise ValueError("a number in the hold-out is out of range")
        return split


def choose_split(
    tables: Path, lengths: Sequence[int], window_length: int, share: float
) -> Split | None:
    """Select a share, in (0, 1), of the tokens in a stream for the hold-out.

    `tables` is the folder of the document tables, one per part, and `lengths` contains the number
    of tokens in each part. The result is None if the text has fewer than two windows.

    Raises:
        CorpusError: a table is damaged.
    """
    total = sum(lengths)
    available = total // window_length
    if available < 2:
        return None
    wanted = min(max(round(share * total / window_length), 1), available - 1)
    up_to = _largest_key(tables, lengths, wanted * window_length)
    held = tuple(_total(_held(tables, part, length, up_to)) for part, length in enumerate(lengths))
    surplus = sum(held) - wanted * window_length
    affordable = max(window_length, int(_DROPPED_SHARE * total))
    if surplus <= affordable and total - sum(held) >= window_length:
        return Split("documents", wanted, up_to=up_to, held=held)
    gap = int(available >= _WINDOWS_FOR_A_GAP and wanted < available - 1)
    first = available - wanted
    return Split("windows", wanted, training_windows=first - gap, first=first)


class SelectedStream:
    """Stream of the tokens that `extents` selects in each part of a stream; threads may share it.

    `extents` is a function from the number of a part to the ranges selected in it, and `lengths`
    contains the number of selected tokens in each part.
    """

    def __init__(
        self, stream: TokenStream, lengths: Sequence[int], extents: Callable[[int], Extents]
    ) -> None:
        self._stream, self._compute_extents = stream, extents
        self._bounds = running_sums(lengths)
        self._extents: dict[int, Extents] = {}
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Number of selected tokens."""
        return int(self._bounds[-1])

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the whole stream that contain the selected tokens [start, stop).

        Raises:
            CorpusError: a document table is damaged.
        """
        while start < stop:
            part = int(np.searchsorted(self._bounds, start, side="right")) - 1
            within_part = start - int(self._bounds[part])
            extents = self._extents_of(part)
            bounds = running_sums(extents[:, 1] - extents[:, 0])
            at = int(np.searchsorted(bounds, within_part, side="right")) - 1
            begin = int(extents[at, 0]) + within_part - int(bounds[at])
            length = min(int(extents[at, 1]) - begin, stop - start)
            begin += self._stream.begin(part)
            yield begin, begin + length
            start += length

    def read(self, start: int, stop: int) -> Tokens:
        """Return the selected tokens [start, stop).

        Raises:
            CorpusError: a part or its document table is damaged.
        """
        return Tokens.cat([self._stream.read(*own) for own in self.ranges(start, stop)])

    def _extents_of(self, part: int) -> Extents:
        """Return the ranges of selected tokens in a part; the results computed last are cached."""
        with self._lock:
            if part not in self._extents:
                extents = self._compute_extents(part)
                expected = self._bounds[part + 1] - self._bounds[part]
                if _total(extents) != expected:
                    raise damaged(
                        self._stream.path(part), f"{_total(extents)} of {expected} tokens selected"
                    )
                if len(self._extents) >= _CACHED_PARTS:
                    self._extents.pop(next(iter(self._extents)))
                self._extents[part] = extents
            return self._extents[part]


def divide(
    stream: TokenStream, lengths: Sequence[int], tables: Path, split: Split, window_length: int
) -> tuple[SelectedStream, SelectedStream]:
    """Divide a stream into its training tokens and its held-out tokens by the given split.

    The other arguments are those of `choose_split`.

    Raises:
        ValueError: the split has another number of parts than the stream.
    """
    if split.rule == "documents":
        if len(split.held) != len(lengths):
            raise ValueError(
                f"the split has {len(split.held)} parts, but the stream has {len(lengths)}"
            )
        rest = [length - held for length, held in zip(lengths, split.held, strict=True)]

        def held(part: int) -> Extents:
            return _held(tables, part, lengths[part], split.up_to)

        def trained(part: int) -> Extents:
            extents, length = held(part), lengths[part]
            edges = np.stack([np.append(0, extents[:, 1]), np.append(extents[:, 0], length)], 1)
            return edges[edges[:, 0] < edges[:, 1]]

        return SelectedStream(stream, rest, trained), SelectedStream(stream, split.held, held)
    before = (0, split.training_windows * window_length)
    after = (split.first * window_length, stream.tokens)
    sides = []
    for side in (before, after):
        choose = partial(_within, stream, lengths, side)
        selected = [_total(choose(part)) for part in range(len(lengths))]
        sides.append(SelectedStream(stream, selected, choose))
    return sides[0], sides[1]


def document_counts(
    tables: Path, lengths: Sequence[int], split: Split, window_length: int
) -> tuple[int, int]:
    """Return the number of held-out documents and the number of their characters.

    With the rule "windows", documents, and the characters of rows in a document table, count as
    held out if they begin at or after the first held-out token. The arguments are those of
    `choose_split` and `divide`.

    Raises:
        CorpusError: a table is damaged.
    """
    documents = characters = begin = 0
    for part, length in enumerate(lengths):
        for key, tokens, chars, opens in _rows(tables, part, length):
            starts = begin + np.cumsum(tokens) - tokens
            begin += int(tokens.sum())
            if split.rule == "documents":
                chosen = key <= np.uint64(split.up_to)
            else:
                chosen = starts >= split.first * window_length
            documents += int((opens & chosen).sum())
            characters += int(chars[chosen].sum())
    return documents, characters


def _largest_key(tables: Path, lengths: Sequence[int], tokens: int) -> int:
    """Return the smallest key such that the documents up to it have at least `tokens` tokens.

    The first of two passes over the tables counts tokens by the leading bits of the key, so that
    the second needs to collect only the keys with the leading bits of the result.
    """
    shift = np.uint64(64 - _BIN_BITS)
    by_bin = np.zeros(1 << _BIN_BITS, np.int64)
    for part, length in enumerate(lengths):
        for key, count, _, _ in _rows(tables, part, length):
            np.add.at(by_bin, (key >> shift).astype(np.int64), count)
    ends = np.cumsum(by_bin)
    chosen = int(np.searchsorted(ends, tokens))
    keys, counts = [], []
    for part, length in enumerate(lengths):
        for key, count, _, _ in _rows(tables, part, length):
            inside = (key >> shift).astype(np.int64) == chosen
            # copies of a document have equal keys
            distinct, inverse = np.unique(key[inside], return_inverse=True)
            keys.append(distinct)
            counts.append(np.bincount(inverse, count[inside], len(distinct)).astype(np.int64))
    key, count = np.concatenate(keys), np.concatenate(counts)
    order = np.argsort(key, kind="stable")
    reached = ends[chosen] - by_bin[chosen] + np.cumsum(count[order])
    return int(key[order][int(np.searchsorted(reached, tokens))])


def _held(tables: Path, part: int, length: int, up_to: int) -> Extents:
    """Return the ranges of a part's tokens that belong to documents with keys up to `up_to`."""
    found, begin = [np.empty((0, 2), np.int64)], 0
    for key, tokens, _, _ in _rows(tables, part, length):
        stops = begin + np.cumsum(tokens)
        begin = int(stops[-1])
        chosen = (key <= np.uint64(up_to)) & (tokens > 0)
        found.append(np.stack([(stops - tokens)[chosen], stops[chosen]], 1))
    return np.concatenate(found)


def _within(
    stream: TokenStream, lengths: Sequence[int], tokens: tuple[int, int], part: int
) -> Extents:
    begin = stream.begin(part)
    start, stop = max(tokens[0] - begin, 0), min(tokens[1] - begin, lengths[part])
    return np.array([[start, stop]] if start < stop else [], np.int64).reshape(-1, 2)


def _total(extents: Extents) -> int:
    return int((extents[:, 1] - extents[:, 0]).sum())


def _rows(tables: Path, part: int, length: int) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield the columns (key, tokens, characters, opens) of a part's document table in batches.

    At the end, validate that the documents have as many tokens as the part, `length`.
    """
    path, found = tables / part_name(part), 0
    try:
        with open_part(path, 1 << 31) as file:
            if not file.schema_arrow.equals(_SCHEMA):
                has, expected = (
                    shown({field.name: str(field.type) for field in schema})
                    for schema in (file.schema_arrow, _SCHEMA)
                )
                raise damaged(path, f"it has the columns {has}, expected {expected}")
            for group in range(file.num_row_groups):
                table = read_group(path, file, group, _ROWS)
                columns = tuple(column.to_numpy() for column in table.columns)
                if not len(columns[1]):
                    continue
                if columns[1].min() < 0:
                    raise damaged(path, "a document has a negative number of tokens")
                found += int(columns[1].sum())
                yield columns
    except (OSError, pa.ArrowException, ValueError) as error:
        raise damaged(path, error) from error
    if found != length:
        raise damaged(path, f"its documents have {found} tokens, the part has {length}")
