"""Columns of small numbers: one array per window, entropy-coded with tables that a shard shares.

The coder is pcodec's wrapped format. Its tables ("chunk metadata": bins, their frequencies, their
offset bits) cost some hundred bytes, shared by the windows of a shard; the page of each window
decodes by itself. A page does not state how many numbers it holds: the caller does, which bounds
what a damaged or forged page can allocate.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped

from sparselogits.store.bounds import DamageError
from sparselogits.store.codec.lists import Array

_NAMES = {np.dtype(np.uint32): "u32", np.dtype(np.float32): "f32"}
_LARGEST_CHUNK = 1 << 22  # numbers that share a table; pcodec allows 1 << 24
_CLASSIC_WITHOUT_DELTA = b"\0"  # mode and delta encoding are the first two times four bits
_LEVEL = 8  # pcodec's default; the highest, 12, saves less than one part in a thousand


@dataclass(frozen=True)
class CodedColumn:
    """An encoded column: tables, each with the first window that it serves, and pages."""

    tables: tuple[tuple[int, bytes], ...]
    pages: tuple[bytes, ...]


def encode_column(windows: Sequence[Array]) -> CodedColumn:
    """Encode one array per window, all uint32 or all float32."""
    tables: list[tuple[int, bytes]] = []
    pages: list[bytes] = []
    for first, stop in _chunks([len(window) for window in windows]):
        table, coded = _encode_chunk(windows[first:stop])
        tables.append((first, table))
        pages += coded
    return CodedColumn(tuple(tables), tuple(pages))


class ColumnDecoder:
    """Decodes the pages of one column.

    Args:
        dtype: uint32 or float32.
        tables: as `encode_column` made them.

    Raises:
        DamageError: tables that pcodec cannot read, or that `encode_column` does not write.
    """

    def __init__(self, dtype: Any, tables: Sequence[tuple[int, bytes]]) -> None:
        self._firsts = [first for first, _ in tables]
        if self._firsts[:1] != [0] or self._firsts != sorted(set(self._firsts)):
            raise DamageError(f"tables start at windows {self._firsts}, not ascending from 0")
        name = _NAMES[np.dtype(dtype)]
        if any(table[:1] not in (b"", _CLASSIC_WITHOUT_DELTA) for _, table in tables):
            # pcodec would allocate as much as a forged dictionary says, and abort where it cannot
            raise DamageError("a coding table is not in classic mode without delta encoding")
        try:
            file, _ = wrapped.FileDecompressor.new(_HEADER)
            self._chunks = [file.chunk_decompressor(t, name)[0] if t else None for _, t in tables]
        except (RuntimeError, TypeError, ValueError) as error:
            raise DamageError(f"a coding table is unreadable: {error}") from error

    def decode_into(self, out: Array, window: int, data: bytes) -> int:
        """Fill `out` from the page at the beginning of `data`; return the size of the page.

        Raises:
            DamageError: the page does not hold that many numbers.
        """
        if len(out) == 0:
            return 0
        chunk = self._chunks[bisect_right(self._firsts, window) - 1]
        if chunk is None:
            raise DamageError("a page holds numbers, but its coding table is empty")
        try:
            progress, used = chunk.read_page_into(data, len(out), out)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DamageError(f"a page does not decode: {error}") from error
        if not progress.finished or progress.n_processed != len(out):
            raise DamageError(f"a page holds {progress.n_processed} of {len(out)} numbers")
        return int(used)


def _chunks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of windows that share a table."""
    runs, first, held = [], 0, 0
    for index, length in enumerate(lengths):
        if held and held + length > _LARGEST_CHUNK:
            runs.append((first, index))
            first, held = index, 0
        held += length
    return [*runs, (first, len(lengths))]


def _encode_chunk(windows: Sequence[Array]) -> tuple[bytes, list[bytes]]:
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
