"""Validate a row group: its pages before Parquet's parser reads them, its values afterwards.

Parquet encodes a gigabyte of zeros in a few bytes: by a dictionary, run lengths, deltas,
compression, or a header that merely claims it. A shard uses none of these but zstd for its tokens,
whose number is known. So a page of any other form is refused, and the size that a page may decode
to is bounded by its bytes and by the window length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparselogits.samplers.sampler import ROUNDING
from sparselogits.store.bounds import LARGEST_LOSS, DamageError
from sparselogits.store.records import Bool, Int32
from sparselogits.store.shard.writer import SCHEMA
from sparselogits.thrift import CompactReader

_PLAIN, _RLE, _BYTE_STREAM_SPLIT = 0, 3, 9
_DATA_PAGE = 0
_TOKENS = SCHEMA.get_field_index("tokens")
_STARTS = SCHEMA.get_field_index("document_starts")
_MASK = SCHEMA.get_field_index("mask")
# of a page header and of the data page header in it
_TYPE, _UNCOMPRESSED, _COMPRESSED, _DATA_PAGE_HEADER = 1, 2, 3, 5
_VALUES, _ENCODING, _DEFINITIONS, _REPETITIONS = 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class Rows:
    """The windows of a row group, with coded targets.

    Args:
        window_index: int64 [R].
        tokens: int32 [R, L].
        document_starts: R arrays int32.
        masks: R arrays bool [L], or None.
        blocks: R coded targets.
        crc32c: R checksums.
        teacher_loss: R values.
        teacher_entropy: R values.
    """

    window_index: list[int]
    tokens: Int32
    document_starts: list[Int32]
    masks: list[Bool | None]
    blocks: list[bytes]
    crc32c: list[int]
    teacher_loss: list[float]
    teacher_entropy: list[float]

    def __len__(self) -> int:
        return len(self.window_index)


def require_pages(group: pq.RowGroupMetaData, first: int, data: bytes, length: int) -> None:
    """Validate the page headers of a row group: one plain data page per column, of bounded size.

    Args:
        group: the row group as the footer describes it.
        first: byte of the file at which the row group begins.
        data: bytes of the row group.
        length: window length, L.

    Raises:
        DamageError: names the column and what is wrong.
        ThriftError: a header cannot be read.
    """
    rows = group.num_rows
    at = 4 if first == 0 else 0  # after the magic number, one column follows the other
    if group.num_columns != len(SCHEMA):
        raise DamageError(f"{group.num_columns} column chunks, expected {len(SCHEMA)}")
    for number, name in enumerate(SCHEMA.names):
        chunk = group.column(number)
        size, offset = chunk.total_compressed_size, chunk.data_page_offset - first
        # chunk.compression is not read: it aborts the process if the codec does not exist; the
        # sizes below bound what any compression can decode to
        if chunk.has_dictionary_page:
            raise DamageError(f"column {name} has a dictionary, which no writer gives it")
        if offset != at or not 0 <= size <= len(data) - offset:
            raise DamageError(
                f"column {name} has bytes {offset} to {offset + size} of its row group, where "
                f"byte {at} is next and {len(data)} are there"
            )
        at += size
        reader = CompactReader(data, offset)
        header = reader.structure()
        page = header.get(_DATA_PAGE_HEADER, {})
        encoding = _BYTE_STREAM_SPLIT if number == _TOKENS else _PLAIN
        form = (header.get(_TYPE), *(page.get(f) for f in (_ENCODING, _DEFINITIONS, _REPETITIONS)))
        if form != (_DATA_PAGE, encoding, _RLE, _RLE):
            raise DamageError(f"column {name} has a page of another kind or encoding: {form}")
        values, packed, plain = (
            page.get(_VALUES),
            header.get(_COMPRESSED),
            header.get(_UNCOMPRESSED),
        )
        if values is None or packed is None or plain is None:
            raise DamageError(f"column {name} has a page without sizes")
        if reader.at - offset + packed != size or values != chunk.num_values:
            raise DamageError(f"column {name} is not one page of {chunk.num_values} values")
        least, most = _values_bounds(number, rows, length)
        if not least <= values <= most:
            raise DamageError(f"column {name} has {values} values, expected {least} to {most}")
        # tokens: four bytes each, and two levels of at most a bit each, coded in groups of eight
        allowed = 5 * values + 64 if number == _TOKENS else packed
        if not 0 <= plain <= allowed or (number != _TOKENS and plain != packed):
            raise DamageError(
                f"column {name} claims to decompress to {plain} bytes, expected {allowed} at most"
            )
    if at != len(data):
        raise DamageError(f"{len(data) - at} bytes of it belong to no column")


def _values_bounds(column: int, rows: int, length: int) -> tuple[int, int]:
    """Return the bounds of the number of values of a column; a row without a list has one."""
    if column == _TOKENS:
        return rows * length, rows * length
    return (rows, rows * max(1, length)) if column in (_STARTS, _MASK) else (rows, rows)


def rows_of(table: pa.Table, start: int, length: int, vocab_size: int) -> Rows:
    """Return the rows of a row group, with every value but the targets validated.

    Args:
        table: one row group, as Parquet's reader returns it.
        start: number of its first window.
        length: window length, L.
        vocab_size: V.

    Raises:
        DamageError: names the window and what is wrong.
    """
    columns: dict[str, Any] = {name: _only_chunk(table, name) for name in SCHEMA.names}
    rows = table.num_rows
    index: NDArray[np.int64] = columns["window_index"].to_numpy()
    tokens, token_bounds = _lists(columns["tokens"])
    starts, start_bounds = _lists(columns["document_starts"])
    expected = np.arange(start, start + rows)
    _require(index == expected, start, "holds another window's number")
    lengths = np.diff(token_bounds)
    _require(lengths == length, start, f"does not hold {length} tokens")
    tokens = tokens[token_bounds[0] : token_bounds[-1]].reshape(rows, length)
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        sound = ((tokens >= 0) & (tokens < vocab_size)).all(1)
        _require(sound, start, f"holds a token outside the vocabulary of {vocab_size} ids")
    _require_starts(starts, start_bounds, start, length)
    loss, entropy = (columns[n].to_numpy() for n in ("teacher_loss", "teacher_entropy"))
    # NaN compares false
    _require((loss >= -ROUNDING) & (loss <= LARGEST_LOSS), start, "has an impossible teacher_loss")
    most = np.log(vocab_size) + 0.01
    _require((entropy >= -ROUNDING) & (entropy <= most), start, "has an impossible teacher_entropy")
    return Rows(
        index.tolist(),
        tokens,
        [starts[a:b] for a, b in _pairs(start_bounds)],
        _masks(columns["mask"], start, length),
        columns["targets"].to_pylist(),
        columns["crc32c"].to_pylist(),
        loss.tolist(),
        entropy.tolist(),
    )


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    if column.num_chunks != 1 or (name != "mask" and column.null_count):
        raise DamageError(f"column {name} has missing values")
    return column.chunk(0)


def _lists(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return the values and the bounds of a column of lists."""
    if column.values.null_count:
        raise DamageError("a list has missing values")
    return column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()


def _pairs(bounds: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    return pairwise(bounds.tolist())


def _masks(column: pa.ListArray, start: int, length: int) -> list[Bool | None]:
    values, bounds = _lists(column)
    if column.null_count == len(column):
        return [None] * len(column)
    there = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = np.diff(bounds)
    _require(~there | (lengths == length), start, f"has a mask of another length than {length}")
    return [
        values[a:b] if valid else None
        for (a, b), valid in zip(_pairs(bounds), there.tolist(), strict=True)
    ]


def _require_starts(
    starts: NDArray[Any], bounds: NDArray[np.int32], start: int, length: int
) -> None:
    """Validate that document starts ascend strictly within [0, L), row by row."""
    first, last = int(bounds[0]), int(bounds[-1])
    inner = starts[first:last]
    if not len(inner):
        return
    ascends = np.empty(len(inner), np.bool_)
    ascends[0] = True
    np.greater(inner[1:], inner[:-1], out=ascends[1:])
    begins = bounds[:-1][np.diff(bounds) > 0] - first
    ascends[begins] = True
    ascends &= (inner >= 0) & (inner < length)
    if not bool(ascends.all()):
        place = int(np.flatnonzero(~ascends)[0]) + first
        row = int(np.searchsorted(bounds, place, side="right")) - 1
        raise DamageError(
            f"window {start + row} has document starts that do not ascend within its {length} "
            f"tokens: {starts[place]}"
        )


def _require(sound: Any, start: int, what: str) -> None:
    if not bool(sound.all()):
        raise DamageError(f"window {start + int(np.flatnonzero(~sound)[0])} {what}")
