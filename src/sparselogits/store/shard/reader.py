"""Reading a shard: one row group at a time, and nothing is parsed before it is validated.

This module checks what Parquet does not: every byte is compared with a CRC32C of the guard before
it is parsed (guard.py), the footer with the name and size of the file and with the identity of the
cache, the pages with both (row_group.py), and each row with its CRC32C. Checksums detect damage,
not forgery: sizes in files of unknown origin are bounded before they are allocated (bounds.py).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparselogits.errors import CacheCorruptionError, InvalidArgumentError
from sparselogits.identity import FORMAT_VERSION, Identity
from sparselogits.samplers.sampler import ROUNDING
from sparselogits.store.bounds import (
    FREE_ENTRIES,
    LARGEST_LOSS,
    DamageError,
    description_bound,
    footer_bound,
)
from sparselogits.store.codec.decoder import BlockDecoder
from sparselogits.store.codec.target_codec import TargetCodec
from sparselogits.store.ranges import parse_shard_name
from sparselogits.store.records import WindowRecord
from sparselogits.store.shard.guard import read_frame
from sparselogits.store.shard.row_group import Rows, require_pages, rows_of
from sparselogits.store.shard.writer import METADATA_KEY, ROWS_PER_GROUP, SCHEMA, row_crc
from sparselogits.store.storage.interface import ReadableFiles
from sparselogits.targets import SparseTargets
from sparselogits.thrift import CompactReader
from sparselogits.untrusted import parse_json, shown

_NO_TARGETS = SparseTargets(
    torch.empty(0, dtype=torch.int64),
    torch.empty(0),
    torch.zeros(1, dtype=torch.int64),
    1,
    check=False,
)

_WALKED = 1 << 17
"""Bytes of a footer above which its structures are counted before Parquet parses them: Parquet
allocates some three hundred bytes per byte of an empty column chunk."""

_VALUES_PER_GROUP = 512  # numbers, strings and lists that describe a row group; 200 are usual


class Shard:
    """One open shard file: the footer is validated, rows are read on demand.

    Args:
        storage: files of the cache.
        name: name of the shard, with its folder.
        identity: identity of the cache.

    Raises:
        CacheCorruptionError: the file is damaged, or not a shard of this cache.
    """

    def __init__(self, storage: ReadableFiles, name: str, identity: Identity) -> None:
        self.name = name
        self._storage = storage
        self._identity = identity
        self._file = _HeldRange()
        try:
            self.start, self.stop = parse_shard_name(name)
            self.size, self._guard, self._file.data = read_frame(storage, name)
            self._file.size, self._file.start = self.size, self.size - len(self._file.data)
            self._require_modest_footer()
            self._parquet = pq.ParquetFile(
                pa.PythonFile(self._file, "r"),
                pre_buffer=False,
                thrift_container_size_limit=max(64, len(self._guard.ranges)),
            )
            self.metadata: pq.FileMetaData = self._parquet.metadata
            self.description = self._read_description()
            codec = TargetCodec.of(identity)
            tables = _tables_from_json(self.description["tables"])
            self._decoder = BlockDecoder(codec, tables)
        except _FAILURES as error:
            raise self._damaged(f"footer ({_windows_named(name)})", error) from error
        self._held: tuple[int, Rows] | None = None
        self._ahead: dict[int, WindowRecord] = {}
        self._next = 0

    def __len__(self) -> int:
        return int(self.stop - self.start)

    @property
    def text_bytes(self) -> int:
        """Bytes of the file that hold the tokens of the text.

        Raises:
            CacheCorruptionError: the footer states more bytes than the file has.
        """
        column, total = SCHEMA.get_field_index("tokens"), 0
        for group, (_, length, _) in enumerate(self._guard.ranges):
            size = self.metadata.row_group(group).column(column).total_compressed_size
            if not 0 <= size <= length:
                error = DamageError(f"row group {group} claims {size} bytes of tokens")
                raise self._damaged(f"footer ({_windows_named(self.name)})", error)
            total += size
        return total

    def read(self, row: int) -> WindowRecord:
        """Return a window with its targets decoded; `row` counts from 0 in the shard.

        Rows that are read in order are decoded together, to the end of their row group, which is
        faster by half. A row that is read at random is decoded alone.
        """
        in_order, self._next = row == self._next, row + 1
        if row in self._ahead:
            return self._ahead.pop(row)
        group, place = divmod(row, ROWS_PER_GROUP)
        if self._held is None or self._held[0] != group:
            self._held = (group, self._read_group(group))
        rows = self._held[1]
        last = min(len(rows), place + self._together) if in_order else place + 1
        try:
            records = self._decode(group, range(place, last), rows)
        except CacheCorruptionError:  # perhaps of another row of the group
            records = self._decode(group, range(place, place + 1), rows)
        self._ahead = {record.window_index - self.start: record for record in records[1:]}
        return records[0]

    def decode_row(self, row: Mapping[str, Any]) -> SparseTargets:
        """Return the targets of one of this shard's rows, read by another tool.

        Args:
            row: `window_index`, `tokens`, `mask` and `targets` by name, as lists, arrays and bytes.
                If all columns are there, the checksum of the row is verified.

        Raises:
            InvalidArgumentError: the row lacks columns.
            CacheCorruptionError: the row differs from what was written.
        """
        if not set(row.keys()) >= set(_NEEDED):
            raise InvalidArgumentError(missing_columns(row))
        window = int(row["window_index"])
        try:
            record, block = _from_other_tool(row)
            self._require_bounds(record)
            whole = set(row.keys()) >= set(SCHEMA.names)
            if whole and row_crc(record, block) != int(row["crc32c"]):
                raise DamageError("its checksum does not match")
            return self._decoder.decode(window - self.start, block, record.tokens, record.present())
        except _FAILURES as error:
            raise CacheCorruptionError(
                f"the row of window {window} differs from what was written: {error}. Read it again "
                f"from the cache at {self._storage.location}"
            ) from error

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return int(self.metadata.num_row_groups)

    def read_group(self, group: int) -> list[WindowRecord]:
        """Return all windows of a row group; Parquet's page checksums are verified too."""
        rows = self._read_group(group, page_checksums=True)
        places = range(len(rows))
        try:
            if len(rows) > self._together:
                raise DamageError("windows too long to be decoded together")
            return self._decode(group, places, rows)
        except (DamageError, CacheCorruptionError):  # one by one, to name the damaged one
            alone = (self._decode(group, range(p, p + 1), rows) for p in places)
            return [record for records in alone for record in records]

    def read_bytes(self) -> bytes:
        """Return the whole file, every byte verified with the guard; nothing is decoded."""
        data = self._storage.read(self.name)
        try:
            if len(data) != self.size:
                raise DamageError(f"the file has {len(data)} of {self.size} bytes")
            for group, (first, length, _) in enumerate(self._guard.ranges):
                self._guard.require(group, data[first : first + length])
        except DamageError as error:
            raise self._damaged("pages", error) from error
        return data

    @property
    def _together(self) -> int:
        """Number of windows decoded in one pass, which bounds the temporary arrays."""
        return max(1, FREE_ENTRIES // self._identity.window_length)

    def _decode(self, group: int, places: range, rows: Rows) -> list[WindowRecord]:
        """Decode the windows at some places of a row group in one pass."""
        first, length = group * ROWS_PER_GROUP + places.start, self._identity.window_length
        try:
            records = [self._record(place, rows) for place in places]
            chosen = slice(places.start, places.stop)
            targets = self._decoder.decode_run(
                first,
                rows.blocks[chosen],
                rows.tokens[chosen],
                np.stack([record.present() for record in records]),
            )
        except _FAILURES as error:
            window, last = self.start + first, self.start + first + len(places) - 1
            where = f"row {first} (windows {window} to {last})"
            raise self._damaged(where, error) from error
        return [
            replace(record, targets=targets[i * length : (i + 1) * length])
            for i, record in enumerate(records)
        ]

    def _require_modest_footer(self) -> None:
        """Validate the sizes in the footer before Parquet's parser allocates them."""
        guard, named = self._guard, -(-(self.stop - self.start) // ROWS_PER_GROUP)
        if len(guard.ranges) != named:
            raise DamageError(
                f"its name states {self.stop - self.start} windows, which is {named} row groups; "
                f"its guard covers {len(guard.ranges)}"
            )
        footer = self._file.data[guard.footer_start - self._file.start :]
        allowed = footer_bound(named, description_bound(self.size))
        if len(footer) > allowed:
            raise DamageError(
                f"its footer has {len(footer):,} bytes, expected {allowed:,} at most for {named} "
                f"row groups in {self.size:,} bytes"
            )
        # an Arrow schema would be parsed, and extension types made from it
        if b"ARROW:" in footer:
            raise DamageError("its footer contains an Arrow schema, which no shard does")
        if len(footer) > _WALKED:
            reader = CompactReader(footer, most=(1 << 14) + _VALUES_PER_GROUP * named)
            for _, kind in reader.fields():
                reader.skip(kind)

    def _read_description(self) -> dict[str, Any]:
        metadata, start, stop = self.metadata, self.start, self.stop
        if not self._parquet.schema_arrow.equals(SCHEMA):
            raise DamageError(f"its columns are {shown(self._parquet.schema_arrow.names)}")
        text = (metadata.metadata or {}).get(METADATA_KEY, b"null")
        description = parse_json(
            text, largest=description_bound(self.size), most=description_bound(self.size)
        )
        if not isinstance(description, dict):
            raise DamageError("its key-value metadata lacks the description of a shard")
        found = {key: description.get(key) for key in ("format_version", "start", "stop")}
        expected = {"format_version": FORMAT_VERSION, "start": start, "stop": stop}
        if found != expected:
            raise DamageError(f"its description states {shown(found)}, its name says {expected}")
        if description.get("fingerprint") != self._identity.fingerprint:
            raise DamageError(
                f"it belongs to a cache of fingerprint {shown(description.get('fingerprint'))}, "
                f"not {self._identity.fingerprint}"
            )
        _require_totals(description, stop - start, self._identity)
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        whole, rest = divmod(stop - start, ROWS_PER_GROUP)
        if rows != [ROWS_PER_GROUP] * whole + [rest] * (rest > 0):
            raise DamageError(f"its row groups hold {shown(rows)} rows")
        return description

    def _read_group(self, group: int, *, page_checksums: bool = False) -> Rows:
        first, length, _ = self._guard.ranges[group]
        first_window = self.start + group * ROWS_PER_GROUP
        data = self._storage.read(self.name, first, first + length)
        try:
            self._guard.require(group, data)
            window_length = self._identity.window_length
            require_pages(self.metadata.row_group(group), first, data, window_length)
            self._file.start, self._file.data = first, data
            parquet = self._parquet
            if page_checksums:
                parquet = pq.ParquetFile(
                    pa.PythonFile(self._file, "r"),
                    metadata=self.metadata,
                    pre_buffer=False,
                    page_checksum_verification=True,
                )
            table = parquet.read_row_group(group, use_threads=False)
            return rows_of(table, first_window, window_length, self._identity.vocab_size)
        except _FAILURES as error:
            last = min(first_window + ROWS_PER_GROUP, self.stop) - 1
            first_row = group * ROWS_PER_GROUP
            where = f"rows from {first_row} on (windows {first_window} to {last})"
            raise self._damaged(where, error) from error

    def _record(self, place: int, rows: Rows) -> WindowRecord:
        """Return the parts of a row, without its targets."""
        record = WindowRecord(
            rows.window_index[place],
            rows.tokens[place],
            rows.document_starts[place],
            rows.masks[place],
            _NO_TARGETS,
            rows.teacher_loss[place],
            rows.teacher_entropy[place],
        )
        if row_crc(record, rows.blocks[place]) != rows.crc32c[place]:
            raise DamageError(
                f"the checksum of row {record.window_index - self.start} does not match"
            )
        return record

    def _require_bounds(self, record: WindowRecord) -> None:
        """Validate the tokens of one row, as `rows_of` does for a row group."""
        length, ids = self._identity.window_length, self._identity.vocab_size
        if record.tokens.shape != (length,) or record.present().shape != (length,):
            raise DamageError(f"it has {record.tokens.size} tokens, a window has {length}")
        if length and not 0 <= int(record.tokens.min()) <= int(record.tokens.max()) < ids:
            raise DamageError(f"a token lies outside the vocabulary of {ids}")

    def _damaged(self, where: str, error: Exception) -> CacheCorruptionError:
        return CacheCorruptionError(
            f"{self._storage.location}/{self.name}, {where}: {error}. Run `sparselogits repair` on "
            "the cache, which sets the file aside, then build its windows again"
        )


_FAILURES = (
    pa.ArrowException,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    MemoryError,
    ArithmeticError,
    AttributeError,
)


class _HeldRange(io.RawIOBase):
    """A file of which one range is in memory: pyarrow parses only what was validated."""

    start: int = 0
    size: int = 0
    data: bytes = b""
    _at: int = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        first = self._at - self.start
        if first < 0 or first > len(self.data):
            raise DamageError(f"the footer points outside of its row group, to byte {self._at}")
        part = self.data[first:] if size < 0 else self.data[first : first + size]
        self._at += len(part)
        return part


_NEEDED = ("window_index", "tokens", "mask", "targets")


def missing_columns(row: Mapping[str, Any]) -> str:
    """Return the message for a row that lacks columns."""
    missing = [name for name in _NEEDED if name not in row]
    return (
        f"a row to decode lacks {', '.join(missing)} (it has {', '.join(map(str, row.keys()))}); "
        f"select {', '.join(_NEEDED)}, or all columns to have the checksum verified, too"
    )


def _from_other_tool(row: Mapping[str, Any]) -> tuple[WindowRecord, bytes]:
    """Return the parts of a row, whatever kinds of lists a tool makes of its columns."""
    mask = row["mask"]
    if not hasattr(mask, "__len__"):  # None, or the null of a data frame
        mask = None
    starts = row.get("document_starts", ())
    record = WindowRecord(
        int(row["window_index"]),
        np.array(row["tokens"], dtype=np.int32),
        np.array(starts, dtype=np.int32),
        None if mask is None else np.array(mask, dtype=np.bool_),
        _NO_TARGETS,
        float(row["teacher_loss"]) if "teacher_loss" in row else 0.0,
        float(row["teacher_entropy"]) if "teacher_entropy" in row else 0.0,
    )
    return record, bytes(row["targets"])


def _windows_named(name: str) -> str:
    try:
        start, stop = parse_shard_name(name)
    except ValueError:
        return "of unknown windows"
    return f"windows {start} to {stop - 1}"


def _require_totals(description: Mapping[str, Any], windows: int, identity: Identity) -> None:
    """Validate the types and bounds of the totals in a footer."""
    positions = windows * identity.window_length
    for name, kinds, least, most in (
        ("positions", int, 0, positions),
        ("entries", int, 0, positions * identity.vocab_size),
        ("teacher_loss", (int, float), -ROUNDING, LARGEST_LOSS),
        ("teacher_entropy", (int, float), -ROUNDING, math.log(identity.vocab_size) + 0.01),
    ):
        value = description.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise DamageError(f"its {name} are {shown(value)}, expected {least:g} to {most:g}")
    for name in ("tables", "provenance"):
        if not isinstance(description.get(name), dict):
            raise DamageError(f"its {name} are {shown(description.get(name))}, not an object")


def _tables_from_json(value: Mapping[str, Any]) -> dict[str, list[tuple[int, bytes]]]:
    tables: dict[str, list[tuple[int, bytes]]] = {}
    for name, column in value.items():
        if not isinstance(column, list):
            raise DamageError(f"its coding tables of {shown(name)} are {shown(column)}")
        tables[name] = []
        for entry in column:
            if not (
                isinstance(entry, list)
                and len(entry) == 2
                and isinstance(entry[0], int)
                and isinstance(entry[1], str)
            ):
                raise DamageError(f"a coding table of {shown(name)} is {shown(entry)}")
            tables[name].append((entry[0], base64.b64decode(entry[1], validate=True)))
    return tables
