"""Verify a cache, shard by shard.

`verify` checks the guard's checksums, which cover all bytes, Parquet's page checksums, the CRC of
each row, the decoding, the invariants of the targets (ascending ids below V, a target at every
unmasked position, complete rounds, weights consistent with the sampler), the totals in the footers,
the fingerprint of the text, the identity, and that no window is missing. With `sample`, only some
row groups of a shard are read, and the totals and the fingerprint are checked only in a shard whose
rows were all decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from sparselogits.corpus import Window, fingerprint
from sparselogits.corpus.windows import text_length
from sparselogits.errors import (
    CacheCorruptionError,
    InvalidTargetsError,
    SparseLogitsError,
    StorageError,
)
from sparselogits.progress import Progress
from sparselogits.store.cache import Cache
from sparselogits.store.ranges import Range, missing_ranges, shard_name, spread
from sparselogits.store.records import WindowRecord
from sparselogits.store.shard.reader import Shard
from sparselogits.store.storage.memory import FilesInMemory
from sparselogits.store.texts import TextCheck, named_texts

TextOf = Callable[[Range], str | None]
"""Function that returns the fingerprint of the text of a range of windows; None if unavailable."""


@dataclass(frozen=True)
class ShardReport:
    """Result of the verification of one shard.

    Args:
        windows: range of windows in the name of the file.
        name: path of the file, relative to the cache.
        checked: number of windows that were decoded and found sound.
        error: message of the first error; None if the shard is sound.
    """

    windows: Range
    name: str
    checked: int
    error: str | None


@dataclass(frozen=True)
class VerifyReport:
    """Result of the verification of a cache.

    Args:
        shards: one report per shard, in window order.
        missing: ranges of windows that no shard contains, up to the argument `stop` of `verify`, or
            up to the end of the last shard without `stop`.
    """

    shards: tuple[ShardReport, ...]
    missing: tuple[Range, ...]

    @property
    def damaged(self) -> tuple[ShardReport, ...]:
        """Reports of the damaged shards."""
        return tuple(shard for shard in self.shards if shard.error is not None)

    @property
    def ok(self) -> bool:
        """Whether every shard is sound and no window is missing."""
        return not self.damaged and not self.missing


def verify(
    cache: Cache,
    *,
    sample: int | None = None,
    stop: int | None = None,
    text_of: TextOf | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Verify all shards of a cache; damage to shards is reported, not raised.

    Args:
        cache: the cache.
        sample: largest number of row groups to decode per shard, evenly spaced; None for all.
        stop: number of windows that the cache should have; None for the end of the last shard.
        text_of: function that returns the fingerprint of a range's packed text, to be compared with
            the text in the shard's provenance; None to compare nothing.
        progress: called with the numbers of shards done and in total.

    Raises:
        StorageError: a shard cannot be reached.
        CacheCorruptionError: a file in `texts/` is damaged.
        CacheError: two shards overlap.

    Examples:
        >>> from sparselogits.store import Cache
        >>> verify(Cache.open("my-cache")).ok
        True
    """
    ranges = cache.finished()
    reports, texts = [], TextCheck(named_texts(cache.storage))
    for done, windows in enumerate(ranges):
        reports.append(_verify_shard(cache, windows, sample, texts, text_of))
        if progress is not None:
            progress(done + 1, len(ranges))
    if stop is None:
        stop = ranges[-1][1] if ranges else 0
    return VerifyReport(tuple(reports), tuple(missing_ranges(ranges, stop)))


def is_sound(
    cache: Cache, windows: Range, *, others: Iterable[Range] = (), text_of: TextOf | None = None
) -> bool:
    """Return whether one shard is sound; see `verify`.

    If the cache records no texts, the shard's text is compared with those of the sound shards with
    the ranges `others`.

    Raises:
        StorageError: the shard cannot be reached.
        CacheCorruptionError: a file in `texts/` or the footer of another shard is damaged.
    """
    named = named_texts(cache.storage)
    texts = TextCheck(named)
    for other in () if named else others:
        texts.require(other, cache.provenance(other[0]))
    return _verify_shard(cache, windows, None, texts, text_of).error is None


def _verify_shard(
    cache: Cache, windows: Range, sample: int | None, texts: TextCheck, text_of: TextOf | None
) -> ShardReport:
    """Verify one shard; see `verify`."""
    name, checked = shard_name(*windows), 0
    try:
        shard = Shard(cache.storage, name, cache.identity)
        if sample is None:  # read the file once, then decode it from memory
            file = FilesInMemory({name: shard.read_bytes()}, cache.storage.location)
            shard = Shard(file, name, cache.identity)
        rows = []
        for group in spread(shard.groups, shard.groups if sample is None else sample):
            for record in shard.read_group(group):
                _require_sound(shard, record, cache)
                rows.append(_totals(record))
                checked += 1
        if checked == len(shard):
            _require_totals(shard, rows)
        _require_text(shard, windows, texts, text_of)
    except StorageError:  # the shard may be sound
        raise
    except (SparseLogitsError, OSError) as error:
        return ShardReport(windows, name, checked, str(error))
    return ShardReport(windows, name, checked, None)


def _require_text(shard: Shard, windows: Range, texts: TextCheck, text_of: TextOf | None) -> None:
    """Validate that a shard was built from a text of the cache.

    A fingerprint that `text_of` returns must equal that of the provenance, if both exist.
    """
    provenance = shard.description["provenance"]
    try:
        texts.require(windows, provenance)
    except ValueError as error:
        raise CacheCorruptionError(f"{shard.name}: {error}; {_REBUILD}") from error
    expected = None if text_of is None else text_of(windows)
    if expected is not None and provenance.get("corpus", expected) != expected:
        raise CacheCorruptionError(
            f"{shard.name} was built from other text than the packed text of this cache; {_REBUILD}"
        )


def _require_sound(shard: Shard, record: WindowRecord, cache: Cache) -> None:
    """Validate the invariants that decoding does not enforce."""
    targets, where = record.targets, f"{shard.name}, window {record.window_index}"
    try:
        masked = cache.identity.objective is not None
        record.validate(cache.identity.window_length, masked=masked)
        replace(targets, check=True)
    except InvalidTargetsError as error:
        raise CacheCorruptionError(f"{where}: {error}; {_REBUILD}") from error
    length = len(record.tokens)
    end = text_length(cache.identity.packing.get("kind"), record.document_starts, length)
    if end is not None and record.present()[end:].any():
        raise CacheCorruptionError(
            f"{where}: a position of the padding, from {end} on, has a target; {_REBUILD}"
        )
    has_entries = (targets.entries_per_position > 0).numpy()
    wrong = np.flatnonzero(has_entries != record.present())
    if len(wrong):
        what = "is masked but has" if has_entries[wrong[0]] else "has a target but no"
        raise CacheCorruptionError(f"{where}: position {wrong[0]} {what} entries; {_REBUILD}")


_REBUILD = "run `sparselogits repair` on the cache, then build its windows again"


def _totals(record: WindowRecord) -> tuple[int, int, float, float, Window]:
    """Return a window's number of entries, positions with a target, loss, entropy and text."""
    # the mask of a corrupted window marks the chosen tokens and is no part of the text
    mask = record.mask if record.inputs is None else None
    window = Window(record.window_index, record.tokens, record.document_starts, mask)
    positions = int(record.present().sum())
    return record.targets.entries, positions, record.teacher_loss, record.teacher_entropy, window


def _require_totals(shard: Shard, rows: Iterable[tuple[int, int, float, float, Window]]) -> None:
    """Validate the totals in a shard's footer, given the `_totals` of each row."""
    entries, positions, losses, entropies, text = zip(*rows, strict=True)
    recorded = dict(shard.description)
    found: dict[str, object] = {
        "entries": sum(entries),
        "positions": sum(positions),
        "teacher_loss": float(np.mean(np.array(losses, np.float32))),
        "teacher_entropy": float(np.mean(np.array(entropies, np.float32))),
    }
    if "corpus" in recorded["provenance"]:
        recorded["corpus"] = recorded["provenance"]["corpus"]
        found["corpus"] = fingerprint(text)
    for key, value in found.items():
        if recorded[key] != value:
            raise CacheCorruptionError(
                f"{shard.name}: the rows have {key} {value}, expected {recorded[key]} as in the "
                f"footer; {_REBUILD}"
            )
