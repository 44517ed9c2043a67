"""Validate a row group's pages before Parquet's parser reads them, and its values afterwards.

Parquet can encode a gigabyte of zeros in a few bytes: by a dictionary, run lengths, deltas,
compression, or a header with a forged size. A shard uses none of these for its values, except zstd
for tokens and inputs, whose numbers are bounded. Pages of any other form are therefore rejected,
and the decoded size of a page is bounded by its encoded size and the window length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from sparselogits.store.shard.writer import COMPRESSED
from sparselogits.thrift import CompactReader

_PLAIN, _RLE, _BYTE_STREAM_SPLIT = 0, 3, 9
_DATA_PAGE = 0
_LISTS = ("tokens", "document_starts", "mask", "inputs")
# thrift field numbers of a page header, and of the data page header in it
_TYPE, _UNCOMPRESSED, _COMPRESSED, _DATA_PAGE_HEADER = 1, 2, 3, 5
_VALUES, _ENCODING, _DEFINITIONS, _REPETITIONS = 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class Rows:
    """The R windows of a row group, with encoded targets; see `WindowRecord`."""

    window_index: list[int]
    tokens: Int32  # [R, L]
    document_starts: list[Int32]
    masks: list[Bool | None]
    blocks: list[bytes]  # encoded targets
    crc32c: list[int]
    teacher_loss: list[float]
    teacher_entropy: list[float]
    hidden: list[Int32]  # inputs at the positions with a target; empty for a causal objective
    rate: list[float]  # rates of corruption; empty for a causal objective

    def __len__(self) -> int:
        return len(self.window_index)


def require_pages(
    group: pq.RowGroupMetaData, schema: pa.Schema, first: int, data: bytes, length: int
) -> None:
    """Validate that each column of a row group is one data page of known encoding and bounded size.

    `data` contains the bytes of the row group, and `first` is the offset of `data` in the file; at
    offset 0, the columns follow the file's magic number. `length` is the number of tokens per
    window.

    Raises:
        DamageError: a page is invalid.
        ThriftError: a page header cannot be parsed.
    """
    rows = group.num_rows
    at = 4 if first == 0 else 0  # columns are contiguous; the first follows the file's magic number
    if group.num_columns != len(schema):
        raise DamageError(f"found {group.num_columns} columns, expected {len(schema)}")
    for number, name in enumerate(schema.names):
        chunk = group.column(number)
        size, offset = chunk.total_compressed_size, chunk.data_page_offset - first
        # chunk.compression must not be read, because pyarrow aborts the process for an unknown
        # codec; the sizes below bound the output of every compression
        if chunk.has_dictionary_page:
            raise DamageError(f"column {name} has a dictionary, which no valid shard has")
        if offset != at or not 0 <= size <= len(data) - offset:
            raise DamageError(
                f"column {name} has bytes {offset} to {offset + size} of its row group, expected "
                f"bytes from {at} to at most {len(data)}"
            )
        at += size
        reader = CompactReader(data, offset)
        header = reader.structure()
        page = header.get(_DATA_PAGE_HEADER, {})
        compressed = name in COMPRESSED
        encoding = _BYTE_STREAM_SPLIT if compressed else _PLAIN
        form = (header.get(_TYPE), *(page.get(f) for f in (_ENCODING, _DEFINITIONS, _REPETITIONS)))
        if form != (expected := (_DATA_PAGE, encoding, _RLE, _RLE)):
            raise DamageError(f"column {name}: page type and encodings {form}, expected {expected}")
        values, packed = page.get(_VALUES), header.get(_COMPRESSED)
        plain = header.get(_UNCOMPRESSED)
        if values is None or packed is None or plain is None:
            raise DamageError(f"column {name} has a page header without all three sizes")
        if reader.at - offset + packed != size or values != chunk.num_values:
            raise DamageError(f"column {name} is not one page of {chunk.num_values} values")
        most = rows * max(1, length) if name in _LISTS else rows  # an empty list counts as a value
        least = most if name == "tokens" else rows
        if not least <= values <= most:
            raise DamageError(f"column {name} has {values} values, expected {least} to {most}")
        # an id has four bytes and two levels of at most one bit, coded in groups of eight
        allowed = 5 * values + 64 if compressed else packed
        if not 0 <= plain <= allowed or (not compressed and plain != packed):
            raise DamageError(
                f"column {name} claims to decompress to {plain} bytes, expected at most {allowed}"
            )
    if at != len(data):
        raise DamageError(f"{len(data) - at} bytes of the row group belong to no column")


def rows_of(table: pa.Table, start: int, length: int, vocab_size: int) -> Rows:
    """Validate the values of a row group except targets and checksums, and return its rows.

    `start` is the index of the first window, and `length` the number of tokens per window.

    Raises:
        DamageError: a value is invalid.
    """
    columns: dict[str, Any] = {name: _only_chunk(table, name) for name in table.column_names}
    rows = table.num_rows
    index: NDArray[np.int64] = columns["window_index"].to_numpy()
    tokens, token_bounds = _lists(columns["tokens"])
    starts, start_bounds = _lists(columns["document_starts"])
    expected = np.arange(start, start + rows)
    _require(index == expected, start, "has the index of another window")
    lengths = np.diff(token_bounds)
    _require(lengths == length, start, f"does not have {length} tokens")
    tokens = tokens[token_bounds[0] : token_bounds[-1]].reshape(rows, length)
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        sound = ((tokens >= 0) & (tokens < vocab_size)).all(1)
        _require(sound, start, f"has a token outside the vocabulary of {vocab_size} ids")
    _require_starts(starts, start_bounds, start, length)
    loss, entropy = (columns[n].to_numpy() for n in ("teacher_loss", "teacher_entropy"))
    # comparisons with NaN are False
    sound = (loss >= -ROUNDING) & (loss <= LARGEST_LOSS)
    _require(sound, start, f"has a teacher_loss outside [0, {LARGEST_LOSS:g}]")
    most = np.log(vocab_size) + 0.01
    sound = (entropy >= -ROUNDING) & (entropy <= most)
    _require(sound, start, f"has a teacher_entropy outside [0, log({vocab_size})]")
    masks = _masks(columns["mask"], start, length)
    hidden, rate = _hidden(columns, masks, start, vocab_size) if "inputs" in columns else ([], [])
    return Rows(
        index.tolist(),
        tokens,
        [starts[a:b] for a, b in pairwise(start_bounds.tolist())],
        masks,
        columns["targets"].to_pylist(),
        columns["crc32c"].to_pylist(),
        loss.tolist(),
        entropy.tolist(),
        hidden,
        rate,
    )


def _hidden(
    columns: Mapping[str, Any], masks: Sequence[Bool | None], start: int, vocab_size: int
) -> tuple[list[Int32], list[float]]:
    """Return each row's inputs at positions with a target, and its rate of corruption."""
    rate = columns["rate"].to_numpy()
    _require((rate > 0) & (rate <= 1), start, "has a rate that is not in (0, 1]")
    _require(np.array([m is not None for m in masks]), start, "has corrupted inputs but no mask")
    values, bounds = _lists(columns["inputs"])
    chosen = np.array([0 if mask is None else int(mask.sum()) for mask in masks])
    _require(np.diff(bounds) == chosen, start, "does not have one input per position with a target")
    inner = values[bounds[0] : bounds[-1]]
    if len(inner) and not 0 <= int(inner.min()) <= int(inner.max()) < vocab_size:
        raise DamageError(
            f"a window from {start} on has an input outside the vocabulary of {vocab_size} ids"
        )
    return [values[a:b] for a, b in pairwise(bounds.tolist())], rate.tolist()


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    """Validate that no value of a column other than `mask` is missing, and return the values."""
    column = table.column(name)
    if column.num_chunks != 1 or (name != "mask" and column.null_count):
        raise DamageError(f"column {name} has missing values, expected none")
    return column.chunk(0)


def _lists(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return the concatenated values of a list column, and the bounds of each list."""
    if column.values.null_count:
        raise DamageError("a list has missing values, expected none")
    return column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()


def _masks(column: pa.ListArray, start: int, length: int) -> list[Bool | None]:
    """Validate the lengths of masks; return the mask of each row, None for a row without one."""
    values, bounds = _lists(column)
    if column.null_count == len(column):
        return [None] * len(column)
    masked = column.is_valid().to_numpy(zero_copy_only=False)
    _require(
        ~masked | (np.diff(bounds) == length), start, f"has a mask whose length is not {length}"
    )
    return [
        values[a:b] if has_mask else None
        for (a, b), has_mask in zip(pairwise(bounds.tolist()), masked.tolist(), strict=True)
    ]


def _require_starts(
    starts: NDArray[Any], bounds: NDArray[np.int32], start: int, length: int
) -> None:
    """Validate that the document starts of each row ascend strictly in [0, L)."""
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
        wrong = int(np.flatnonzero(~ascends)[0]) + first
        row = int(np.searchsorted(bounds, wrong, side="right")) - 1
        raise DamageError(
            f"window {start + row} has the document start {starts[wrong]}, expected ascending "
            f"positions in [0, {length})"
        )


def _require(sound: Any, start: int, what: str) -> None:
    """Raise DamageError for the first window whose element of `sound`, bool [R], is False."""
    if not bool(sound.all()):
        raise DamageError(f"window {start + int(np.flatnonzero(~sound)[0])} {what}")
