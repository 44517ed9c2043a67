"""Reading a shard: a row group at a time, and nothing parsed before it is checked.

What Parquet does not check, this does: every byte read is compared with a CRC32C of the guard
before it is parsed (guard.py), the footer's claims with the file's name and size and with the
cache's identity, the pages' claims with both (row_group.py), and each row with a CRC32C of its own,
which stays with the row wherever other tools carry it. Checksums tell damage, not intent:
what a stranger wrote is bounded before it is allocated (store/bounds.py).
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
    description_bound,
    footer_bound,
)
from sparselogits.store.codec.target_codec import BlockDecoder, BlockError, TargetCodec
from sparselogits.store.ranges import parse_shard_name
from sparselogits.store.records import WindowRecord
from sparselogits.store.shard.guard import Guard, GuardError, read_guard
from sparselogits.store.shard.row_group import Rows, require_pages, rows_of
from sparselogits.store.shard.writer import METADATA_KEY, ROWS_PER_GROUP, SCHEMA, row_crc
from sparselogits.store.storage.local import Storage
from sparselogits.targets import SparseTargets
from sparselogits.thrift import CompactReader
from sparselogits.untrusted import parse_json, shown

_FIRST_READ = 1 << 16
_NO_TARGETS = SparseTargets(
    torch.empty(0, dtype=torch.int64),
    torch.empty(0),
    torch.zeros(1, dtype=torch.int64),
    1,
    check=False,
)

_WALKED = 1 << 17
"""Bytes of a footer above which its structures are counted before Parquet's parser sees them: it
allocates some three hundred bytes for each byte of an empty column chunk."""

_VALUES_PER_GROUP = 512  # numbers, strings and lists that describe a row group; 200 are usual


class Shard:
    """One shard file, opened: footer checked, rows read on demand.

    Args:
        storage: where it is.
        name: its name there, folder included.
        identity: of the cache.

    Raises:
        CacheCorruptionError: a file that is not a shard of this cache, or no longer.
    """

    def __init__(self, storage: Storage, name: str, identity: Identity) -> None:
        self.name = name
        self._storage = storage
        self._identity = identity
        self._file = _HeldRange()
        try:
            self.start, self.stop = parse_shard_name(name)
            self._guard, self._file.data = self._read_frame()
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
            self._decoder: BlockDecoder = codec.decoder(tables)
        except _FAILURES as error:
            raise self._damaged(f"footer ({_windows_named(name)})", error) from error
        self._held: tuple[int, Rows] | None = None
        self._ahead: dict[int, WindowRecord] = {}
        self._next = 0

    def __len__(self) -> int:
        return int(self.stop - self.start)

    @property
    def text_bytes(self) -> int:
        """Bytes of the file that hold the text's own tokens.

        Raises:
            CacheCorruptionError: the footer claims more than the file has.
        """
        column, total = SCHEMA.get_field_index("tokens"), 0
        for group, (_, length, _) in enumerate(self._guard.ranges):
            size = self.metadata.row_group(group).column(column).total_compressed_size
            if not 0 <= size <= length:
                error = _DamageError(f"row group {group} claims {size} bytes of tokens")
                raise self._damaged(f"footer ({_windows_named(self.name)})", error)
            total += size
        return total

    def read(self, row: int) -> WindowRecord:
        """A window with its targets decoded; `row` counts from 0 in the shard.

        Rows read in their order are decoded together, to the end of their row group: that is faster
        by half. A row read by chance is decoded alone.
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
        except CacheCorruptionError:  # of one that was not asked for, perhaps
            records = self._decode(group, range(place, place + 1), rows)
        self._ahead = {record.window_index - self.start: record for record in records[1:]}
        return records[0]

    def decode_row(self, row: Mapping[str, Any]) -> SparseTargets:
        """Return the targets of one of this shard's rows, read by another tool.

        Args:
            row: `window_index`, `tokens`, `mask` and `targets` by name, as lists, arrays and bytes.
                Where the other columns are there, too, the row's checksum is verified.

        Raises:
            InvalidArgumentError: a row that lacks columns.
            CacheCorruptionError: a row that is not as it was written.
        """
        if not set(row.keys()) >= set(_NEEDED):
            raise InvalidArgumentError(missing_columns(row))
        window = int(row["window_index"])
        try:
            record, block = _from_other_tool(row)
            self._require_bounds(record)
            whole = set(row.keys()) >= set(SCHEMA.names)
            if whole and row_crc(record, block) != int(row["crc32c"]):
                raise _DamageError("it fails its checksum")
            return self._decoder.decode(window - self.start, block, record.tokens, record.present())
        except _FAILURES as error:
            raise CacheCorruptionError(
                f"the row of window {window} is not as it was written: {error}. Read it again from "
                f"the cache at {self._storage.location}"
            ) from error

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return int(self.metadata.num_row_groups)

    def read_group(self, group: int) -> list[WindowRecord]:
        """All windows of a row group, Parquet's own page checksums checked too."""
        rows = self._read_group(group, page_checksums=True)
        places = range(len(rows))
        try:
            if len(rows) > self._together:
                raise BlockError("windows too long to be decoded together")
            return self._decode(group, places, rows)
        except (BlockError, CacheCorruptionError):  # to say which one it is
            alone = (self._decode(group, range(p, p + 1), rows) for p in places)
            return [record for records in alone for record in records]

    def read_bytes(self) -> bytes:
        """The whole file, every byte of it checked against the guard; nothing is decoded."""
        data = self._storage.read(self.name)
        try:
            if len(data) != self.size:
                raise GuardError(f"{len(data)} of its {self.size} bytes are there")
            for group, (first, length, _) in enumerate(self._guard.ranges):
                self._guard.require(group, data[first : first + length])
        except GuardError as error:
            raise self._damaged("pages", error) from error
        return data

    @property
    def _together(self) -> int:
        """Windows that are decoded in one go: as many as keep its temporaries small."""
        return max(1, FREE_ENTRIES // self._identity.window_length)

    def _decode(self, group: int, places: range, rows: Rows) -> list[WindowRecord]:
        """Return the windows at some places of a row group, decoded in one go."""
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

    def _read_frame(self) -> tuple[Guard, bytes]:
        wanted = _FIRST_READ
        while True:
            self.size, tail = self._storage.tail(self.name, wanted)
            guard = read_guard(tail, self.size)
            if isinstance(guard, Guard):
                return guard, tail
            wanted = guard

    def _require_modest_footer(self) -> None:
        """Check what the footer claims before Parquet's parser allocates it."""
        guard, named = self._guard, -(-(self.stop - self.start) // ROWS_PER_GROUP)
        if len(guard.ranges) != named:
            raise _DamageError(
                f"its name claims {self.stop - self.start} windows, which is {named} row groups; "
                f"its guard covers {len(guard.ranges)}"
            )
        footer = self._file.data[guard.footer_start - self._file.start :]
        allowed = footer_bound(named, description_bound(self.size))
        if len(footer) > allowed:
            raise _DamageError(
                f"its footer has {len(footer):,} bytes, expected {allowed:,} at most for {named} "
                f"row groups in {self.size:,} bytes"
            )
        # Arrow's own schema would be parsed, and extension types made of it
        if b"ARROW:" in footer:
            raise _DamageError("its footer carries a schema of Arrow's, which no shard does")
        if len(footer) > _WALKED:
            reader = CompactReader(footer, most=(1 << 14) + _VALUES_PER_GROUP * named)
            for _, kind in reader.fields():
                reader.skip(kind)

    def _read_description(self) -> dict[str, Any]:
        metadata, start, stop = self.metadata, self.start, self.stop
        if not self._parquet.schema_arrow.equals(SCHEMA):
            raise _DamageError(f"its columns are {shown(self._parquet.schema_arrow.names)}")
        text = (metadata.metadata or {}).get(METADATA_KEY, b"null")
        description = parse_json(
            text, largest=description_bound(self.size), most=description_bound(self.size)
        )
        if not isinstance(description, dict):
            raise _DamageError("its key-values lack the description of a shard")
        found = {key: description.get(key) for key in ("format_version", "start", "stop")}
        expected = {"format_version": FORMAT_VERSION, "start": start, "stop": stop}
        if found != expected:
            raise _DamageError(f"it describes itself as {shown(found)}, its name says {expected}")
        if description.get("fingerprint") != self._identity.fingerprint:
            raise _DamageError(
                f"it belongs to a cache of fingerprint {shown(description.get('fingerprint'))}, "
                f"not {self._identity.fingerprint}"
            )
        _require_totals(description, stop - start, self._identity)
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        whole, rest = divmod(stop - start, ROWS_PER_GROUP)
        if rows != [ROWS_PER_GROUP] * whole + [rest] * (rest > 0):
            raise _DamageError(f"its row groups hold {shown(rows)} rows")
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
        """Return a row's parts without its targets, which are still coded."""
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
            raise _DamageError(f"row {record.window_index - self.start} fails its checksum")
        return record

    def _require_bounds(self, record: WindowRecord) -> None:
        """Check what `rows_of` checks where a whole row group is read."""
        length, ids = self._identity.window_length, self._identity.vocab_size
        if record.tokens.shape != (length,) or record.present().shape != (length,):
            raise _DamageError(f"it has {record.tokens.size} tokens, a window has {length}")
        if length and not 0 <= int(record.tokens.min()) <= int(record.tokens.max()) < ids:
            raise _DamageError(f"a token lies outside the vocabulary of {ids}")

    def _damaged(self, where: str, error: Exception) -> CacheCorruptionError:
        return CacheCorruptionError(
            f"{self._storage.location}/{self.name}, {where}: {error}. Run `sparselogits repair` on "
            "the cache, which sets the file aside, then build its windows again"
        )


class _DamageError(ValueError):
    """What is wrong with a shard; the caller says where."""


_FAILURES = (
    _DamageError,
    BlockError,
    GuardError,
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
    """A file of which one range is at hand: what pyarrow parses has been checked before."""

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
            raise _DamageError(f"the footer points outside its row group, at byte {self._at}")
        part = self.data[first:] if size < 0 else self.data[first : first + size]
        self._at += len(part)
        return part


_NEEDED = ("window_index", "tokens", "mask", "targets")


def missing_columns(row: Mapping[str, Any]) -> str:
    """Return what to say of a row that lacks columns."""
    missing = [name for name in _NEEDED if name not in row]
    return (
        f"a row to decode lacks {', '.join(missing)} (it has {', '.join(map(str, row.keys()))}); "
        f"select {', '.join(_NEEDED)}, or all columns to have the checksum verified, too"
    )


def _from_other_tool(row: Mapping[str, Any]) -> tuple[WindowRecord, bytes]:
    """A row's parts, whatever kinds of lists a tool makes of its columns."""
    mask = row["mask"]
    if not hasattr(mask, "__len__"):  # None, or what a data frame has in place of it
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
        return "of windows that its name does not tell"
    return f"windows {start} to {stop - 1}"


def _require_totals(description: Mapping[str, Any], windows: int, identity: Identity) -> None:
    """Check the types and the bounds of what a footer says about its rows."""
    positions = windows * identity.window_length
    for name, kinds, least, most in (
        ("positions", int, 0, positions),
        ("entries", int, 0, positions * identity.vocab_size),
        ("teacher_loss", (int, float), -ROUNDING, LARGEST_LOSS),
        ("teacher_entropy", (int, float), -ROUNDING, math.log(identity.vocab_size) + 0.01),
    ):
        value = description.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise _DamageError(f"its {name} are {shown(value)}, expected {least:g} to {most:g}")
    for name in ("tables", "provenance"):
        if not isinstance(description.get(name), dict):
            raise _DamageError(f"its {name} are {shown(description.get(name))}, not an object")


def _tables_from_json(value: Mapping[str, Any]) -> dict[str, list[tuple[int, bytes]]]:
    tables: dict[str, list[tuple[int, bytes]]] = {}
    for name, column in value.items():
        if not isinstance(column, list):
            raise _DamageError(f"its coding tables of {shown(name)} are {shown(column)}")
        tables[name] = []
        for entry in column:
            if not (
                isinstance(entry, list)
                and len(entry) == 2
                and isinstance(entry[0], int)
                and isinstance(entry[1], str)
            ):
                raise _DamageError(f"a coding table of {shown(name)} is {shown(entry)}")
            tables[name].append((entry[0], base64.b64decode(entry[1], validate=True)))
    return tables
