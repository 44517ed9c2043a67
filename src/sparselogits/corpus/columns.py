"""Parquet files, and the Arrow files in which `datasets` keeps datasets: a row is a record.

Only the columns of text are read, in batches of a few rows, so memory is bounded by the largest
page of a Parquet column, or the largest records.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.records import Fields, Where, record_pieces
from sparselogits.corpus.spans import Span
from sparselogits.errors import CorpusError

_BATCH_ROWS = 64

_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_IS_LIST = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)

# Parquet: spans are runs of row groups


def parquet_spans(
    path: Path, file: int, span_bytes: int, name: str, fields: Fields
) -> Iterator[Span]:
    """Runs of row groups whose text takes about `span_bytes`.

    Raises:
        CorpusError: for a file that is no Parquet, or lacks the column.
    """
    with _parquet(path, name) as reader:
        columns = fields.columns(reader.schema_arrow.names, lambda: name)
        _require_text(reader.schema_arrow, columns, name, fields)
        metadata, start, size = reader.metadata, 0, 0
        for group in range(metadata.num_row_groups):
            chunks = map(metadata.row_group(group).column, range(metadata.num_columns))
            size += sum(
                c.total_uncompressed_size for c in chunks if _within(c.path_in_schema, columns)
            )
            if size >= span_bytes or group == metadata.num_row_groups - 1:
                yield Span(file, start, group + 1, size)
                start, size = group + 1, 0


def parquet_pieces(path: Path, name: str, span: Span, fields: Fields) -> Iterator[Piece]:
    """The documents of a run of row groups, one a row."""
    with _parquet(path, name) as reader:
        columns = fields.columns(reader.schema_arrow.names, lambda: name)
        for group in range(span.start, span.stop):
            row = 0
            for batch in _batches(reader, group, columns, name):
                yield from _batch_pieces(batch, columns, f"{name}, row group {group}", row, fields)
                row += batch.num_rows


def parquet_rows(path: Path, name: str) -> Iterator[tuple[dict[str, Any], Where]]:
    """Every row of a file with all of its columns, one at a time, and what names its place.

    Raises:
        CorpusError: for a file that is no Parquet, or damaged.
    """
    with _parquet(path, name) as reader:
        columns = reader.schema_arrow.names
        for group in range(reader.metadata.num_row_groups):
            batches = _batches(reader, group, columns, name)
            yield from _rows(batches, f"{name}, row group {group}")


def _rows(batches: Iterable[pa.RecordBatch], place: str) -> Iterator[tuple[dict[str, Any], Where]]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):

            def where(number: int = number) -> str:
                return f"{place}, row {number}"

            yield batch.slice(row, 1).to_pylist()[0], where
            number += 1


def _within(path: str, columns: list[str]) -> bool:
    """Whether a chunk's path lies in one of the columns: messages have `messages.list...role`."""
    return path in columns or path.partition(".")[0] in columns


def _batches(
    reader: pq.ParquetFile, group: int, columns: list[str], name: str
) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"{name}, row group {group} is damaged ({error}); fetch it anew"
        ) from error


def _parquet(path: Path, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{name} is no readable Parquet file ({error}); fetch it anew") from error


# Arrow: the files of a dataset that `datasets` keeps on disk; spans are runs of record batches


def arrow_spans(
    path: Path, file: int, span_bytes: int, name: str, fields: Fields
) -> Iterator[Span]:
    """Runs of record batches whose text takes about `span_bytes`.

    Raises:
        CorpusError: for a file that is no Arrow stream, or lacks the column.
    """
    start = size = number = 0
    for number, batch in enumerate(_arrow_batches(path, name), start=1):
        columns = fields.columns(batch.schema.names, lambda: name)
        _require_text(batch.schema, columns, name, fields)
        size += sum(batch.column(column).nbytes for column in columns)
        if size >= span_bytes:
            yield Span(file, start, number, size)
            start, size = number, 0
    if start < number:
        yield Span(file, start, number, size)


def arrow_pieces(path: Path, name: str, span: Span, fields: Fields) -> Iterator[Piece]:
    """The documents of a run of record batches, one a row."""
    row = 0
    for number, batch in enumerate(_arrow_batches(path, name)):
        if span.start <= number < span.stop:
            columns = fields.columns(batch.schema.names, lambda: name)
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                part = batch.slice(begin, _BATCH_ROWS)
                yield from _batch_pieces(part, columns, name, row + begin, fields)
        elif number >= span.stop:
            return
        row += batch.num_rows


def arrow_rows(path: Path, name: str) -> Iterator[tuple[dict[str, Any], Where]]:
    """Every row of a file, as `parquet_rows` gives them."""
    return _rows(_arrow_batches(path, name), name)


def _arrow_batches(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    # mapped, so that batches of other spans and other columns are never read
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{name} is no readable Arrow file ({error}); save it anew") from error


def _require_text(schema: pa.Schema, columns: list[str], name: str, fields: Fields) -> None:
    """Refuse a column of text that holds something else, before any of it is read."""
    for column in columns:
        if column != fields.text or fields.completion_only:
            continue  # messages, and what may be either, are looked at record by record
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        # a file in which every value is null says nothing; objects may be messages
        if not any(is_kind(kind) for is_kind in (*_IS_TEXT, pa.types.is_null, _is_objects)):
            raise CorpusError(
                f"{name}: the column `{column}` holds {kind}, not text; name the column that holds "
                f"the text (text_field); the columns are {', '.join(schema.names)}"
            )


def _is_objects(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.JsonType):
        return True
    lists = any(is_list(kind) for is_list in _IS_LIST)
    return lists and (pa.types.is_struct(kind.value_type) or _is_objects(kind.value_type))


def plain(value: Any, kind: pa.DataType, *, decoded: bool = False) -> Any:
    """Return a value of a column as JSON has it.

    Arrow gives every object of a column the fields of all of them, null where an object has none:
    such fields are left out again. What `datasets` keeps as JSON text (its `Json` feature) is
    decoded, and nulls in it stay, since they were written.

    Args:
        value: as `to_pylist` gives it.
        kind: its type.
        decoded: whether JSON text was decoded before, as the rows of `datasets` are.
    """
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return value if decoded or not isinstance(value, str) else json.loads(value)
    if pa.types.is_struct(kind):
        if not isinstance(value, Mapping):
            return value
        inner = {field.name: field.type for field in kind}
        return {
            name: plain(item, inner[name], decoded=decoded) if name in inner else item
            for name, item in value.items()
            if item is not None
        }
    if pa.types.is_map(kind):
        items = value.items() if isinstance(value, Mapping) else value
        return {name: plain(item, kind.item_type, decoded=decoded) for name, item in items}
    if any(is_list(kind) for is_list in _IS_LIST):
        if not isinstance(value, list | tuple):
            return value
        return [plain(item, kind.value_type, decoded=decoded) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


def _batch_pieces(
    batch: pa.RecordBatch, columns: list[str], place: str, row: int, fields: Fields
) -> Iterator[Piece]:
    size = sum(batch.column(column).nbytes for column in columns) // max(batch.num_rows, 1)
    values = [batch.column(column).to_pylist() for column in columns]
    kinds = [batch.schema.field(column).type for column in columns]
    for number, cells in enumerate(zip(*values, strict=True), start=row):

        def where(number: int = number) -> str:
            return f"{place}, row {number}"

        try:
            record = dict(zip(columns, map(plain, cells, kinds), strict=True))
        except ValueError as error:
            raise CorpusError(f"{where()} holds text that is not the JSON of its column") from error
        yield from record_pieces(record, fields, where, size)
