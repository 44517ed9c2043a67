"""Read Parquet files, and the Arrow files of `datasets`, with one record per row.

Only the required columns are read, a few rows at a time, so memory depends on the largest pages of
the Parquet columns, or on the largest record batch of an Arrow file, not on the size of the file.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparselogits.corpus.formats.format import Format, SourceFile, Span
from sparselogits.corpus.records import TEXT_FIELD, Fields, Record
from sparselogits.errors import CorpusError

_ARROW_FILE = b"ARROW1"  # first bytes of an Arrow file; a stream has none of its own
_BATCH_ROWS = 64

_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_IS_LIST = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)


class Parquet(Format):
    """Format of Parquet files; the unit of a span is a row group."""

    name = "parquet"
    suffixes = (".parquet", ".pq")
    binary = True

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into spans of row groups with about `span_bytes` bytes of data each."""
        with _open_parquet(file) as reader:
            columns = _columns(reader.schema_arrow, file.name, fields)
            metadata, start, size = reader.metadata, 0, 0
            for group in range(metadata.num_row_groups):
                chunks = map(metadata.row_group(group).column, range(metadata.num_columns))
                size += sum(
                    chunk.total_uncompressed_size
                    for chunk in chunks
                    # the chunks of messages have paths such as `messages.list.element.role`
                    if {chunk.path_in_schema, chunk.path_in_schema.partition(".")[0]} & {*columns}
                )
                if size >= span_bytes or group == metadata.num_row_groups - 1:
                    yield Span(file, start, group + 1, size)
                    start, size = group + 1, 0

    def records(self, span: Span, fields: Fields | None) -> Iterator[Record]:
        """Yield the rows in a span of row groups."""
        name = span.file.name
        with _open_parquet(span.file) as reader:
            columns = _columns(reader.schema_arrow, name, fields)
            for group in range(span.start, span.stop):
                place = f"{name}, row group {group}"
                with _arrow_errors(f"{place} is damaged", "download the file again"):
                    batches = reader.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
                    yield from _rows(batches, columns, place, fields)


class Arrow(Format):
    """Format of Arrow files, and of the streams of `datasets`; a span's unit is a record batch."""

    name = "arrow"
    named_suffixes = (".arrow",)
    binary = True

    def spans(self, file: SourceFile, span_bytes: int, fields: Fields | None) -> Iterator[Span]:
        """Divide a file into spans of record batches with about `span_bytes` bytes of data each."""
        start = size = number = 0
        for number, batch in enumerate(_arrow_batches(file), start=1):
            columns = _columns(batch.schema, file.name, fields)
            size += sum(batch.column(column).nbytes for column in columns)
            if size >= span_bytes:
                yield Span(file, start, number, size)
                start, size = number, 0
        if start < number:
            yield Span(file, start, number, size)

    def records(self, span: Span, fields: Fields | None) -> Iterator[Record]:
        """Yield the rows in a span of record batches."""
        name, row = span.file.name, 0
        for number, batch in enumerate(_arrow_batches(span.file)):
            if number >= span.stop:
                return
            if number >= span.start:
                columns = _columns(batch.schema, name, fields)
                yield from _rows([batch], columns, name, fields, row)
            row += batch.num_rows


@contextmanager
def _arrow_errors(what: str, advice: str) -> Iterator[None]:
    """Convert `OSError` and pyarrow's errors within a block to a `CorpusError`."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{what} ({error}); {advice}") from error


def _open_parquet(file: SourceFile) -> pq.ParquetFile:
    with _arrow_errors(f"{file.name} cannot be read as Parquet", "download it again"):
        return pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False)


def _arrow_batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    # memory-mapped, so that other batches and other columns are not read
    with (
        _arrow_errors(f"{file.name} cannot be read as Arrow", "save the dataset again"),
        pa.memory_map(str(file.path)) as source,
    ):
        head = source.read(len(_ARROW_FILE))
        source.seek(0)
        if head == _ARROW_FILE:
            with pa.ipc.open_file(source) as reader:
                yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            with pa.ipc.open_stream(source) as reader:
                yield from reader


def _columns(schema: pa.Schema, name: str, fields: Fields | None) -> list[str]:
    """Return the columns to read, after validating the type of the text column."""
    if fields is None:
        return list(schema.names)
    columns = fields.columns(schema.names, lambda: name)
    # columns that may contain messages are validated per record
    if fields.text in columns and not fields.completion_only and fields.tokens is None:
        kind = schema.field(fields.text).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        # a column of nulls has no type; objects may be messages
        if not any(is_kind(kind) for is_kind in (*_IS_TEXT, pa.types.is_null, _is_objects)):
            raise CorpusError(
                f"{name}: the column `{fields.text}` contains {kind}, not text; give the name of "
                f"the column that contains the text {TEXT_FIELD} out of {', '.join(schema.names)}"
            )
    return columns


def _is_objects(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.JsonType):
        return True
    lists = any(is_list(kind) for is_list in _IS_LIST)
    return lists and (pa.types.is_struct(kind.value_type) or _is_objects(kind.value_type))


def _rows(
    batches: Iterable[pa.RecordBatch],
    columns: list[str],
    place: str,
    fields: Fields | None,
    first: int = 0,
) -> Iterator[Record]:
    """Yield the rows of record batches, converting one row at a time.

    `place` is the name of the file (and row group), and `first` the index of the first row there.
    """
    number = first
    for batch in batches:
        arrays = [batch.column(column) for column in columns]
        size = sum(array.nbytes for array in arrays) // max(batch.num_rows, 1)
        for row in range(batch.num_rows):
            where = partial("{}, row {}".format, place, number)
            if fields is not None and fields.tokens is not None:
                values = [_numbers(array[row]) for array in arrays]
            else:
                values = [array[row].as_py() for array in arrays]
            if fields is not None and fields.tokens is None:
                try:
                    values = [plain(v, a.type) for v, a in zip(values, arrays, strict=True)]
                except ValueError as error:
                    raise CorpusError(
                        f"{where()} contains text that is not JSON, although its column is JSON; "
                        "download or save the file again"
                    ) from error
            yield Record(dict(zip(columns, values, strict=True)), where, size)
            number += 1


def _numbers(scalar: pa.Scalar) -> Any:
    """Return a list of integers or booleans without nulls as a numpy array, others by `as_py`."""
    values = getattr(scalar, "values", None)
    if values is None or values.null_count:
        return scalar.as_py()
    whole = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    return values.to_numpy(zero_copy_only=False) if whole else scalar.as_py()


def plain(value: Any, kind: pa.DataType, *, decoded: bool = False) -> Any:
    """Convert a value from a column: dates and decimals to text, nested values to dicts and lists.

    Arrow adds to every object of a column the fields of all other objects, with null values; fields
    that are null are therefore removed. Columns that `datasets` stores as JSON text (its `Json`
    feature) are decoded with their nulls, which are part of the text; `decoded` states that they
    already are, as in the rows of `datasets`.

    Raises:
        ValueError: a value that is stored as JSON text is not JSON.
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
