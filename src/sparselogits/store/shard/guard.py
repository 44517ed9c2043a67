"""Protect a shard with a guard: checksums of all its bytes, verified before parsing.

Parquet's page checksums do not cover the footer and the page headers, and a parser that reads a
damaged header may allocate gigabytes. A table of CRC32C values is therefore stored between the last
page and the footer, a gap that Parquet readers skip:

    range...   n times: u64 first byte, u64 length, u32 CRC32C; one range per row group, which
               together cover the file from its first byte to the guard
    tail       u32 n, u32 CRC32C of the footer (with its length and the closing magic),
               u32 CRC32C of the preceding bytes of the guard, 8 bytes magic "SLGUARD1"

All numbers are little-endian. A reader locates the guard from the end of the file: last 8 bytes,
footer length, tail, ranges.
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
"""Largest allowed size in bytes of a footer, the guard's tail and the last 8 bytes of the file."""

_FIRST_READ = 1 << 16  # bytes, enough for guard and footer of most shards


@dataclass(frozen=True)
class Guard:
    """Validated guard of a shard."""

    ranges: tuple[tuple[int, int, int], ...]  # (first byte, length, CRC32C) of each row group
    footer_start: int  # offset in bytes of the Parquet footer

    def require(self, group: int, data: bytes) -> None:
        """Validate the length and checksum of a row group's bytes.

        Raises:
            DamageError: the length or the checksum is wrong.
        """
        first, length, expected = self.ranges[group]
        if len(data) != length:
            raise DamageError(f"found {len(data)} bytes from byte {first} on, expected {length}")
        found = google_crc32c.value(data)
        if found != expected:
            raise DamageError(
                f"bytes {first} to {first + length} have CRC32C {found:08x}, "
                f"expected {expected:08x}"
            )


def insert_guard(parquet: bytes, group_stops: Sequence[int]) -> bytes:
    """Return a Parquet file with a guard inserted before its footer.

    `group_stops` contains the offset of the byte after each row group.
    """
    footer_length, _ = _CLOSING.unpack_from(parquet, len(parquet) - _CLOSING.size)
    start = len(parquet) - _CLOSING.size - footer_length
    stops = [*group_stops[:-1], start]
    guard, first = b"", 0
    for stop in stops:
        guard += _RANGE.pack(first, stop - first, google_crc32c.value(parquet[first:stop]))
        first = stop
    guard += struct.pack("<II", len(stops), google_crc32c.value(parquet[start:]))
    guard += struct.pack("<I8s", google_crc32c.value(guard), MAGIC)
    return parquet[:start] + guard + parquet[start:]


def read_frame(files: ReadableFiles, name: str) -> tuple[int, Guard, bytes]:
    """Read a shard's size, its guard, and its last bytes, which include guard and footer.

    Raises:
        DamageError: the guard or the footer is damaged.
        FileNotFoundError: the file does not exist.
    """
    wanted = _FIRST_READ
    while True:
        size, tail = files.tail(name, wanted)
        guard = _read_guard(tail, size)
        if isinstance(guard, Guard):
            return size, guard, tail
        wanted = guard


def _read_guard(tail: bytes, size: int) -> Guard | int:
    """Return the validated guard in the last bytes of a file, or the number of bytes required."""
    if size < _CLOSING.size + _TAIL.size or len(tail) < _CLOSING.size:
        raise DamageError(f"the file is truncated: it has {size} bytes, too few for a shard")
    footer_length, magic = _CLOSING.unpack_from(tail, len(tail) - _CLOSING.size)
    if magic != b"PAR1":
        raise DamageError(f"the file is truncated: it ends with {magic!r}, expected b'PAR1'")
    framed = int(footer_length) + _CLOSING.size + _TAIL.size
    if framed > (most := min(size, LARGEST_FOOTER)):
        raise DamageError(f"the footer claims {footer_length} bytes, expected fewer than {most}")
    if len(tail) < framed:
        return framed
    count, footer_crc, guard_crc, magic = _TAIL.unpack_from(tail, len(tail) - framed)
    if magic != MAGIC:
        raise DamageError(f"found {magic!r} before the footer, expected a guard with {MAGIC!r}")
    whole = framed + int(count) * _RANGE.size
    if whole > size:
        raise DamageError(f"the guard claims {count} row groups, too many for {size} bytes")
    if len(tail) < whole:
        return whole
    footer_start = len(tail) - framed + _TAIL.size
    guard_start = len(tail) - whole
    guard, footer = tail[guard_start : footer_start - 12], tail[footer_start:]
    for name, part, crc in (("guard", guard, guard_crc), ("footer", footer, footer_crc)):
        found = google_crc32c.value(part)
        if found != crc:
            raise DamageError(f"the {name} has CRC32C {found:08x}, expected {crc:08x}")
    ranges = tuple(_RANGE.iter_unpack(tail[guard_start : guard_start + count * _RANGE.size]))
    covered = 0
    for start, length, _ in ranges:
        if start != covered:
            raise DamageError(f"the guard does not cover bytes {covered} to {start} exactly once")
        covered += length
    if covered != size - whole:
        raise DamageError(
            f"the guard covers {covered} bytes, expected the {size - whole} bytes before it"
        )
    return Guard(ranges, size - framed + _TAIL.size)
