"""The guard of a shard: checksums of every byte of the file, checked before anything is parsed.

Parquet's page checksums do not cover the footer and the page headers, and a parser that trusts a
damaged header may allocate gigabytes. So a table of CRC32C values lies between the last page and
the footer, where Parquet readers do not look:

    range...   n times: u64 first byte, u64 length, u32 CRC32C; one per row group, together they
               cover the file from its first byte to the guard
    tail       u32 n, u32 CRC32C of the footer (with its length and the closing magic),
               u32 CRC32C of the guard up to here, 8 bytes magic "SLGUARD1"

All little-endian. A guard is found from the end: last 8 bytes, footer length, tail, ranges.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import google_crc32c

from sparselogits.store.bounds import DamageError
from sparselogits.store.storage.interface import ReadableFiles

MAGIC = b"SLGUARD1"
_RANGE = struct.Struct("<QQI")
_TAIL = struct.Struct("<III8s")
_CLOSING = struct.Struct("<I4s")
LARGEST_FOOTER = 1 << 26
_FIRST_READ = 1 << 16  # bytes; holds guard and footer of most shards


@dataclass(frozen=True)
class Guard:
    """The guard of a file, validated.

    Args:
        ranges: (first byte, length, CRC32C) of each row group.
        footer_start: byte at which the Parquet footer begins.
    """

    ranges: tuple[tuple[int, int, int], ...]
    footer_start: int

    def require(self, group: int, data: bytes) -> None:
        """Validate the bytes of a row group. Raises DamageError."""
        first, length, expected = self.ranges[group]
        if len(data) != length:
            raise DamageError(f"{len(data)} of the {length} bytes from byte {first} on are there")
        found = google_crc32c.value(data)
        if found != expected:
            raise DamageError(
                f"bytes {first} to {first + length} have CRC32C {found:08x}, not {expected:08x}"
            )


def insert_guard(parquet: bytes, group_stops: Sequence[int]) -> bytes:
    """Return a Parquet file with a guard before its footer.

    Args:
        parquet: the file without a guard.
        group_stops: the byte after the last page of each row group; the last one begins the footer.
    """
    footer_length, _ = _CLOSING.unpack_from(parquet, len(parquet) - _CLOSING.size)
    start = len(parquet) - _CLOSING.size - footer_length
    stops = [*group_stops[:-1], start] if group_stops else [start]
    guard, first = b"", 0
    for stop in stops:
        guard += _RANGE.pack(first, stop - first, google_crc32c.value(parquet[first:stop]))
        first = stop
    guard += struct.pack("<II", len(stops), google_crc32c.value(parquet[start:]))
    guard += struct.pack("<I8s", google_crc32c.value(guard), MAGIC)
    return parquet[:start] + guard + parquet[start:]


def read_frame(files: ReadableFiles, name: str) -> tuple[int, Guard, bytes]:
    """Read the size of a shard, its guard, and its last bytes from the guard on or before.

    Raises:
        DamageError: names what does not match.
        FileNotFoundError: there is no such file.
    """
    wanted = _FIRST_READ
    while True:
        size, tail = files.tail(name, wanted)
        guard = read_guard(tail, size)
        if isinstance(guard, Guard):
            return size, guard, tail
        wanted = guard


def read_guard(tail: bytes, size: int) -> Guard | int:
    """Read the guard of a file of `size` bytes from its last bytes.

    Returns:
        The guard, validated together with the footer; or, if `tail` is too short to hold both, the
        number of last bytes to pass instead.

    Raises:
        DamageError: names what does not match.
    """
    if size < _CLOSING.size + _TAIL.size or len(tail) < _CLOSING.size:
        raise DamageError(f"a file of {size} bytes is too short to be a shard: it was cut off")
    footer_length, magic = _CLOSING.unpack_from(tail, len(tail) - _CLOSING.size)
    if magic != b"PAR1":
        raise DamageError(f"it ends with {magic!r}, not with Parquet's b'PAR1': it was cut off")
    framed = int(footer_length) + _CLOSING.size + _TAIL.size
    if framed > min(size, LARGEST_FOOTER):
        raise DamageError(f"its footer claims {footer_length} of the file's {size} bytes")
    if len(tail) < framed:
        return framed
    count, footer_crc, guard_crc, magic = _TAIL.unpack_from(tail, len(tail) - framed)
    if magic != MAGIC:
        raise DamageError("there is no guard before its footer")
    whole = framed + int(count) * _RANGE.size
    if whole > size:
        raise DamageError(f"its guard claims {count} row groups in {size} bytes")
    if len(tail) < whole:
        return whole
    footer_start = len(tail) - framed + _TAIL.size
    guard_start = len(tail) - whole
    if google_crc32c.value(tail[guard_start : footer_start - 12]) != guard_crc:
        raise DamageError("its guard fails its own checksum")
    if google_crc32c.value(tail[footer_start:]) != footer_crc:
        raise DamageError("its footer fails its checksum")
    ranges = tuple(_RANGE.iter_unpack(tail[guard_start : guard_start + count * _RANGE.size]))
    _require_cover(ranges, size - whole)
    return Guard(ranges, size - framed + _TAIL.size)


def _require_cover(ranges: Sequence[tuple[int, int, int]], stop: int) -> None:
    first = 0
    for start, length, _ in ranges:
        if start != first:
            raise DamageError(f"its guard does not cover the bytes {first} to {start} exactly once")
        first += length
    if first != stop:
        raise DamageError(f"its guard covers {first} bytes, and {stop} bytes precede it")
