"""Encode columns of numbers: one page per window, and coding tables that windows share.

Columns are encoded in pcodec's wrapped format. Coding tables (pcodec's "chunk metadata": bins,
their frequencies and offset bits) take a few hundred bytes and are shared by consecutive windows of
a shard; the page of each window is decoded independently. A page does not contain its number of
values: the caller passes that number, so a damaged or forged page cannot allocate more memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped

from sparselogits.store.bounds import DamageError

Array = NDArray[Any]
Bool = NDArray[np.bool_]

_NAMES = {np.dtype(np.uint32): "u32", np.dtype(np.float32): "f32"}
_LARGEST_CHUNK = 1 << 22  # largest number of values that share a table; pcodec allows 1 << 24
_CLASSIC_WITHOUT_DELTA = b"\0"  # first byte of a table: four bits each for mode and delta encoding
_LEVEL = 8  # pcodec's default; the highest level, 12, saves less than 0.1 %


@dataclass(frozen=True)
class CodedColumn:
    """Column of a shard in encoded form."""

    tables: tuple[tuple[int, bytes], ...]  # pairs of a coding table's first window and the table
    pages: tuple[bytes, ...]  # page of each window


def encode_column(windows: Sequence[Array]) -> CodedColumn:
    """Encode a column, given the values of each window, all uint32 or all float32."""
    tables: list[tuple[int, bytes]] = []
    pages: list[bytes] = []
    for first, stop in _chunks([len(window) for window in windows]):
        table, coded = _encode_chunk(windows[first:stop])
        tables.append((first, table))
        pages += coded
    return CodedColumn(tuple(tables), tuple(pages))


class ColumnDecoder:
    """Decoder of the pages of one column, given its coding tables (see `CodedColumn`).

    Raises:
        DamageError: pcodec cannot read the tables, or `encode_column` cannot have written them.
    """

    def __init__(self, dtype: Any, tables: Sequence[tuple[int, bytes]]) -> None:
        self._firsts = [first for first, _ in tables]
        if self._firsts[:1] != [0] or self._firsts != sorted(set(self._firsts)):
            raise DamageError(
                f"coding tables start at windows {self._firsts}, expected ascending from 0"
            )
        self.dtype = np.dtype(dtype)
        name = _NAMES[self.dtype]
        for _, table in tables:
            if table[:1] not in (b"", _CLASSIC_WITHOUT_DELTA):
                # pcodec would allocate the size in a forged dictionary, and abort if it cannot
                raise DamageError(
                    f"a coding table begins with the byte {table[0]:#04x}, expected "
                    f"{_CLASSIC_WITHOUT_DELTA[0]:#04x} (classic mode without delta encoding)"
                )
        try:
            file, _ = wrapped.FileDecompressor.new(_HEADER)
            self._chunks = [file.chunk_decompressor(t, name)[0] if t else None for _, t in tables]
        except (RuntimeError, TypeError, ValueError) as error:
            raise DamageError(f"a coding table is unreadable: {error}") from error

    def decode_into(self, out: Array, window: int, data: bytes) -> int:
        """Decode a window's page at the beginning of `data` into `out`; return its size in bytes.

        Raises:
            DamageError: the page does not decode to `len(out)` values.
        """
        if len(out) == 0:
            return 0
        chunk = self._chunks[bisect_right(self._firsts, window) - 1]
        if chunk is None:
            raise DamageError(f"a coding table is empty, expected one for {len(out)} values")
        try:
            progress, used = chunk.read_page_into(data, len(out), out)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DamageError(f"a page does not decode: {error}") from error
        if not progress.finished or progress.n_processed != len(out):
            raise DamageError(f"a page has {progress.n_processed} values, expected {len(out)}")
        return int(used)


class BlockPages:
    """Reader of the columns in the blocks of consecutive windows, in order.

    Methods raise DamageError if a block is damaged.
    """

    def __init__(
        self, columns: Mapping[str, ColumnDecoder], first: int, blocks: Sequence[bytes]
    ) -> None:
        self._columns, self._first = columns, first
        self._blocks, self._at = blocks, [4] * len(blocks)

    def listed(self) -> NDArray[np.int64]:
        """Return each block's number of lists, which is the first word of the block, int64 [W]."""
        shortest = min(map(len, self._blocks))
        if shortest < 4:
            raise DamageError(f"a block of {shortest} bytes is shorter than a block's header")
        return np.array([int.from_bytes(block[:4], "little") for block in self._blocks])

    def read(self, column: str, lengths: Array) -> Array:
        """Return the next `lengths[w]` numbers of a column for each window w, concatenated."""
        stops = np.cumsum(lengths).tolist()
        out = np.empty(stops[-1], self._columns[column].dtype)
        self.fill(column, out, [0, *stops[:-1]], stops)
        return out

    def fill(self, column: str, out: Array, starts: Sequence[int], stops: Sequence[int]) -> None:
        """Read the next numbers of a column into `out[starts[w]:stops[w]]` for each window w."""
        decoder, at, blocks = self._columns[column], self._at, self._blocks
        for w, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            if stop > start:
                rest = blocks[w][at[w] :]
                at[w] += decoder.decode_into(out[start:stop], self._first + w, rest)

    def require_end(self) -> None:
        """Validate that all bytes have been read."""
        for block, at in zip(self._blocks, self._at, strict=True):
            if at != len(block):
                raise DamageError(f"a block has {len(block)} bytes, expected {at}")


def _chunks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges of windows that share a table, given the windows' numbers of values."""
    runs, first, values = [], 0, 0
    for index, length in enumerate(lengths):
        if values and values + length > _LARGEST_CHUNK:
            runs.append((first, index))
            first, values = index, 0
        values += length
    return [*runs, (first, len(lengths))]


def _encode_chunk(windows: Sequence[Array]) -> tuple[bytes, list[bytes]]:
    """Encode windows that share a coding table; return the table and their pages."""
    sizes = [len(window) for window in windows if len(window)]
    if not sizes:
        return b"", [b""] * len(windows)
    config = ChunkConfig(
        compression_level=_LEVEL,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.exact_page_sizes(sizes),
    )
    chunk = wrapped.FileCompressor().chunk_compressor(np.concatenate(windows), config)
    pages = iter(range(len(sizes)))
    return chunk.write_meta(), [
        chunk.write_page(next(pages)) if len(window) else b"" for window in windows
    ]


_HEADER = wrapped.FileCompressor().write_header()
