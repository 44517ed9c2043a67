"""Encode the windows of a range as a Parquet file in memory: a shard.

Any Parquet reader that supports zstd and byte-stream-split integers can open a shard. Rows are
windows, eight per row group. Each row contains a CRC32C of its values, so that a row remains
verifiable in other tools, and a guard covers the whole file (guard.py).
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparselogits.identity import CAUSAL_FORMAT, MASKED_FORMAT, Identity, canonical_json
from sparselogits.store.codec.target_codec import TargetCodec, TargetWindow
from sparselogits.store.ranges import shard_name
from sparselogits.store.records import Int32, WindowRecord
from sparselogits.store.shard.guard import insert_guard

ROWS_PER_GROUP = 8
"""Number of windows per row group; the last row group of a shard may have fewer."""

METADATA_KEY = b"sparselogits"
"""Key of the JSON description in the footer's key-value metadata."""

_IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))
_CAUSAL = pa.schema(
    [
        pa.field("window_index", pa.int64(), nullable=False),
        pa.field("tokens", _IDS, False),
        pa.field("document_starts", _IDS, False),
        pa.field("mask", pa.list_(pa.field("element", pa.bool_(), nullable=False)), True),
        pa.field("targets", pa.binary(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("teacher_loss", pa.float32(), nullable=False),
        pa.field("teacher_entropy", pa.float32(), nullable=False),
    ]
)
SCHEMAS = {
    CAUSAL_FORMAT: _CAUSAL,
    MASKED_FORMAT: _CAUSAL.append(pa.field("inputs", _IDS, False)).append(
        pa.field("rate", pa.float32(), nullable=False)
    ),
}
"""Parquet schemas of shards, by format version."""

COMPRESSED = ("tokens", "inputs")
"""Names of the columns with zstd compression and byte-stream-split encoding; others are plain."""


def encode_shard(
    identity: Identity, records: Sequence[WindowRecord], provenance: Mapping[str, Any]
) -> tuple[str, bytes]:
    """Encode records of consecutive windows as a shard; return the name and content of the file.

    The result depends only on the arguments and the versions of pyarrow and pcodec.

    Raises:
        InvalidTargetsError: the codec of the identity cannot encode a record's targets.
    """
    first, stop = records[0].window_index, records[0].window_index + len(records)
    codec = TargetCodec.of(identity)
    tables, blocks = codec.encode([TargetWindow(r.targets, r.tokens, r.present()) for r in records])
    description = {
        "format_version": identity.format_version,
        "fingerprint": identity.fingerprint,
        "start": first,
        "stop": stop,
        "positions": int(sum(r.present().sum() for r in records)),
        "entries": sum(r.targets.entries for r in records),
        "teacher_loss": float(np.mean([np.float32(r.teacher_loss) for r in records])),
        "teacher_entropy": float(np.mean([np.float32(r.teacher_entropy) for r in records])),
        "tables": {
            name: [[start, base64.b64encode(table).decode()] for start, table in column]
            for name, column in tables.items()
        },
        "provenance": dict(provenance),
    }
    table = _table(SCHEMAS[identity.format_version], records, blocks)
    parquet = _write_parquet(table, canonical_json(description))
    metadata = pq.read_metadata(io.BytesIO(parquet))
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    last_columns = [group.column(group.num_columns - 1) for group in groups]
    stops = [column.data_page_offset + column.total_compressed_size for column in last_columns]
    return shard_name(first, stop), insert_guard(parquet, stops)


def _table(schema: pa.Schema, records: Sequence[WindowRecord], blocks: Sequence[bytes]) -> pa.Table:
    """Return the records of a shard as a table, given the encoded targets of each."""
    columns: dict[str, list[Any]] = {
        "window_index": [r.window_index for r in records],
        "tokens": [r.tokens for r in records],
        "document_starts": [r.document_starts for r in records],
        "mask": [r.mask for r in records],
        "targets": list(blocks),
        "crc32c": [row_crc(r, block) for r, block in zip(records, blocks, strict=True)],
        "teacher_loss": [np.float32(r.teacher_loss) for r in records],
        "teacher_entropy": [np.float32(r.teacher_entropy) for r in records],
        "inputs": [hidden_inputs(r) for r in records],
        "rate": [r.rate for r in records],
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def hidden_inputs(record: WindowRecord) -> Int32 | None:
    """Return the inputs at the positions with a target, int32 [Q]; None for a causal objective."""
    return None if record.inputs is None else record.inputs[record.present()]


def _write_parquet(table: pa.Table, description: bytes) -> bytes:
    """Return a table and a JSON description as a Parquet file."""
    out = io.BytesIO()
    compressed = [f"{name}.list.element" for name in COMPRESSED if name in table.column_names]
    with pq.ParquetWriter(
        out,
        table.schema,
        compression=dict.fromkeys(compressed, "zstd"),
        compression_level=dict.fromkeys(compressed, 9),
        use_dictionary=False,
        use_byte_stream_split=compressed,
        write_statistics=["window_index"],
        write_page_checksum=True,
        data_page_size=1 << 24,
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        writer.add_key_value_metadata({METADATA_KEY: description})
    return out.getvalue()


def row_crc(record: WindowRecord, block: bytes | memoryview) -> int:
    """Return the CRC32C of all values of a row, whose encoded targets are `block`."""
    mask = b"" if record.mask is None else record.mask.astype(np.uint8).tobytes()
    parts: tuple[bytes, ...] = (
        struct.pack("<qI", record.window_index, len(record.tokens)),
        record.tokens.astype("<i4").tobytes(),
        struct.pack("<I", len(record.document_starts)),
        record.document_starts.astype("<i4").tobytes(),
        struct.pack("<I", len(mask)),
        mask,
        struct.pack("<ffI", record.teacher_loss, record.teacher_entropy, len(block)),
        bytes(block),
    )
    hidden = hidden_inputs(record)
    if hidden is not None:
        parts += (struct.pack("<I", len(hidden)), hidden.astype("<i4").tobytes())
        parts += (struct.pack("<f", record.rate),)
    return int(google_crc32c.value(b"".join(parts)))
