"""Test the histograms of `info`: correct counts from a few row groups, for any size."""

import pytest
import torch

from sparselogits.store import Cache, sample_cache, statistics_by_label
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


def test_statistics_by_label_count_each_position_once(cache):
    opened = Cache.open(cache)
    windows = [opened.read(i) for i in range(6)]
    length = opened.identity.window_length
    # window 0 has one document, window 1 two of one label, the others two labels
    runs = {0: [("a", length)], 1: [("b", 5), ("b", length - 5)]}
    mixed = [("a", 3), (None, 7), ("b", length - 10)]
    found = statistics_by_label(windows, lambda index: runs.get(index, mixed))
    assert set(found) == {"a", "b", None}
    labels = [
        [label for label, n in runs.get(w.window_index, mixed) for _ in range(n)] for w in windows
    ]
    for label, own in found.items():
        chosen = [torch.tensor([each == label for each in row]) for row in labels]
        present = [torch.from_numpy(w.present()) for w in windows]
        assert own.tokens == sum(int(c.sum()) for c in chosen)
        assert own.positions == sum(
            int((c & p).sum()) for c, p in zip(chosen, present, strict=True)
        )
        assert own.entries == sum(
            int(w.targets.entries_per_position[c].sum())
            for w, c in zip(windows, chosen, strict=True)
        )
        assert own.to_json()["mean_mass"] == pytest.approx(1.0)  # rounds sum to one
    assert [found[label].windows for label in ("a", "b", None)] == [1, 1, 0]
    assert found["a"].to_json()["mean_teacher_loss"] == windows[0].teacher_loss
    assert found["b"].to_json()["mean_teacher_entropy"] == windows[1].teacher_entropy
    assert found[None].to_json()["mean_teacher_loss"] is None


def test_as_many_labels_as_tokens_are_counted(cache):
    """As many labels as tokens: one row per label, and each is counted."""
    record = Cache.open(cache).read(0)
    names = iter(range(1 << 20))
    length = len(record.tokens)
    windows = [record] * 500
    found = statistics_by_label(windows, lambda _: [(f"{next(names)}", 1) for _ in range(length)])
    assert len(found) == 500 * length
    assert sum(own.entries for own in found.values()) == 500 * record.targets.entries
