"""Test the histograms of `info`: correct counts from a few row groups, for any size."""

import torch

from sparselogits.store import Cache, sample_cache
from sparselogits.store.shard.writer import ROWS_PER_GROUP


def test_a_small_cache_is_counted_whole(cache):
    opened = Cache.open(cache)
    records = [opened.read(i) for i in range(len(opened))]
    found = sample_cache(opened, 10_000)
    assert found.windows == found.of == len(opened)
    assert sum(found.entries.counts) == sum(int(record.present().sum()) for record in records)
    assert sum(found.weights.counts) == sum(record.targets.entries for record in records)
    assert sum(found.entropy.counts) == found.windows
    low, high = found.entropy.edges[0], found.entropy.edges[-1]
    entropies = [r.teacher_entropy for r in records]
    assert min(entropies) <= low <= high <= max(entropies) + 1e-3


def test_counts_are_those_of_the_windows_read(cache):
    opened = Cache.open(cache)
    (start, stop), *_ = opened.finished()
    found = sample_cache(opened, 1)
    assert found.windows <= ROWS_PER_GROUP
    groups = -(-(stop - start) // ROWS_PER_GROUP)
    first = groups // 2 * ROWS_PER_GROUP
    records = [opened.read(first + i) for i in range(found.windows)]
    entries = torch.cat([r.targets.entries_per_position for r in records])
    edges = found.entries.edges
    for low, high, count in zip(edges, edges[1:], found.entries.counts, strict=False):
        assert count == int(((entries >= low) & (entries < high)).sum())
    assert sum(found.weights.counts) == int(entries.sum())
    weights = torch.cat([r.targets.weights for r in records])
    assert found.weights.counts[-1] == int((weights.log10() >= -0.5).sum())


def test_a_large_cache_is_not_read(cache, monkeypatch):
    opened = Cache.open(cache)
    asked: list[tuple[str, int, int]] = []
    read = opened.storage.read

    def noted(name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = read(name, start, stop)
        asked.append((name, start, len(data)))
        return data

    monkeypatch.setattr(opened.storage, "read", noted)
    sample_cache(opened, 1)
    assert len(asked) == 1
    assert asked[0][2] < opened.statistics().bytes_on_disk
