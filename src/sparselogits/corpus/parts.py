"""Opening a Parquet file of a packed corpus, which may be a stranger's, in bounded memory.

Packed text travels with a cache. What a part's footer and page headers claim is compared with the
file's size and with the form that parts have before Parquet's reader allocates it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pyarrow.parquet as pq

from sparselogits.thrift import CompactReader
from sparselogits.untrusted import open_regular

_MOST_PAGES = 64
_PLAIN = 0
_CLOSING = struct.Struct("<I4s")


class PartError(ValueError):
    """A file that is no part of a packed corpus, or claims more than one has."""


def open_part(path: Path, groups: int, extra: int = 0) -> pq.ParquetFile:
    """Open a part after its footer's size has been checked.

    Args:
        path: the file.
        groups: row groups it may have.
        extra: bytes its key-values may have.

    Raises:
        PartError: it is not Parquet, or its footer is larger than a part's.
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        groups = min(groups, size // 64)  # each takes more than that; an index may claim any number
        closing = os.pread(descriptor, _CLOSING.size, max(0, size - _CLOSING.size))
        if len(closing) < _CLOSING.size:
            raise PartError(f"a file of {size} bytes is too short for Parquet")
        footer, magic = _CLOSING.unpack(closing)
        allowed = (1 << 16) + (1 << 12) * groups + extra
        if magic != b"PAR1" or footer > min(size, allowed):
            raise PartError(f"its footer claims {footer:,} bytes, expected {allowed:,} at most")
        tail = os.pread(descriptor, footer, size - footer - _CLOSING.size)
        if b"ARROW:" in tail:
            raise PartError("its footer carries a schema of Arrow's, which no part does")
    finally:
        os.close(descriptor)
    return pq.ParquetFile(
        path, page_checksum_verification=True, thrift_container_size_limit=max(64, groups)
    )


def require_modest_group(path: Path, file: pq.ParquetFile, group: int, rows: int) -> None:
    """Check what the pages of a row group claim.

    Args:
        path: of the file.
        file: opened by `open_part`.
        group: number of the row group.
        rows: rows it may have, of at most eight bytes per column.

    Raises:
        PartError: it has more rows, columns or pages, or its pages claim more bytes.
        ThriftError: a page header cannot be read.
    """
    about = file.metadata.row_group(group)
    if about.num_rows > rows or about.num_columns > 8:
        raise PartError(f"row group {group} has {about.num_rows} rows, expected {rows} at most")
    allowed = 8 * rows + 1024
    descriptor = open_regular(path)
    try:
        for number in range(about.num_columns):
            chunk = about.column(number)
            size, start = chunk.total_compressed_size, chunk.data_page_offset
            if chunk.has_dictionary_page or not 0 <= size <= allowed + (1 << 14):
                raise PartError(f"column {number} of row group {group} claims {size} bytes")
            _require_modest_pages(os.pread(descriptor, size, start), rows, allowed)
    finally:
        os.close(descriptor)


def _require_modest_pages(data: bytes, rows: int, allowed: int) -> None:
    at = values = 0
    for _ in range(_MOST_PAGES):
        reader = CompactReader(data, at)
        header = reader.structure()
        claimed, packed = header.get(2), header.get(3)
        page = header.get(5, {})
        values += page.get(1, 0)
        if (
            page.get(2) != _PLAIN  # others claim in their own headers how much they hold
            or not isinstance(claimed, int)
            or not isinstance(packed, int)
            or not 0 <= claimed <= allowed
            or not 0 <= packed <= allowed + (1 << 14)
            or values > rows
        ):
            raise PartError(
                f"a page claims {claimed} bytes and {values} values in encoding {page.get(2)}"
            )
        at = reader.at + packed
        if at >= len(data):
            return
    raise PartError(f"a column has more than {_MOST_PAGES} pages")
