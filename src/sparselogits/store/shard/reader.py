"""Read shards, one row group at a time, and validate all bytes before they are parsed.

The reader validates more than Parquet does: the bytes against the checksums of the guard
(guard.py), the footer against the name and size of the file and the identity of the cache, the
pages against footer and identity (row_group.py), and each row against its CRC32C. Checksums detect
damage but not forgery, so sizes are also compared with their bounds before memory is allocated
(bounds.py).
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
from sparselogits.identity import Identity
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
from sparselogits.store.records import Bool, Int32, WindowRecord
from sparselogits.store.shard.guard import read_frame
from sparselogits.store.shard.row_group import Rows, require_pages, rows_of
from sparselogits.store.shard.writer import METADATA_KEY, ROWS_PER_GROUP, SCHEMAS, row_crc
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

_LARGEST_UNCOUNTED_FOOTER = 1 << 17
"""Size of a footer, in bytes, above which its structures are counted before Parquet parses it.

Parquet's parser allocates about 300 bytes per byte of an empty column chunk.
"""

_VALUES_PER_GROUP = 512  # largest number of thrift values per row group; valid ones have about 200


class Shard:
    """An open shard whose footer is validated and whose rows are read on demand.

    Args:
        storage: files of the cache.
        name: path of the shard, relative to the cache.
        identity: identity of the cache.

    Raises:
        CacheCorruptionError: the file is missing or damaged, or belongs to another cache.
        StorageError: the file cannot be reached.
    """

    def __init__(self, storage: ReadableFiles, name: str, identity: Identity) -> None:
        self.name = name
        self._storage = storage
        self._identity = identity
        self._schema = SCHEMAS[identity.format_version]
        self._file = _BufferedRange()
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
        self._group: tuple[int, Rows] | None = None  # the last row group that was read
        self._ahead: dict[int, WindowRecord] = {}
        self._next = 0

    def __len__(self) -> int:
        return int(self.stop - self.start)

    @property
    def text_bytes(self) -> int:
        """Compressed size of the token column in bytes.

        Raises:
            CacheCorruptionError: the footer claims more bytes than a row group has.
        """
        column, total = self._schema.get_field_index("tokens"), 0
        for group, (_, length, _) in enumerate(self._guard.ranges):
            size = self.metadata.row_group(group).column(column).total_compressed_size
            if not 0 <= size <= length:
                error = DamageError(
                    f"row group {group} claims {size} bytes of tokens, expected at most {length}"
                )
                raise self._damaged(f"footer ({_windows_named(self.name)})", error)
            total += size
        return total

    def read(self, row: int) -> WindowRecord:
        """Read a row, given its index in the shard, and decode its targets.

        When rows are read in order, the remaining rows of a row group are decoded together (as many
        as fit into one pass), in two thirds of the time of decoding each alone. A row that is read
        at random is decoded alone.

        Raises:
            CacheCorruptionError: the row or its row group is damaged.
        """
        in_order, self._next = row == self._next, row + 1
        if row in self._ahead:
            return self._ahead.pop(row)
        group, at = divmod(row, ROWS_PER_GROUP)
        if self._group is None or self._group[0] != group:
            self._group = (group, self._read_group(group))
        rows = self._group[1]
        last = min(len(rows), at + self._rows_per_pass) if in_order else at + 1
        try:
            records = self._decode(group, range(at, last), rows)
        except CacheCorruptionError:  # perhaps the damage is in another row
            records = self._decode(group, range(at, at + 1), rows)
        self._ahead = {record.window_index - self.start: record for record in records[1:]}
        return records[0]

    def decode_row(self, row: Mapping[str, Any]) -> SparseTargets:
        """Decode the targets of a row that another tool has read from this shard.

        Args:
            row: columns by name: `window_index`, `tokens`, `mask` and `targets`, as lists, arrays
                or bytes. If all columns of the shard are present, the row's checksum is verified.

        Raises:
            InvalidArgumentError: a column is missing.
            CacheCorruptionError: the row does not decode, or its checksum is wrong.
        """
        if not set(row.keys()) >= set(_NEEDED):
            raise InvalidArgumentError(missing_columns(row))
        window = int(row["window_index"])
        try:
            whole = set(row.keys()) >= set(self._schema.names)
            record, block = _from_other_tool(row)
            length, ids = self._identity.window_length, self._identity.vocab_size
            for name, values in (("tokens", record.tokens), ("mask values", record.present())):
                if values.shape != (length,):
                    raise DamageError(f"the row has {values.size} {name}, expected {length}")
            if not 0 <= int(record.tokens.min()) <= int(record.tokens.max()) < ids:
                raise DamageError(f"a token is outside the vocabulary of {ids} ids")
            if whole and (found := row_crc(record, block)) != int(row["crc32c"]):
                raise DamageError(f"CRC32C {found:08x}, expected {int(row['crc32c']):08x}")
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
        """Read all rows of a row group, and verify Parquet's page checksums as well.

        Raises:
            CacheCorruptionError: the row group is damaged.
        """
        rows = self._read_group(group, page_checksums=True)
        step = self._rows_per_pass
        try:
            starts = range(0, len(rows), step)
            parts = [self._decode(group, range(a, min(a + step, len(rows))), rows) for a in starts]
        except CacheCorruptionError:  # decoded one by one, so that the error names the damaged row
            parts = [self._decode(group, range(a, a + 1), rows) for a in range(len(rows))]
        return [record for records in parts for record in records]

    def read_bytes(self) -> bytes:
        """Return the content of the file; row groups are verified with the guard and not decoded.

        Raises:
            CacheCorruptionError: the file cannot be read, its size has changed, or a row group is
                damaged.
        """
        try:
            data = self._storage.read(self.name)
            if len(data) != self.size:
                raise DamageError(f"found {len(data)} bytes, expected {self.size}")
            for group, (first, length, _) in enumerate(self._guard.ranges):
                self._guard.require(group, data[first : first + length])
        except (DamageError, OSError) as error:
            raise self._damaged("pages", error) from error
        return data

    @property
    def _rows_per_pass(self) -> int:
        """Largest number of rows decoded in one pass, which bounds the temporary arrays."""
        return max(1, FREE_ENTRIES // self._identity.window_length)

    def _decode(self, group: int, indices: range, rows: Rows) -> list[WindowRecord]:
        """Decode the rows with the given consecutive indices in a row group in one pass."""
        first, length = group * ROWS_PER_GROUP + indices.start, self._identity.window_length
        try:
            records = [self._record(index, rows) for index in indices]
            chosen = slice(indices.start, indices.stop)
            targets = self._decoder.decode_run(
                first,
                rows.blocks[chosen],
                rows.tokens[chosen],
                np.stack([record.present() for record in records]),
            )
        except _FAILURES as error:
            window, last = self.start + first, self.start + first + len(indices) - 1
            where = f"row {first} (windows {window} to {last})"
            raise self._damaged(where, error) from error
        return [
            replace(record, targets=targets[i * length : (i + 1) * length])
            for i, record in enumerate(records)
        ]

    def _require_modest_footer(self) -> None:
        """Validate the guard's row groups and the footer before Parquet's parser reads it."""
        guard, groups = self._guard, -(-(self.stop - self.start) // ROWS_PER_GROUP)
        if len(guard.ranges) != groups:
            raise DamageError(
                f"the guard covers {len(guard.ranges)} row groups, expected {groups} for the "
                f"{self.stop - self.start} windows in the file's name"
            )
        footer = self._file.data[guard.footer_start - self._file.start :]
        allowed = footer_bound(groups, description_bound(self.size))
        if len(footer) > allowed:
            raise DamageError(
                f"the footer has {len(footer):,} bytes, expected at most {allowed:,} for {groups} "
                f"row groups in {self.size:,} bytes"
            )
        # pyarrow would parse an Arrow schema and instantiate its extension types
        if b"ARROW:" in footer:
            raise DamageError("the footer contains an Arrow schema, which no valid shard does")
        if len(footer) > _LARGEST_UNCOUNTED_FOOTER:
            reader = CompactReader(footer, most=(1 << 14) + _VALUES_PER_GROUP * groups)
            for _, kind in reader.fields():
                reader.skip(kind)

    def _read_description(self) -> dict[str, Any]:
        """Validate schema, row groups and description in the footer; return the description."""
        metadata, start, stop = self.metadata, self.start, self.stop
        if not self._parquet.schema_arrow.equals(self._schema):
            schemas = (self._parquet.schema_arrow, self._schema)
            types = [shown({field.name: str(field.type) for field in s}) for s in schemas]
            raise DamageError(f"the schema is {types[0]}, expected {types[1]}")
        text = (metadata.metadata or {}).get(METADATA_KEY, b"null")
        description = parse_json(
            text, largest=description_bound(self.size), most=description_bound(self.size)
        )
        if not isinstance(description, dict):
            raise DamageError("the key-value metadata does not contain a description of the shard")
        found = {key: description.get(key) for key in ("format_version", "start", "stop")}
        version = self._identity.format_version
        expected = {"format_version": version, "start": start, "stop": stop}
        if found != expected:
            raise DamageError(f"the description states {shown(found)}, expected {expected}")
        if description.get("fingerprint") != self._identity.fingerprint:
            raise DamageError(
                "the shard belongs to a cache with the fingerprint "
                f"{shown(description.get('fingerprint'))}, expected {self._identity.fingerprint}"
            )
        _require_totals(description, stop - start, self._identity)
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        whole, rest = divmod(stop - start, ROWS_PER_GROUP)
        if rows != [ROWS_PER_GROUP] * whole + [rest] * (rest > 0):
            raise DamageError(
                f"the row groups have {shown(rows)} rows, expected {ROWS_PER_GROUP} in all but the "
                "last one"
            )
        return description

    def _read_group(self, group: int, *, page_checksums: bool = False) -> Rows:
        """Read and validate a row group without decoding its targets."""
        first, length, _ = self._guard.ranges[group]
        first_window = self.start + group * ROWS_PER_GROUP
        try:
            data = self._storage.read(self.name, first, first + length)
            self._guard.require(group, data)
            window_length = self._identity.window_length
            described = self.metadata.row_group(group)
            require_pages(described, self._schema, first, data, window_length)
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

    def _record(self, index: int, rows: Rows) -> WindowRecord:
        """Verify the checksum of a row, and return the row with empty targets."""
        tokens, mask = rows.tokens[index], rows.masks[index]
        record = WindowRecord(
            rows.window_index[index],
            tokens,
            rows.document_starts[index],
            mask,
            _NO_TARGETS,
            rows.teacher_loss[index],
            rows.teacher_entropy[index],
            *(_corruption(tokens, mask, rows.hidden[index], rows.rate[index]) if rows.rate else ()),
        )
        found, expected = row_crc(record, rows.blocks[index]), rows.crc32c[index]
        if found != expected:
            row = record.window_index - self.start
            raise DamageError(f"row {row} has CRC32C {found:08x}, expected {expected:08x}")
        return record

    def _damaged(self, where: str, error: Exception) -> CacheCorruptionError:
        """Return the error for damage to the file, with the cause and advice."""
        return CacheCorruptionError(
            f"{self._storage.location}/{self.name}, {where}: {error}. Run `sparselogits repair` on "
            "the cache, which moves the file aside, then build its windows again"
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
"""Exceptions that pyarrow and the decoders raise for damaged bytes."""


class _BufferedRange(io.RawIOBase):
    """File object with one range of a shard in memory, so that pyarrow can read nothing else."""

    start: int = 0  # offset of the range in bytes
    size: int = 0  # size of the file in bytes
    data: bytes = b""  # bytes of the range
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
            raise DamageError(f"the footer refers to byte {self._at}, outside of the row group")
        part = self.data[first:] if size < 0 else self.data[first : first + size]
        self._at += len(part)
        return part


_NEEDED = ("window_index", "tokens", "mask", "targets")


def missing_columns(row: Mapping[str, Any]) -> str:
    """Return the error message for a row that lacks columns."""
    missing = [name for name in _NEEDED if name not in row]
    return (
        f"a row to decode lacks {', '.join(missing)} (it has {', '.join(map(str, row.keys()))}); "
        f"select {', '.join(_NEEDED)}, or all columns so that the checksum is verified, too"
    )


def _from_other_tool(row: Mapping[str, Any]) -> tuple[WindowRecord, bytes]:
    """Return the record and the encoded targets of a row whose columns another tool has read."""
    mask = row["mask"]
    if not hasattr(mask, "__len__"):  # None, or the null value of a data frame
        mask = None
    mask = None if mask is None else np.array(mask, dtype=np.bool_)
    tokens = np.array(row["tokens"], dtype=np.int32)
    corruption: tuple[Any, ...] = ()
    if "inputs" in row and "rate" in row:
        hidden = np.array(row["inputs"], dtype=np.int32)
        corruption = _corruption(tokens, mask, hidden, float(row["rate"]))
    record = WindowRecord(
        int(row["window_index"]),
        tokens,
        np.array(row.get("document_starts", ()), dtype=np.int32),
        mask,
        _NO_TARGETS,
        float(row["teacher_loss"]) if "teacher_loss" in row else 0.0,
        float(row["teacher_entropy"]) if "teacher_entropy" in row else 0.0,
        *corruption,
    )
    return record, bytes(row["targets"])


def _corruption(
    tokens: Int32, mask: Bool | None, hidden: Int32, rate: float
) -> tuple[Int32, float]:
    """Return the inputs of a window, int32 [L], and its rate of corruption.

    `hidden` contains the inputs at the positions with a target.
    """
    inputs = tokens.copy()
    inputs[slice(None) if mask is None else mask] = hidden
    return inputs, rate


def _windows_named(name: str) -> str:
    """Return a phrase with the range of windows in the name of a shard."""
    try:
        start, stop = parse_shard_name(name)
    except ValueError:
        return "of unknown windows"
    return f"windows {start} to {stop - 1}"


def _require_totals(description: Mapping[str, Any], windows: int, identity: Identity) -> None:
    """Validate the totals in a description, and the types of its tables and provenance."""
    positions = windows * identity.window_length
    for name, kinds, least, most in (
        ("positions", int, 0, positions),
        ("entries", int, 0, positions * identity.vocab_size),
        ("teacher_loss", (int, float), -ROUNDING, LARGEST_LOSS),
        ("teacher_entropy", (int, float), -ROUNDING, math.log(identity.vocab_size) + 0.01),
    ):
        value = description.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            kind = "a whole" if kinds is int else "a"
            raise DamageError(
                f"{name} is {shown(value)}, expected {kind} number from {least:,} to {most:,}"
            )
    for name in ("tables", "provenance"):
        if not isinstance(description.get(name), dict):
            raise DamageError(f"{name} is {shown(description.get(name))}, expected an object")


def _tables_from_json(value: Mapping[str, Any]) -> dict[str, list[tuple[int, bytes]]]:
    """Return each column's coding tables as pairs (first window, table)."""
    tables: dict[str, list[tuple[int, bytes]]] = {}
    for name, column in value.items():
        if not isinstance(column, list):
            raise DamageError(
                f"the coding tables of {shown(name)} are {shown(column)}, expected a list"
            )
        tables[name] = []
        for entry in column:
            match entry:
                case [int(first), str(table)]:
                    tables[name].append((first, base64.b64decode(table, validate=True)))
                case _:
                    raise DamageError(
                        f"a coding table of {shown(name)} is {shown(entry)}, expected a window and "
                        "base64 text"
                    )
    return tables
