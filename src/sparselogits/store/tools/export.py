"""Export a cache to formats of other tools, one shard at a time, in constant memory.

lists      Parquet with one row per window: tokens, and the ids and weights of each position as
           lists
topk       Parquet with one row per window: tokens, and the K ids with the largest weights at each
           position with the logarithms of their weights, as rectangular arrays for Top-K trainers
datasets   folder for `datasets.load_from_disk`, with the columns of `lists`
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.files import require_new_folder, whole_folder
from sparselogits.progress import Progress
from sparselogits.store.cache import Cache
from sparselogits.store.records import WindowRecord

FORMATS = ("lists", "topk", "datasets")
"""Names of the export formats."""


def export(
    cache: Cache, out: str | Path, form: str, *, k: int = 50, progress: Progress | None = None
) -> list[Path]:
    """Export a cache to another file format.

    Args:
        cache: the cache.
        out: output folder, which must be missing or empty.
        form: output format, one of FORMATS.
        k: entries per position in the format `topk`; positions with fewer entries are padded with
            id 0 and logarithm -inf.
        progress: called with the numbers of windows done and in total.

    Returns:
        Paths of the files, or of the folder for the format `datasets`.

    Raises:
        InvalidArgumentError: the format is unknown, k is below 1, or the folder is not empty.
        CacheError: the cache is empty.
        StorageError: the folder cannot be written; no partial export remains.

    Examples:
        >>> from sparselogits.store import Cache
        >>> len(export(Cache.open("my-cache"), "exported", "lists")) >= 1
        True
    """
    folder = Path(out)
    if form not in FORMATS or k < 1:
        raise InvalidArgumentError(
            f"cannot export to format {form!r} with k={k}; choose one of {', '.join(FORMATS)}, and "
            "k of at least 1"
        )
    require_new_folder(folder)
    if not len(cache):
        raise CacheError(
            f"{cache.root} contains no windows yet; build it with `sparselogits cache` first"
        )
    with whole_folder(folder) as partial:
        if form == "datasets":
            _export_dataset(cache, partial, progress)
            return [folder]
        names = _export_parquet(cache, partial, form, k, progress)
        return [folder / name for name in names]


def _export_parquet(
    cache: Cache, folder: Path, form: str, k: int, progress: Progress | None
) -> list[str]:
    """Write one Parquet file per shard; return the names of the files."""
    names, done = [], 0
    for start, stop in cache.finished():
        name = f"windows-{start:012d}-{stop:012d}.parquet"
        writer = None
        for _ in range(start, stop):
            record = cache.read(done)
            table = _lists(record) if form == "lists" else _top(record, k)
            writer = writer or pq.ParquetWriter(folder / name, table.schema, compression="zstd")
            writer.write_table(table)
            done += 1
            if progress is not None:
                progress(done, len(cache))
        if writer is not None:
            writer.close()
        names.append(name)
    return names


def _export_dataset(cache: Cache, folder: Path, progress: Progress | None) -> None:
    """Save the columns of `lists` as a `datasets` folder.

    The dataset is created from Parquet files, because `Dataset.from_generator` would pickle the
    generator with the caller's progress display.
    """
    from datasets import Dataset  # slow to import

    with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
        names = _export_parquet(cache, Path(work), "lists", 0, progress)
        parts = [f"{work}/{name}" for name in names]
        Dataset.from_parquet(parts, cache_dir=f"{work}/arrow").save_to_disk(str(folder))


def _lists(record: WindowRecord) -> pa.Table:
    """Return the row of a window in the format `lists`."""
    targets = record.targets
    offsets = pa.array(targets.offsets.numpy().astype(np.int32))
    ids = pa.ListArray.from_arrays(offsets, pa.array(targets.ids.numpy().astype(np.int32)))
    weights = pa.ListArray.from_arrays(offsets, pa.array(targets.weights.numpy()))
    return _row(record, {"ids": ids, "weights": weights})


def _top(record: WindowRecord, k: int) -> pa.Table:
    """Return the row of a window in the format `topk`."""
    ids, weights = (part.numpy() for part in record.targets.padded())
    width = max(0, k - ids.shape[1])
    ids = np.pad(ids, ((0, 0), (0, width)))
    weights = np.pad(weights, ((0, 0), (0, width)))
    best = np.argsort(-weights, axis=1, kind="stable")[:, :k]
    with np.errstate(divide="ignore"):
        logs = np.log(np.take_along_axis(weights, best, 1))
    best_ids = np.take_along_axis(ids, best, 1).astype(np.int32)

    def rectangle(values: Any) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), k)

    return _row(record, {"top_ids": rectangle(best_ids), "top_logprobs": rectangle(logs)})


def _row(record: WindowRecord, columns: dict[str, pa.Array]) -> pa.Table:
    """Return a table of one row: index and tokens of a window, and one list per column.

    Args:
        record: the window.
        columns: values by name, one per position.
    """
    whole = {"tokens": pa.array(record.tokens), **columns}
    if record.inputs is not None:
        whole["inputs"] = pa.array(record.inputs)
    arrays = {
        name: pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
        for name, values in whole.items()
    }
    return pa.table({"window_index": pa.array([record.window_index], pa.int64()), **arrays})
