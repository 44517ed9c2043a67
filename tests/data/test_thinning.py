"""Test thinning through the dataset: unbiased, on schedule, independent of prefetching."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sparselogits import CacheDataset
from sparselogits.data import (
    Pace,
    Schedule,
    Stage,
    WindowOrder,
    WindowRequest,
    WindowSampler,
    collate,
    rounds_for_entries,
)
from sparselogits.errors import InvalidArgumentError
from sparselogits.targets import thinning_choices

CURRICULUM = Schedule((Stage(3, until=0.5), Stage(5, until_step=8), Stage(12)))


@pytest.mark.parametrize("kept", [1, 4, 5, 7, 11, 12])
def test_a_cycle_of_epochs_is_the_cached_target(cache, kept):
    """Exactly, in integers: counts summed over all starts are the cached ones, times a constant."""
    dataset = CacheDataset(cache, seed=5)
    cached = dataset[3]["targets"]
    choices = thinning_choices(12, kept)
    together = torch.zeros(len(cached), cached.vocab_size, dtype=torch.int64)
    for epoch in range(7, 7 + choices):
        thin = dataset[WindowRequest(3, epoch, kept)]["targets"]
        assert thin.rounds == kept
        thin.__post_init__(True)
        together[thin.positions, thin.ids] += thin.counts
    expected = torch.zeros_like(together)
    expected[cached.positions, cached.ids] = cached.counts.long()
    assert torch.equal(together * 12, expected * (kept * choices))


def test_another_seed_keeps_other_rounds(cache):
    first, second = (
        CacheDataset(cache, seed=seed)[WindowRequest(0, 0, 4)]["targets"].dense() for seed in (1, 2)
    )
    assert not torch.equal(first, second)


@given(
    rounds=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    shares=st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5, unique=True),
    steps=st.integers(1, 400),
)
def test_a_schedule_has_each_stage_in_its_turn(rounds, shares, steps):
    ends = sorted(shares[: len(rounds)])
    schedule = Schedule(tuple(Stage(r, until=e) for r, e in zip(rounds, ends, strict=True)))
    for step in range(steps):
        passed = sum(step >= end * steps for end in ends[:-1])
        assert schedule.rounds_at(step, steps) == rounds[passed]


def test_shares_and_steps_may_be_mixed():
    assert [CURRICULUM.rounds_at(s, 10) for s in range(10)] == [3] * 5 + [5] * 3 + [12] * 2


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((), "at least one stage"),
        ((Stage(0),), "at least one round"),
        ((Stage(1), Stage(2)), "only the last stage"),
        ((Stage(1, until=0.5), Stage(2, until=0.5)), "one after another"),
        ((Stage(1, until=1.5),), "share of training"),
        ((Stage(1, until_step=0), Stage(2)), "at least 1"),
        ((Stage(1, until=0.5, until_step=3),), "not both"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(stages, said):
    with pytest.raises(InvalidArgumentError, match=said):
        Schedule(stages)


def test_what_the_cache_does_not_hold_is_refused():
    with pytest.raises(InvalidArgumentError, match="the cache has 12 rounds"):
        Schedule.constant(13).require_within(12)
    with pytest.raises(InvalidArgumentError, match="not drawn in rounds"):
        Schedule.constant(2).require_within(None)
    with pytest.raises(InvalidArgumentError, match="requires a pace"):
        WindowSampler(WindowOrder(9), thinning=CURRICULUM)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_asks_for_the_rounds_of_its_step(ranks):
    """25 windows, 3 accumulated batches of 2 over ranks: a short last step in each epoch."""
    per_step = 6 * ranks
    pace = Pace(per_step, steps_per_epoch=-(-25 // per_step), steps=2 * -(-25 // per_step))
    schedule = Schedule(tuple(Stage(r + 1, until_step=r + 1) for r in range(pace.steps)))
    order = WindowOrder(25, seed=1)
    for epoch in (0, 1):
        for rank in range(ranks):
            sampler = WindowSampler(
                order, rank=rank, world_size=ranks, thinning=schedule, pace=pace
            )
            sampler.set_epoch(epoch)
            for turn, request in enumerate(sampler):
                step = epoch * pace.steps_per_epoch + turn // 6
                assert request.rounds == step + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_read_ahead_keep_to_the_schedule(cache, workers):
    pace = Pace(4, steps_per_epoch=5, steps=10)
    sampler = WindowSampler(WindowOrder(20), thinning=CURRICULUM, pace=pace)
    sampler.set_epoch(1)
    loader = DataLoader(
        CacheDataset(cache),
        batch_size=4,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    widths = [batch["target_weights"] for batch in loader]
    for weights, rounds in zip(widths, [5, 5, 5, 12, 12], strict=True):
        assert weights.shape[-1] <= rounds
        torch.testing.assert_close(weights * rounds, (weights * rounds).round())


@pytest.mark.parametrize("budget", [1.0, 2.5, 4.0, 6.0])
def test_a_budget_becomes_the_rounds_that_come_closest(cache, budget):
    dataset = CacheDataset(cache)
    chosen = rounds_for_entries(dataset, budget)

    def mean(rounds: int) -> float:
        requests = [WindowRequest(i, 0, rounds) for i in range(len(dataset))]
        return sum(dataset[r]["targets"].entries for r in requests) / (32 * len(dataset))

    # a pilot of 256 positions knows the mean to a few per cent; the neighbours are further off
    assert (
        abs(mean(chosen) - budget)
        <= min(abs(mean(r) - budget) for r in (max(1, chosen - 1), chosen, min(12, chosen + 1)))
        + 0.06 * budget
    )


def test_a_budget_the_cache_cannot_meet_is_refused(cache):
    with pytest.raises(InvalidArgumentError, match="entries in the cache"):
        rounds_for_entries(CacheDataset(cache), 40)
