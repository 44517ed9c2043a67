"""Compute histograms and statistics of a cache from a sample of row groups.

A bounded number of row groups is read, spread over as many shards as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from sparselogits.corpus.windows import text_length
from sparselogits.store.cache import Cache
from sparselogits.store.ranges import shard_name, spread
from sparselogits.store.records import WindowRecord
from sparselogits.store.shard.reader import Shard

GROUPS = 16
"""Default number of row groups in a sample."""

_BINS = 8
_LOG_WEIGHT_EDGES = (-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0)


@dataclass(frozen=True)
class Histogram:
    """Histogram with B bins.

    Args:
        edges: B + 1 ascending edges. A bin includes its lower edge; the last bin includes both.
        counts: number of values in each bin; the outer bins also count values beyond the edges.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class CacheSample:
    """Histograms of a sample of windows.

    Args:
        windows: number of windows in the sample.
        of: number of windows in the cache.
        text_share: share of the sample's tokens that are text, not padding; 1 without windows.
        entries: histogram of entries per position with a target.
        weights: histogram of the decimal logarithm of the positive weights.
        entropy: histogram of the teacher's mean entropy per window, in nats.
    """

    windows: int
    of: int
    text_share: float
    entries: Histogram
    weights: Histogram
    entropy: Histogram


def sample_cache(cache: Cache, groups: int = GROUPS) -> CacheSample:
    """Compute histograms of entries, weights and the teacher's entropy from a sample of a cache.

    The sample consists of at most `groups` row groups, spread evenly over the cache.

    Args:
        cache: the cache.
        groups: largest number of row groups to read.

    Raises:
        CacheError: two shards overlap.
        CacheCorruptionError: a shard or row group of the sample is damaged.
        StorageError: the cache cannot be reached.

    Examples:
        >>> from sparselogits.store import Cache
        >>> sample = sample_cache(Cache.open("my-cache"))
        >>> sum(sample.entropy.counts) == sample.windows
        True
    """
    records = list(sampled_windows(cache, groups))
    none = torch.empty(0)
    entries = [
        record.targets.entries_per_position[torch.from_numpy(record.present())]
        for record in records
    ]
    weights = torch.cat([none, *(record.targets.weights for record in records)])
    kind, length = cache.identity.packing.get("kind"), cache.identity.window_length
    text = sum(text_length(kind, r.document_starts, length) or length for r in records)
    return CacheSample(
        windows=len(records),
        of=len(cache),
        text_share=text / (len(records) * length) if records else 1.0,
        entries=_whole_numbers(torch.cat([none, *entries])),
        weights=_histogram(weights[weights > 0].log10(), _LOG_WEIGHT_EDGES),
        entropy=_histogram(torch.tensor([r.teacher_entropy for r in records]), None),
    )


def sampled_windows(cache: Cache, groups: int = GROUPS) -> Iterator[WindowRecord]:
    """Yield the windows of at most `groups` row groups, spread evenly over the cache.

    Raises:
        CacheError: two shards overlap.
        CacheCorruptionError: a shard or row group of the sample is damaged.
        StorageError: the cache cannot be reached.
    """
    ranges = cache.finished()
    chosen = [ranges[i] for i in spread(len(ranges), groups)]
    count = len(chosen)
    for index, shard_range in enumerate(chosen):
        shard = Shard(cache.storage, shard_name(*shard_range), cache.identity)
        # different relative positions in each shard, so that the sample covers all of them
        slots = range(index, groups - groups % count, count)
        for group in sorted({(2 * i + 1) * shard.groups // (2 * groups) for i in slots}):
            yield from shard.read_group(group)


@dataclass(slots=True)
class LabelStatistics:
    """Statistics of the documents with one label in a sample of windows.

    Args:
        tokens: number of tokens, with or without a target.
        positions: number of tokens whose position has a target.
        entries: number of entries at positions with a target.
        mass: sum of all weights at positions with a target.
        windows: number of windows whose documents all have the label.
        teacher_loss: sum of the teacher's mean losses on the windows counted in `windows`, in nats.
        teacher_entropy: sum of the mean entropies on the windows counted in `windows`, in nats.
    """

    tokens: int = 0
    positions: int = 0
    entries: int = 0
    mass: float = 0.0
    windows: int = 0
    teacher_loss: float = 0.0
    teacher_entropy: float = 0.0

    def __iadd__(self, other: LabelStatistics) -> Self:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def to_json(self) -> dict[str, float | int | None]:
        """Return numbers of tokens, positions and windows, and means of the other fields, as JSON.

        Loss and entropy are means over the windows whose documents all have the label. A mean over
        no positions or windows is None.
        """

        def mean(total: float, count: int) -> float | None:
            return total / count if count else None

        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "entries_per_position": mean(self.entries, self.positions),
            "mean_mass": mean(self.mass, self.positions),
            "windows": self.windows,
            "mean_teacher_loss": mean(self.teacher_loss, self.windows),
            "mean_teacher_entropy": mean(self.teacher_entropy, self.windows),
        }


def statistics_by_label(
    windows: Iterable[WindowRecord],
    documents: Callable[[int], Sequence[tuple[str | None, int]]],
) -> dict[str | None, LabelStatistics]:
    """Return the statistics of windows by the label of their documents.

    A position belongs to the document of its token. A cache stores the teacher's loss and entropy
    once per window, so loss and entropy count only for windows whose documents all have one label.

    Args:
        windows: windows of a cache.
        documents: function that returns the label and the number of tokens of each document in a
            window, given the index of the window in the corpus.
    """
    found: dict[str | None, LabelStatistics] = {}
    for window in windows:
        start, runs = 0, documents(window.window_index)
        present = torch.from_numpy(window.present())
        entries, mass = window.targets.entries_per_position, window.targets.mass()
        for label, tokens in runs:
            own = slice(start, start + tokens)
            start += tokens
            found.setdefault(label, LabelStatistics())
            found[label] += LabelStatistics(
                tokens,
                int(present[own].sum()),
                int(entries[own].sum()),
                float(mass[own].sum(dtype=torch.float64)),
            )
        if len({label for label, _ in runs}) == 1:
            loss, entropy = window.teacher_loss, window.teacher_entropy
            found[runs[0][0]] += LabelStatistics(0, 0, 0, 0.0, 1, loss, entropy)
    return found


def _whole_numbers(values: Tensor) -> Histogram:
    """Return a histogram with bins of equal width and integer edges."""
    first = int(values.min()) if len(values) else 0
    last = int(values.max()) + 1 if len(values) else 1
    width = max(1, -(-(last - first) // _BINS))
    return _histogram(values, list(range(first, last + width, width)))


def _histogram(values: Tensor, edges: Sequence[float] | None) -> Histogram:
    """Return a histogram of values; the outer bins also count values beyond the edges.

    If `edges` is None, `_BINS` bins of equal width are used that cover all values.
    """
    if edges is None:
        low = float(values.min()) if len(values) else 0.0
        high = float(values.max()) if len(values) else 1.0
        high = high if high > low else low + 1e-3
        edges = [low + (high - low) * i / _BINS for i in range(_BINS + 1)]
    inner = torch.tensor(edges[1:-1], dtype=torch.float32)
    bin_of = torch.bucketize(values.float(), inner, right=True)
    counts = torch.bincount(bin_of, minlength=len(edges) - 1)
    return Histogram(tuple(map(float, edges)), tuple(counts.tolist()))
