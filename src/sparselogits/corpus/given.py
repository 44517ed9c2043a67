"""Write records given as Python objects, such as `datasets` objects, to a file for packing.

Packing reads its source from several processes, and again after an interruption; a build may be
resumed days later by a program that creates its records again. So given records are written first,
as JSON lines with only the fields that determine the text, to a file named by the hash of its
content. The fingerprint of the source depends only on the lines written, not on the type of the
object that holds the records.

Writing costs one pass over the records and disk space for their text. For a dataset that exists
unchanged on disk or on the hub, give its path or name instead: its files are then read directly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparselogits.corpus.formats import JsonLines, SourceFile
from sparselogits.corpus.formats.tables import plain
from sparselogits.corpus.records import Fields
from sparselogits.errors import CorpusError
from sparselogits.files import user_cache, writing_whole

Records = Iterable[Mapping[str, Any]]
"""Type of given records: a `datasets.Dataset` or `IterableDataset`, or any iterable of dicts."""


def write_down(records: Records, fields: Fields, folder: Path | None) -> SourceFile:
    """Write records to a JSON lines file that is named by the hash of its content; return the file.

    Args:
        records: at least one record.
        fields: names of the fields to read; only those that determine a record's text or tokens are
            written.
        folder: folder of the file; None for the folder "records" in the user's cache folder.

    Raises:
        CorpusError: `records` is not an iterable of dicts or is empty, a record has no field for
            text, or a value cannot be written as JSON.
        StorageError: the folder cannot be written.
    """
    rows, schema = _plain(records)
    folder, digest = folder or user_cache() / "records", hashlib.sha256()

    def name() -> str:
        return f"records-{digest.hexdigest()}.jsonl"

    with writing_whole(folder / "records.jsonl", name=name) as handle:
        for line in _lines(rows, schema, fields):
            digest.update(line)
            handle.write(line)
    return SourceFile(folder / name(), name(), JsonLines())


def chosen_split(records: Any, split: str) -> Any:
    """Return one split of a `DatasetDict` or other mapping; return any other object unchanged.

    Raises:
        CorpusError: the mapping has no such split. For other objects: `split` is neither "train"
            nor the object's attribute `split`, which a `datasets.Dataset` has.
    """
    if not isinstance(records, Mapping):
        if split not in ("train", getattr(records, "split", None)):
            raise CorpusError(
                f"the given records have no split `{split}`, because they are not divided; remove "
                "split, or give the records of that split"
            )
        return records
    if split not in records:
        names = ", ".join(map(str, records)) or "none"
        raise CorpusError(
            f"the dataset has no split `{split}`; its splits are {names}. Give one of them"
        )
    return records[split]


def _plain(records: Any) -> tuple[Records, pa.Schema | None]:
    """Return the rows and their schema, which is None if the records do not declare types."""
    if hasattr(records, "with_format"):  # a dataset may be set to return tensors or arrays
        features = getattr(records, "features", None)
        if features is None:  # of a mapped stream, where the nulls that Arrow added are unknown
            rows = records.with_format(None)
            return ({n: _without_nulls(v) for n, v in row.items()} for row in rows), None
        return records.with_format(None), features.arrow_schema
    if isinstance(records, Iterable) and not isinstance(records, bytes | bytearray):
        return records, None
    raise CorpusError(
        f"cannot read text from a {type(records).__name__}; give a path, a dataset, or records "
        "(an iterable of dicts)"
    )


def _lines(records: Records, schema: pa.Schema | None, fields: Fields) -> Iterator[bytes]:
    """Yield each record as a line of JSON with the fields that determine its text or tokens."""
    kinds = {field.name: field.type for field in schema} if schema is not None else {}
    number = -1
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise CorpusError(
                f"record {number} is a {type(record).__name__}, not a dict of named fields; give "
                "dicts"
            )
        values = {
            # pandas stores a missing value as NaN
            name: None if isinstance(value, float) and value != value else _plain_lists(value)
            for name, value in record.items()
        }
        chosen = fields.kept(values, partial("record {}".format, number))
        for name in kinds.keys() & chosen.keys():
            chosen[name] = plain(chosen[name], kinds[name], decoded=True)
        try:
            # keys are not sorted: templates write tool calls in the given order
            yield json.dumps(chosen, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:  # for example, an image or half a surrogate pair
            raise CorpusError(
                f"record {number} contains a value that is not text ({error}); remove the value"
            ) from error
    if number < 0:
        raise CorpusError("the dataset is empty: it has no records; give a dataset with text")


def _plain_lists(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):  # values of numpy and torch
        return _plain_lists(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain_lists(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain_lists(item) for name, item in value.items()}
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return value
