"""Test the interactive interface: representations, one position, a batch of windows."""

import pytest
import torch

from sparselogits import CacheDataset, collate


def test_a_cache_says_what_it_holds(cache):
    dataset = CacheDataset(cache)
    facts = dataset.cache.statistics()
    said = repr(dataset)
    for part in (
        f"{len(dataset)} windows of 32 tokens",
        f"{facts.tokens:,} in all",
        f"{facts.entries_per_position:.1f} entries per token",
        "systematic",
        "rounds 12",
        str(dataset.identity.teacher["name"]),
        str(cache),
    ):
        assert part in said
    assert "\n" not in said


def test_targets_say_how_many_and_how_heavy(cache):
    targets = CacheDataset(cache)[0]["targets"]
    assert repr(targets).startswith(f"SparseTargets(32 positions, {targets.entries} entries, ")
    assert "mean mass 1.000" in repr(targets)
    assert "12 rounds" in repr(targets)
    assert repr(targets[:0]) == "SparseTargets(0 positions, 0 entries, 520 ids, 12 rounds)"


def test_one_position_is_its_ids_and_weights(cache):
    targets = CacheDataset(cache)[0]["targets"]
    padded_ids, padded_weights = targets.padded()
    for position, (ids, weights) in enumerate(targets):
        count = len(ids)
        assert ids.equal(padded_ids[position, :count])
        assert weights.equal(padded_weights[position, :count])
        assert not padded_weights[position, count:].any()
    assert position == 31
    assert targets[-1].ids.equal(targets[31].ids)
    assert targets[torch.tensor(2)].ids.equal(targets[2].ids)
    for outside in (32, -33):
        with pytest.raises(IndexError, match="out of range for 32 positions"):
            targets[outside]


def test_a_slice_of_a_cache_is_a_batch(cache):
    dataset = CacheDataset(cache)
    for chosen in (slice(0, 3), slice(-2, None), slice(4, 0, -2)):
        batch = dataset[chosen]
        expected = collate([dataset[i] for i in range(len(dataset))[chosen]])
        assert batch.keys() == expected.keys()
        assert all(batch[name].equal(expected[name]) for name in batch)
    with pytest.raises(IndexError, match="no window"):
        dataset[10**6 :]
