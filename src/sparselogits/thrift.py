"""Read Thrift's compact protocol, as far as Parquet's headers need it, in bounded memory.

A Parquet reader allocates what a page header or a footer claims: a page of sixty bytes may claim
two gigabytes, a list of two bytes a million column chunks. So the claims of a shard are read here
first, by a parser that allocates nothing for them, and checked before Parquet's reader sees them.
"""

from __future__ import annotations

from typing import Any

BOOLEANS = (1, 2)
BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
_INTEGERS = (I16, I32, I64)
_DEEPEST = 16  # Parquet's own structures are five deep


class ThriftError(ValueError):
    """The bytes are no structure of the compact protocol, or hold more values than allowed."""


class CompactReader:
    """Read structures of Thrift's compact protocol from bytes.

    Args:
        data: encoded bytes.
        at: byte offset of the first structure.
        most: maximum number of values to read; more raise a ThriftError.
    """

    def __init__(self, data: bytes, at: int = 0, most: int = 256) -> None:
        self.data, self.at, self._left = data, at, most

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of the structure at the current offset, by their numbers.

        Integers, booleans and structures are returned as such, strings as their lengths, lists as
        (type of the elements, number of elements); the elements of lists are skipped.

        Raises:
            ThriftError: there is no structure, or it is too large.
        """
        fields: dict[int, Any] = {}
        number = 0
        for number, kind in self._headers(depth):
            if kind == STRUCT:
                fields[number] = self.structure(depth + 1)
            elif kind in (LIST, SET):
                fields[number] = element, count = self.list_header()
                self._skip_elements(element, count, depth)
            else:
                fields[number] = self._scalar(kind, depth)
        return fields

    def fields(self) -> Any:
        """Yield (number, type) of each field; the caller reads or skips the value."""
        return self._headers(0)

    def skip(self, kind: int, depth: int = 0) -> None:
        """Skip a value; raises ThriftError."""
        if kind == STRUCT:
            for _, inner in self._headers(depth):
                self.skip(inner, depth + 1)
        elif kind in (LIST, SET):
            self._skip_elements(*self.list_header(), depth)
        else:
            self._scalar(kind, depth)

    def list_header(self) -> tuple[int, int]:
        """Return the type and the number of a list's elements."""
        header = self._byte()
        count = header >> 4
        return header & 15, self._varint() if count == 15 else count

    def _headers(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ThriftError("structures are nested too deep")
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
        self._count(count)
        if kind in BOOLEANS or kind == BYTE:
            self._advance(count)
            return
        for _ in range(count):
            self.skip(kind, depth + 1)

    def _scalar(self, kind: int, depth: int) -> int | bool:
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
        raise ThriftError(f"a value of unknown type {kind}")

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ThriftError(f"the data end at byte {self.at}, within a structure")
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
                raise ThriftError("an integer is too long")

    def _advance(self, length: int) -> None:
        if length > len(self.data) - self.at:
            raise ThriftError(
                f"a value takes {length} bytes, but only {len(self.data) - self.at} are left"
            )
        self.at += length

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise ThriftError("a structure has more values than it may")


def _signed(value: int) -> int:
    """Undo the zigzag coding."""
    return (value >> 1) ^ -(value & 1)
