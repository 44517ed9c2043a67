"""Import Top-K logprobs from an inference server or another trainer as a cache.

The result is a cache of the `topk` sampler, whose targets are biased because they lack the tail.
The identity records that the targets were imported and that the teacher's weights, dtype and
quantisation are unknown, so that the cache cannot be confused with a cache of a known teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sparselogits.allowances import refuse
from sparselogits.caching.collected_forms import (
    has_normaliser,
    plain_row,
    settings_of,
    unnormalised,
)
from sparselogits.caching.collected_rows import (
    STARTS,
    Collected,
    entries_per_position,
    fail,
    read_row,
    tokens_of,
)
from sparselogits.corpus import (
    Source,
    Window,
    fingerprint,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.corpus.formats import SourceFile, read_errors
from sparselogits.corpus.locate import locate
from sparselogits.corpus.records import Fields, Where
from sparselogits.errors import CacheError, CorpusError, InvalidArgumentError, require_whole
from sparselogits.files import expanded, require_new_folder, whole_folder
from sparselogits.identity import LARGEST_VOCABULARY, Identity
from sparselogits.objectives import CAUSAL, IGNORE_INDEX
from sparselogits.samplers import TopK
from sparselogits.store import Cache, WindowRecord, codec_for
from sparselogits.store.texts import TextSpan, claim_text
from sparselogits.targets import SparseTargets

_UNKNOWN = "unknown"
_LEAST = 1e-9  # smallest probability of which a logarithm is taken


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Args:
        cache: the open cache.
        rows: number of rows that were read.
        tokens_dropped: number of tokens at the end that did not fill a window.
    """

    cache: Cache
    rows: int
    tokens_dropped: int


def import_collected(
    data: str,
    tokenizer: Any,
    out: str | Path,
    *,
    vocab_size: int,
    teacher: str = "imported",
    window: int | None = None,
    k: int | None = None,
    windows_per_shard: int = 512,
    exact_weights: bool = False,
    compression: Path | None = None,
    allow: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Import rows of Top-K logprobs as a cache.

    `collected_rows` and `collected_forms` describe the formats of a row.

    The rows are concatenated and divided into windows without gaps; attention restarts at the
    beginning of each row, as it did when the teacher was run. Rows are read as a stream, and
    written one shard at a time. The cache appears in the folder when it is complete.

    Args:
        data: path or pattern of JSON Lines or Parquet files, or a folder of such files.
        tokenizer: transformers tokenizer of the teacher.
        out: output folder, which must be missing or empty.
        vocab_size: vocabulary size V, the number of logits per position of the teacher.
        teacher: name of the teacher, if known.
        window: number of tokens per window; None for the length of the first row, which all other
            rows must have.
        k: largest number of entries per position; None for the number in the first row.
        windows_per_shard: number of windows per shard.
        exact_weights: whether to store probabilities as float32 instead of rounding them.
        compression: file with the settings of DistillKit's packing; None for the file
            `compression_config.yaml` next to the data.
        allow: names of `ALLOWANCES`. With "unnormalised-logits", logits are normalised over the K
            listed tokens.
        progress: called after each window with the number of windows done.

    Raises:
        InvalidTargetsError: a row is invalid; the message contains the file and the row.
        CorpusError: the data cannot be read, or have too few tokens for a window; DistillKit's
            settings are invalid; or the tokenizer has no token that can separate documents.
        RecipeError: the file with DistillKit's settings cannot be read as YAML.
        CacheError: `out` is a URL, or a size is above the limit of the format.
        StorageError: `out` cannot be written.
        InvalidArgumentError: `out` is not empty, a size is out of range, or the vocabulary is
            smaller than the tokenizer's; or, without `window`, rows differ in length.
    """
    windows_per_shard = require_whole("windows_per_shard", windows_per_shard, 1)
    vocab_size = require_whole("vocab_size", vocab_size, 1, LARGEST_VOCABULARY)
    if k is not None:
        k = require_whole("k", k, 1)
    if window is not None:
        window = require_whole("window", window, 2)
    if vocab_size < len(tokenizer):
        raise InvalidArgumentError(
            f"the tokenizer has {len(tokenizer)} ids, more than the vocabulary size of "
            f"{vocab_size}; give the number of columns of the teacher's head (vocab_size in its "
            "config.json)"
        )
    if "://" in str(out):
        raise CacheError(
            f"{out} is a URL; import to a folder, then copy the cache with `sparselogits merge`"
        )
    folder = expanded(out).absolute()
    require_new_folder(folder)
    source = Source(data, locate(data, "train").files, Fields())
    rows = _rows(source.files, compression, allow)
    first = next(rows, None)
    if first is None:
        raise CorpusError(f"{data} contains no rows; give files with Top-K logprobs")
    sampler = TopK(entries_per_position(first.values, first.where) if k is None else k)
    length = tokens_of(first.values, first.where) if window is None else window
    tokenizer_hash = tokenizer_fingerprint(tokenizer)
    restarts = window is not None or first.values.get(STARTS) is not None
    packing = packing_for(tokenizer, window_length=length, reset_attention=restarts)
    described = packing.to_json()
    del described["window_length"]
    rule = "as collected" if first.normalised else "as collected, normalised over the listed ids"
    identity = Identity(
        teacher={
            "name": teacher,
            "claimed": teacher,  # compared between identities, unlike the name
            "engine": "imported",
            "weights": _UNKNOWN,
            "dtype": _UNKNOWN,
            "quantization": _UNKNOWN,
        },
        tokenizer=str(tokenizer_hash),
        vocab_size=vocab_size,
        token_mask=_UNKNOWN,
        window_length=length,
        windows_per_shard=windows_per_shard,
        # rows contain their separators, so separator_id is used only to end generated text
        packing=described | {"bos_id": None, "rows": rule},
        sampler={"name": sampler.name, **sampler.parameters()},
        seed=0,
        temperature=1.0,
        codec=codec_for(sampler, exact_weights=exact_weights),
    )
    cutter = _WindowCutter(length, whole_rows=window is None)
    sequences = (
        (_read(row, vocab_size, sampler.k, restarts=restarts), row.where)
        for row in chain([first], rows)
    )
    with whole_folder(folder) as partial:
        cache = Cache.create(partial, identity)
        text = TextSpan(source.fingerprint, 0, None)
        claim_text(cache.storage, text)
        windows = cutter.windows(sequences)
        _commit_all(cache, windows, windows_per_shard, text, tokenizer_hash.record(), progress)
        if not len(cache):
            raise CorpusError(
                f"{data} contains {cutter.left} tokens, too few for a window of {length}; give "
                "more rows, or a shorter window"
            )
    return ImportReport(Cache.open(folder), cutter.rows, cutter.left)


def _read(row: _Row, vocab_size: int, k: int, *, restarts: bool) -> Collected:
    """Return a row as arrays.

    Raises InvalidTargetsError if the row is invalid, or has document starts and `restarts` is
    False.
    """
    if not restarts and row.values.get(STARTS):
        fail(
            row.where,
            f"the row has {STARTS}, but the first row has none, so attention does not restart",
            f"Add {STARTS} to all rows, [] where a row is one document",
        )
    return read_row(row.values, row.where, vocab_size, k)


class _WindowCutter:
    """Converter of a stream of rows to windows, which buffers the rows of one window.

    Args:
        length: number of tokens per window.
        whole_rows: whether each row must be one window.

    Attributes:
        rows: number of rows that were read.
        left: number of tokens that fill no window, after all rows have been read.
    """

    def __init__(self, length: int, *, whole_rows: bool) -> None:
        self.rows = self.left = 0
        self._length, self._whole_rows = length, whole_rows

    def windows(self, sequences: Iterator[tuple[Collected, Where]]) -> Iterator[Collected]:
        """Yield the windows that the rows fill.

        Raises:
            InvalidArgumentError: a row has another length than a window, with `whole_rows`.
        """
        waiting: list[Collected] = []
        for sequence, where in sequences:
            self.rows += 1
            if self._whole_rows and len(sequence) != self._length:
                raise InvalidArgumentError(
                    f"{where()} has {len(sequence)} tokens, expected {self._length} as in the rows "
                    "before; give the number of tokens per window (--window) to pack the rows"
                )
            waiting.append(sequence)
            self.left += len(sequence)
            if self.left < self._length:
                continue
            joined, stop = Collected.cat(waiting), 0
            for stop in range(self._length, self.left + 1, self._length):
                yield joined.cut(stop - self._length, stop)
            waiting = [joined.cut(stop, self.left)]
            self.left -= stop


def _commit_all(
    cache: Cache,
    windows: Iterator[Collected],
    windows_per_shard: int,
    text: TextSpan,
    tokenizer: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> None:
    """Write all windows to a cache, one shard at a time."""
    records: list[WindowRecord] = []

    def commit() -> None:
        tokens = [Window(r.window_index, r.tokens, r.document_starts, r.mask) for r in records]
        provenance = {
            "corpus": fingerprint(tokens),
            "text": text.to_json(),
            "sparselogits": version("sparselogits"),
            "tokenizer": tokenizer,
        }
        cache.commit(records, provenance)
        records.clear()

    for index, window in enumerate(windows):
        records.append(_record(index, window, cache.identity.vocab_size))
        if len(records) == windows_per_shard:
            commit()
        if progress is not None:
            progress(index + 1)
    if records:
        commit()


def _record(index: int, window: Collected, vocab_size: int) -> WindowRecord:
    """Return the record of a window, with loss and entropy from `_loss_and_entropy`."""
    offsets = np.append(0, np.cumsum(window.lengths))
    targets = SparseTargets(
        torch.from_numpy(window.ids),
        torch.from_numpy(window.weights),
        torch.from_numpy(offsets),
        vocab_size,
    )
    present = window.lengths > 0
    loss, entropy = _loss_and_entropy(window)
    return WindowRecord(
        window_index=index,
        tokens=window.tokens,
        document_starts=np.flatnonzero(window.starts).astype(np.int32),
        mask=None if present.all() else present,
        targets=targets,
        teacher_loss=loss,
        teacher_entropy=entropy,
    )


def _loss_and_entropy(window: Collected) -> tuple[float, float]:
    """Return the mean loss and entropy on a window, in nats, computed from the listed entries.

    The missing mass counts as one class, and as the probability of a label that is not listed, so
    the results are lower bounds for the teacher. They are not if logits without their normaliser
    were normalised over the listed ids.
    """
    count = len(window)
    owner = np.repeat(np.arange(count), window.lengths)
    p = window.weights.astype(np.float64)
    missing = np.clip(1 - np.bincount(owner, p, minlength=count), _LEAST, 1)
    surprise = -p * np.log(np.maximum(p, _LEAST))
    entropies = np.bincount(owner, surprise, minlength=count) - missing * np.log(missing)
    present = window.lengths > 0
    labels = CAUSAL.labels(window.tokens, present, np.flatnonzero(window.starts))
    likelihood = missing.copy()
    listed = window.ids == labels[owner]
    likelihood[owner[listed]] = np.maximum(p[listed], _LEAST)
    losses = -np.log(likelihood[labels != IGNORE_INDEX])
    return (
        float(losses.mean()) if len(losses) else 0.0,
        float(entropies[present].mean()) if present.any() else 0.0,
    )


class _Row(NamedTuple):
    """Row of a file: its columns, its location, and whether its probabilities are normalised."""

    values: Mapping[str, Any]
    where: Where
    normalised: bool


def _rows(
    files: Sequence[SourceFile], compression: Path | None, allow: Collection[str]
) -> Iterator[_Row]:
    """Yield the rows of JSON Lines and Parquet files, converted by `plain_row`.

    Raises:
        CorpusError: a file cannot be read, or has no records; or DistillKit's settings are invalid.
        RecipeError: the file with DistillKit's settings cannot be read as YAML.
        InvalidTargetsError: a row is invalid, only some rows are normalised, or logits are not
            normalised and this is not allowed.
    """
    first: bool | None = None
    for file in files:
        if not file.format.holds_records or file.format.holds_tokens:
            raise CorpusError(
                f"{file.path} has no records; give .jsonl or .parquet files with Top-K logprobs"
            )
        packing = settings_of(file.path.parent, compression)
        with read_errors(file.path):
            spans = file.format.spans(file, 1 << 62, None)
            for record in chain.from_iterable(file.format.records(span, None) for span in spans):
                normalised = has_normaliser(record.values)
                if first is None:
                    first = normalised
                    if not normalised:
                        refuse(unnormalised(record.where), "unnormalised-logits", allow)
                if normalised != first:
                    fail(
                        record.where,
                        "only one of this row and the first row has logits without their "
                        "normaliser, but a cache records one rule for all rows",
                        "Import the two kinds as two caches",
                    )
                row = plain_row(record.values, record.where, packing)
                yield _Row(row, record.where, normalised)
