"""Export a cache to the formats of other tools, one window at a time.

lists       Parquet with one row per window: tokens, and the ids and weights of each position as
            lists
topk        Parquet with one row per window: tokens, and the K ids with the largest weights at each
            position with the logarithms of their weights, as rectangular arrays for Top-K trainers
weighted    Parquet with one row per window of N + 1 tokens: input tokens [N], target tokens [N, K]
            and weights [N, K], with K the largest number of entries at a position of the window;
            the inputs of a weighted cross-entropy such as Tinker's
distillkit  Parquet and compression_config.yaml: one row per window of N + 1 tokens: input ids [N]
            and Top-K lists for them in DistillKit's packing, with the logarithms in float32
axolotl     Parquet: Top-K lists as token ids, in the columns of Axolotl's KD plugin
datasets    folder for `datasets.load_from_disk`, with the columns of `lists`

Where the teacher's attention restarts within windows, or windows are padded, `lists`, `topk`,
`weighted` and `datasets` have the column `document_starts`: the positions at which documents and
padding begin.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparselogits.corpus.windows import text_length
from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.files import expanded, require_new_folder, whole_folder
from sparselogits.identity import Identity
from sparselogits.objectives import CAUSAL, IGNORE_INDEX
from sparselogits.progress import Progress
from sparselogits.store.cache import Cache
from sparselogits.store.records import WindowRecord

_TOP_K = ("topk", "distillkit", "axolotl")
"""Formats with k entries per position."""

_K = 50
_NO_LOGPROB = -10_000  # for padding: exp gives 0, and its product with 0 is not NaN

_Array = NDArray[Any]


@dataclass(frozen=True)
class _Settings:
    """Settings on which a row depends in addition to its window."""

    k: int
    alpha: float
    identity: Identity

    def labels(self, record: WindowRecord) -> NDArray[np.int64]:
        """Return the token that each position predicts, int64 [L]; -100 where there is none."""
        if record.inputs is not None:
            raise InvalidArgumentError(
                f"window {record.window_index} has targets of a masked model, which predicts the "
                "tokens themselves; this format is for models that predict the next token. Export "
                "as lists, topk or datasets"
            )
        starts = record.document_starts if self.identity.packing.get("reset_attention") else None
        return CAUSAL.labels(record.tokens, record.mask, starts)

    def document_starts(self, record: WindowRecord) -> dict[str, pa.Array]:
        """Return the column of document starts, if attention restarts or windows are padded."""
        packing = self.identity.packing
        if not packing.get("reset_attention") and packing.get("kind") != "documents":
            return {}
        return {"document_starts": pa.array(record.document_starts.astype(np.int32))}


def export(
    cache: Cache,
    out: str | Path,
    form: str,
    *,
    k: int | None = None,
    alpha: float = 0.0,
    progress: Progress | None = None,
) -> list[Path]:
    """Export a cache to another file format.

    Args:
        cache: the cache.
        out: output folder, which must be missing or empty.
        form: output format, one of FORMATS.
        k: number of entries per position in `topk`, `distillkit` and `axolotl`; None for 50.
            Positions with fewer entries are padded, in `topk` with id 0 and logarithm -inf,
            otherwise with ids of logarithm -10,000.
        alpha: share of the true token in the weights of the format `weighted`, from 0 to 1.
        progress: called with the numbers of windows done and in total.

    Returns:
        Paths of the files, or of the folder for the format `datasets`.

    Raises:
        InvalidArgumentError: the format is unknown, k is below 1 (or, for `distillkit` and
            `axolotl`, above the vocabulary size), alpha is outside of [0, 1], k or alpha is given
            for a format without it, the folder is not empty, or the format cannot represent the
            cache: `distillkit` requires a label at every position but the last one of a window, and
            `weighted`, `distillkit` and `axolotl` require a causal model.
        CacheError: the cache is empty or damaged.
        StorageError: the folder cannot be written, or the cache cannot be reached; no partial
            export remains.

    Examples:
        >>> from sparselogits.store import Cache
        >>> len(export(Cache.open("my-cache"), "exported", "lists")) >= 1
        True
    """
    folder = expanded(out)
    if form not in FORMATS or not 0 <= alpha <= 1 or (k is not None and k < 1):
        raise InvalidArgumentError(
            f"cannot export to format {form!r} with k={_K if k is None else k} and alpha={alpha}; "
            f"choose one of {', '.join(FORMATS)}, k of at least 1, and alpha from 0 to 1"
        )
    if k is not None and form not in _TOP_K:
        raise InvalidArgumentError(
            f"k={k} was given for the format {form!r}, which has all entries of a position; leave "
            f"k out, or choose one of {', '.join(_TOP_K)}"
        )
    if alpha and form != "weighted":
        raise InvalidArgumentError(
            f"alpha={alpha} was given for the format {form!r}, whose targets are those of the "
            "teacher alone; leave alpha out, or choose the format weighted"
        )
    k = _K if k is None else k
    if form in ("distillkit", "axolotl") and k > cache.identity.vocab_size:
        raise InvalidArgumentError(
            f"cannot export {k} different ids of a vocabulary of {cache.identity.vocab_size}; give "
            "a smaller k"
        )
    require_new_folder(folder)
    if not len(cache):
        raise CacheError(
            f"{cache.root} contains no windows yet; build it with `sparselogits cache` first"
        )
    settings = _Settings(k, alpha, cache.identity)
    with whole_folder(folder) as partial:
        if form == "datasets":
            _export_dataset(cache, partial, settings, progress)
            return [folder]
        names = _export_parquet(cache, partial, form, settings, progress)
        if form == "distillkit":
            names.append("compression_config.yaml")
            (partial / names[-1]).write_text(_packing(settings))
        return [folder / name for name in names]


def _export_parquet(
    cache: Cache, folder: Path, form: str, settings: _Settings, progress: Progress | None
) -> list[str]:
    """Write one Parquet file per shard; return the names of the files."""
    names, done = [], 0
    for start, stop in cache.finished():
        name = f"windows-{start:012d}-{stop:012d}.parquet"
        writer = None
        for _ in range(start, stop):
            record = cache.read(done)
            table = _TABLES[form](record, settings)
            writer = writer or pq.ParquetWriter(folder / name, table.schema, compression="zstd")
            writer.write_table(table)
            done += 1
            if progress is not None:
                progress(done, len(cache))
        if writer is not None:
            writer.close()
        names.append(name)
    return names


def _export_dataset(
    cache: Cache, folder: Path, settings: _Settings, progress: Progress | None
) -> None:
    """Save the columns of `lists` as a `datasets` folder."""
    from datasets import Dataset  # slow to import
    from datasets.exceptions import DatasetGenerationError

    # by way of Parquet files, because `Dataset.from_generator` would pickle the progress display
    with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
        names = _export_parquet(cache, Path(work), "lists", settings, progress)
        parts = [f"{work}/{name}" for name in names]
        try:
            dataset = Dataset.from_parquet(parts, cache_dir=f"{work}/arrow")
        except DatasetGenerationError as error:  # does not say that the disk is full
            raise error.__cause__ or error from error
        dataset.save_to_disk(str(folder))


def _lists(record: WindowRecord, settings: _Settings) -> pa.Table:
    """Return the row of a window in the format `lists`."""
    targets = record.targets
    offsets = pa.array(targets.offsets.numpy().astype(np.int32))
    ids = pa.ListArray.from_arrays(offsets, pa.array(targets.ids.numpy().astype(np.int32)))
    weights = pa.ListArray.from_arrays(offsets, pa.array(targets.weights.numpy()))
    return _row(record, settings, {"ids": ids, "weights": weights})


def _heaviest(record: WindowRecord, k: int) -> tuple[_Array, _Array]:
    """Return the k ids of largest weight per position, int32 [L, k], and the weights, float32.

    Padding has id 0 and weight 0.
    """
    ids, weights = (part.numpy() for part in record.targets.padded())
    width = max(0, k - ids.shape[1])
    ids = np.pad(ids, ((0, 0), (0, width)))
    weights = np.pad(weights, ((0, 0), (0, width)))
    best = np.argsort(-weights, axis=1, kind="stable")[:, :k]
    return (
        np.take_along_axis(ids, best, 1).astype(np.int32),
        np.take_along_axis(weights, best, 1),
    )


def _top(record: WindowRecord, settings: _Settings) -> pa.Table:
    """Return the row of a window in the format `topk`."""
    ids, weights = _heaviest(record, settings.k)
    with np.errstate(divide="ignore"):
        logs = np.log(weights)

    def rectangle(values: Any) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), settings.k)

    columns = {"top_ids": rectangle(ids), "top_logprobs": rectangle(logs)}
    return _row(record, settings, columns)


def _weighted(record: WindowRecord, settings: _Settings) -> pa.Table:
    """Return the row of a window in the format `weighted`.

    The last position is omitted, because its next token is in another window.
    """
    labels = settings.labels(record)[:-1]
    ids, weights = (part.numpy()[:-1] for part in record.targets.padded())
    if alpha := settings.alpha:
        ids = np.concatenate([ids, np.maximum(labels, 0)[:, None]], 1)
        share = np.full((len(labels), 1), alpha)
        weights = np.concatenate([(1 - alpha) * weights, share], 1)
    weights = np.where(labels[:, None] == IGNORE_INDEX, 0, weights)
    columns = {
        "input_tokens": pa.array(record.tokens[:-1]),
        "target_tokens": _matrix(ids.astype(np.int32)),
        "weights": _matrix(weights.astype(np.float32)),
        **settings.document_starts(record),
    }
    return _table({"window_index": pa.array([record.window_index], pa.int64())}, columns)


def _padded_heaviest(record: WindowRecord, k: int) -> tuple[_Array, _Array, _Array]:
    """Return k distinct ids per position, logprobs, and whether each weight is positive: [L, k]."""
    ids, weights = _heaviest(record, k)
    real = weights > 0
    for position in np.flatnonzero(~real.all(1)):
        own = ids[position, real[position]]
        others = np.setdiff1d(np.arange(k), own)  # distinct, since readers scatter them into a row
        ids[position, ~real[position]] = others[: k - len(own)]
    logs = np.where(real, np.log(np.where(real, weights, 1)), _NO_LOGPROB)
    return ids, logs.astype(np.float32), real


def _distillkit(record: WindowRecord, settings: _Settings) -> pa.Table:
    """Return the row of a window in the format `distillkit`; ids are packed high bits first.

    The last token is omitted, because DistillKit's loss takes as many targets as input ids, and the
    token that the last position predicts is in another window.
    """
    labels = settings.labels(record)[:-1]
    if (labels == IGNORE_INDEX).any():
        raise InvalidArgumentError(
            f"window {record.window_index} has positions without a target, which DistillKit's "
            "packed rows cannot represent; export as axolotl, topk or weighted"
        )
    ids, logs, _ = _padded_heaviest(record, settings.k)
    bits = (settings.identity.vocab_size - 1).bit_length()
    each = (ids[:-1, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(each.astype(np.uint8).reshape(len(labels), -1), axis=1)
    columns = {
        "input_ids": pa.array(record.tokens[:-1].astype(np.uint64)),
        "compressed_logprobs": _matrix(logs[:-1].astype("<f4").view(np.uint8)),
        "bytepacked_indices": _matrix(packed),
    }
    return _table({}, columns)


def _packing(settings: _Settings) -> str:
    """Return DistillKit's settings for `_distillkit` as JSON, which is valid YAML."""
    values: dict[str, Any] = {
        **{"d": settings.identity.vocab_size, "k": settings.k, "exact_k": settings.k},
        **{"exact_dtype": "float32", "polynomial_terms": None, "term_dtype": "float32"},
        **{"residual_bins": [], "delta_encoding": False, "error_diffusion": False},
        "normalize_t": False,
    }
    return json.dumps(values, indent=1) + "\n"


def _axolotl(record: WindowRecord, settings: _Settings) -> pa.Table:
    """Return the row of a window in the format `axolotl`.

    Labels are those of the tokens, because the plugin shifts them. The plugin does not shift the
    targets: those of position j are for the token that position j predicts. It expects
    probabilities that sum to 1 over the list.
    """
    from sparselogits.documents import restarting_positions  # slow to import

    labels = settings.labels(record)
    ids, logs, real = _padded_heaviest(record, settings.k)
    real &= (labels != IGNORE_INDEX)[:, None]
    mass = np.where(real, np.exp(logs), 0).sum(1, keepdims=True)
    logs = np.minimum(logs - np.log(np.where(mass > 0, mass, 1)), 0)  # 1e-7 by rounding
    logs = np.where(real, logs, np.float32(_NO_LOGPROB))
    packing, length = settings.identity.packing, len(labels)
    starts = record.document_starts if packing.get("reset_attention") else np.empty(0, np.int32)
    before_padding = text_length(packing.get("kind"), record.document_starts, length) or length
    (places,) = restarting_positions(length, [starts]).numpy().astype(np.int32)
    columns = {
        "input_ids": pa.array(record.tokens),
        "labels": pa.array(CAUSAL.at_tokens(labels, IGNORE_INDEX).astype(np.int32)),
        "attention_mask": pa.array((np.arange(length) < before_padding).astype(np.int8)),
        "position_ids": pa.array(places),
        "target_token_ids": _matrix(ids),
        "target_logprobs": _matrix(logs),
        "target_mask": _matrix(real.astype(np.int8)),
    }
    return _table({}, columns)


_TABLES: dict[str, Callable[[WindowRecord, _Settings], pa.Table]] = {
    **{"lists": _lists, "topk": _top, "weighted": _weighted},
    **{"distillkit": _distillkit, "axolotl": _axolotl},
}
FORMATS = (*_TABLES, "datasets")
"""Names of the export formats."""


def _matrix(values: _Array) -> pa.Array:
    """Convert an array [P, K] to P lists of K numbers."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _row(record: WindowRecord, settings: _Settings, columns: dict[str, pa.Array]) -> pa.Table:
    """Return a table of one row: a window's index, tokens, inputs and document starts, and columns.

    Each column is one list.
    """
    index = {"window_index": pa.array([record.window_index], pa.int64())}
    whole = {"tokens": pa.array(record.tokens), **columns, **settings.document_starts(record)}
    if record.inputs is not None:
        whole["inputs"] = pa.array(record.inputs)
    return _table(index, whole)


def _table(single: dict[str, pa.Array], columns: dict[str, pa.Array]) -> pa.Table:
    """Return a table of one row, with the single values and with each column as a list."""
    lists = {
        name: pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
        for name, values in columns.items()
    }
    return pa.table({**single, **lists})
