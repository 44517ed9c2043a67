"""Parse the part of Thrift's compact protocol that Parquet's headers use, in bounded memory.

A Parquet reader allocates the sizes that a page header or a footer claims: a page of sixty bytes
may claim two gigabytes, and the header of a list, of a few bytes, may claim a million column
chunks. This parser returns the claimed sizes without allocating them, so that they can be validated
before a Parquet reader parses the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BOOLEANS = (1, 2)
BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
_INTEGERS = (I16, I32, I64)
_DEEPEST = 16  # Parquet's structures are nested up to five levels deep


class ThriftError(ValueError):
    """Raised if bytes are not a valid structure, or contain more values or levels than allowed."""


class CompactReader:
    """Reader of structures in Thrift's compact protocol; raises ThriftError for invalid bytes.

    Args:
        data: encoded bytes.
        at: byte offset of the first structure; advanced by each read.
        most: maximum number of values to read.
    """

    def __init__(self, data: bytes, at: int = 0, most: int = 256) -> None:
        self.data, self.at, self._left = data, at, most

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of the structure at the current offset, by field number.

        Integers (those of one byte without a sign), booleans and structures (as dicts) are returned
        as values, strings as their lengths in bytes, lists and sets as (type of the elements,
        number of elements), maps as their numbers of entries, and floats as 0. `depth` is the
        number of enclosing structures.
        """
        fields: dict[int, Any] = {}
        for number, kind in self.fields(depth):
            if kind == STRUCT:
                fields[number] = self.structure(depth + 1)
            elif kind in (LIST, SET):
                fields[number] = element, count = self.list_header()
                self._skip_elements(element, count, depth)
            else:
                fields[number] = self._scalar(kind, depth)
        return fields

    def skip(self, kind: int, depth: int = 0) -> None:
        """Skip a value of the given type at the current offset, inside `depth` structures."""
        if kind == STRUCT:
            for _, inner in self.fields(depth):
                self.skip(inner, depth + 1)
        elif kind in (LIST, SET):
            self._skip_elements(*self.list_header(), depth)
        else:
            self._scalar(kind, depth)

    def list_header(self) -> tuple[int, int]:
        """Return the type of the elements and the length of the list at the current offset."""
        header = self._byte()
        count = header >> 4
        return header & 15, self._varint() if count == 15 else count

    def fields(self, depth: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (number, type) of each field of the structure at the current offset.

        The caller must read or skip each value. `depth` is the number of enclosing structures.
        """
        if depth > _DEEPEST:
            raise ThriftError(f"structures are nested deeper than {_DEEPEST} levels")
        number = 0
        while True:
            header = self._byte()
            if header == 0:
                return
            self._count(1)
            step, kind = header >> 4, header & 15
            number = number + step if step else _signed(self._varint())
            yield number, kind

    def _skip_elements(self, kind: int, count: int, depth: int) -> None:
        """Skip the elements of a list."""
        self._count(count)
        if kind in BOOLEANS or kind == BYTE:
            self._advance(count)
            return
        for _ in range(count):
            self.skip(kind, depth + 1)

    def _scalar(self, kind: int, depth: int) -> int | bool:
        """Return an integer, a boolean, the length of a string or map, or 0 for a float."""
        if kind in _INTEGERS:
            return _signed(self._varint())
        if kind in BOOLEANS:
            return kind == 1
        if kind == BINARY:
            length = self._varint()
            self._advance(length)
            return length
        if kind == BYTE:
            return self._byte()
        if kind == DOUBLE:
            self._advance(8)
            return 0
        if kind == MAP and depth <= _DEEPEST:
            count = self._varint()
            self._count(2 * count)
            if count:
                kinds = self._byte()
                for _ in range(count):
                    self.skip(kinds >> 4, depth + 1)
                    self.skip(kinds & 15, depth + 1)
            return count
        raise ThriftError(f"a value has the unknown type {kind}")

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ThriftError(f"the data end at byte {self.at}, inside a structure")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ThriftError("an integer has more than 64 bits")

    def _advance(self, length: int) -> None:
        if length > len(self.data) - self.at:
            raise ThriftError(
                f"a value has {length} bytes, but only {len(self.data) - self.at} remain"
            )
        self.at += length

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise ThriftError("a structure has more values than allowed")


def _signed(value: int) -> int:
    """Decode a zigzag-encoded integer."""
    return (value >> 1) ^ -(value & 1)
