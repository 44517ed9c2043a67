"""Reading a shard: a row group at a time, and nothing parsed before it is checked.

What Parquet does not check, this does: every byte read is compared
with a CRC32C of the guard before it is parsed (store/guard.py), the footer's claims with the
file's name and the cache's identity, and each row with a CRC32C of its own, which stays with the
row wherever other tools carry it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparselogits.errors import CacheCorruptionError
from sparselogits.identity import FORMAT_VERSION, Identity
from sparselogits.store.codec import BlockDecoder, BlockError, TargetCodec
from sparselogits.store.guard import Guard, GuardError, read_guard
from sparselogits.store.ranges import parse_shard_name
from sparselogits.store.records import WindowRecord
from sparselogits.store.shard_writer import METADATA_KEY, ROWS_PER_GROUP, SCHEMA, row_crc
from sparselogits.store.storage import Storage
from sparselogits.targets import SparseTargets

_FIRST_READ = 1 << 16
_NO_TARGETS = SparseTargets(
    torch.empty(0, dtype=torch.int64),
    torch.empty(0),
    torch.zeros(1, dtype=torch.int64),
    1,
    check=False,
)

_Columns = Mapping[str, pa.Array]


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
            self._guard, self._file.data = self._read_frame()
            self._file.size, self._file.start = self.size, self.size - len(self._file.data)
            self._parquet = pq.ParquetFile(pa.PythonFile(self._file, "r"), pre_buffer=False)
            self.metadata: pq.FileMetaData = self._parquet.metadata
            self.description = self._read_description()
            codec = TargetCodec.from_identity(identity.codec, identity.vocab_size)
            tables = _tables_from_json(self.description["tables"])
            self._decoder: BlockDecoder = codec.decoder(tables)
        except _FAILURES as error:
            raise self._damaged(f"footer ({_windows_named(name)})", error) from error
        self.start, self.stop = self.description["start"], self.description["stop"]
        self._held: tuple[int, _Columns] | None = None
        self._ahead: dict[int, WindowRecord] = {}
        self._next = 0

    def __len__(self) -> int:
        return int(self.stop - self.start)

    @property
    def text_bytes(self) -> int:
        """Bytes of the file that hold the text's own tokens."""
        column = SCHEMA.get_field_index("tokens")
        groups = range(self.metadata.num_row_groups)
        return sum(self.metadata.row_group(g).column(column).total_compressed_size for g in groups)

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
        columns = self._held[1]
        last = len(columns["window_index"]) if in_order else place + 1
        try:
            records = self._decode(group, range(place, last), columns)
        except CacheCorruptionError:  # of one that was not asked for, perhaps
            records = self._decode(group, range(place, place + 1), columns)
        self._ahead = {record.window_index - self.start: record for record in records[1:]}
        return records[0]

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return int(self.metadata.num_row_groups)

    def read_group(self, group: int) -> list[WindowRecord]:
        """All windows of a row group, Parquet's own page checksums checked too."""
        columns = self._read_group(group, page_checksums=True)
        places = range(len(columns["window_index"]))
        try:
            return self._decode(group, places, columns)
        except CacheCorruptionError:  # to say which one it is; and windows too large for one go
            alone = (self._decode(group, range(p, p + 1), columns) for p in places)
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

    def _decode(self, group: int, places: range, columns: _Columns) -> list[WindowRecord]:
        """The windows at some places of a row group, decoded in one go."""
        first = group * ROWS_PER_GROUP + places.start
        try:
            rows = [self._row(first + i, place, columns) for i, place in enumerate(places)]
            targets = self._decoder.decode_run(
                first,
                [block for _, block in rows],
                np.stack([record.tokens for record, _ in rows]),
                np.stack([record.present() for record, _ in rows]),
            )
        except _FAILURES as error:
            window, last = self.start + first, self.start + first + len(places) - 1
            where = f"row {first} (windows {window} to {last})"
            raise self._damaged(where, error) from error
        length = self._identity.window_length
        return [
            replace(record, targets=targets[i * length : (i + 1) * length])
            for i, (record, _) in enumerate(rows)
        ]

    def _read_frame(self) -> tuple[Guard, bytes]:
        wanted = _FIRST_READ
        while True:
            self.size, tail = self._storage.tail(self.name, wanted)
            guard = read_guard(tail, self.size)
            if isinstance(guard, Guard):
                return guard, tail
            wanted = guard

    def _read_description(self) -> dict[str, Any]:
        metadata, (start, stop) = self.metadata, parse_shard_name(self.name)
        if not self._parquet.schema_arrow.equals(SCHEMA):
            raise _DamageError(f"its columns are {self._parquet.schema_arrow.names}")
        description = json.loads((metadata.metadata or {}).get(METADATA_KEY, b"null"))
        if not isinstance(description, dict):
            raise _DamageError("its key-values lack the description of a shard")
        found = {key: description.get(key) for key in ("format_version", "start", "stop")}
        expected = {"format_version": FORMAT_VERSION, "start": start, "stop": stop}
        if found != expected:
            raise _DamageError(f"it describes itself as {found}, its name says {expected}")
        if description.get("fingerprint") != self._identity.fingerprint:
            raise _DamageError(
                f"it belongs to a cache of fingerprint {description.get('fingerprint')}, not "
                f"{self._identity.fingerprint}"
            )
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        whole, rest = divmod(stop - start, ROWS_PER_GROUP)
        if rows != [ROWS_PER_GROUP] * whole + [rest] * (rest > 0):
            raise _DamageError(f"its row groups hold {rows} rows")
        if len(self._guard.ranges) != len(rows):
            raise _DamageError(f"its guard covers {len(self._guard.ranges)} row groups")
        return description

    def _read_group(self, group: int, *, page_checksums: bool = False) -> _Columns:
        first, length, _ = self._guard.ranges[group]
        data = self._storage.read(self.name, first, first + length)
        try:
            self._guard.require(group, data)
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
            return {name: table.column(name).chunk(0) for name in SCHEMA.names}
        except _FAILURES as error:
            first_row = group * ROWS_PER_GROUP
            windows = (
                self.start + first_row,
                min(self.start + first_row + ROWS_PER_GROUP, self.stop),
            )
            where = f"rows from {first_row} on (windows {windows[0]} to {windows[1] - 1})"
            raise self._damaged(where, error) from error

    def _row(self, row: int, place: int, columns: _Columns) -> tuple[WindowRecord, bytes]:
        """A row's parts, its targets still coded."""
        mask = columns["mask"][place].values
        record = WindowRecord(
            columns["window_index"][place].as_py(),
            columns["tokens"][place].values.to_numpy(),
            columns["document_starts"][place].values.to_numpy(),
            None if mask is None else mask.to_numpy(zero_copy_only=False),
            _NO_TARGETS,
            columns["teacher_loss"][place].as_py(),
            columns["teacher_entropy"][place].as_py(),
        )
        block = columns["targets"][place].as_py()
        self._require_row(row, record, block, columns["crc32c"][place].as_py())
        return record, block

    def _require_row(self, row: int, record: WindowRecord, block: bytes, crc: int) -> None:
        if record.window_index != self.start + row:
            raise _DamageError(f"row {row} holds window {record.window_index}")
        length = self._identity.window_length
        if len(record.tokens) != length or len(record.present()) != length:
            raise _DamageError(f"row {row} holds {len(record.tokens)} tokens, not {length}")
        if row_crc(record, block) != crc:
            raise _DamageError(f"row {row} fails its checksum")

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
    RecursionError,  # JSON nested deeper than its parser goes
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


def _windows_named(name: str) -> str:
    try:
        start, stop = parse_shard_name(name)
    except ValueError:
        return "of windows that its name does not tell"
    return f"windows {start} to {stop - 1}"


def _tables_from_json(value: Mapping[str, Any]) -> dict[str, list[tuple[int, bytes]]]:
    return {
        name: [(int(start), base64.b64decode(table, validate=True)) for start, table in column]
        for name, column in value.items()
    }
