"""The order is a permutation, differs by epoch, and survives a change of the number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselogits.data import Schedule, WindowOrder, WindowRequest, WindowSampler
from sparselogits.errors import InvalidArgumentError


@given(windows=st.integers(1, 700), seed=st.integers(0, 2**64), epoch=st.integers(0, 50))
def test_every_window_exactly_once(windows: int, seed: int, epoch: int) -> None:
    order = WindowOrder(windows, seed)
    assert sorted(order[epoch, i] for i in range(windows)) == list(range(windows))


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    def line(seed: int, epoch: int) -> list[int]:
        return [WindowOrder(1000, seed)[epoch, i] for i in range(1000)]

    for other in (line(0, 1), line(1, 0)):
        # fixed points of a random permutation are Poisson(1): more than 12 has chance 1e-10
        assert sum(a == b for a, b in zip(line(0, 0), other, strict=True)) <= 12


def test_neighbours_are_scattered() -> None:
    order = WindowOrder(10_000)
    steps = [abs(order[0, i + 1] - order[0, i]) for i in range(1000)]
    assert 2800 < sum(steps) / len(steps) < 3900  # a third of the range, seven standard errors wide


def test_a_position_in_a_vast_order_costs_no_memory() -> None:
    order = WindowOrder(10**12)
    assert 0 <= order[3, 999_999_999_999] < 10**12


@pytest.mark.parametrize(("before", "after"), [(8, 6), (8, 16), (4, 1)])
def test_going_on_with_other_ranks_visits_every_window_once(before: int, after: int) -> None:
    order, steps = WindowOrder(960, seed=3), 37
    seen: Counter[int] = Counter()
    state = {}
    for rank in range(before):
        sampler = WindowSampler(order, rank=rank, world_size=before)
        taken = [request.index for request in list(sampler)[:steps]]
        seen.update(taken)
        state = sampler.state_dict(windows_taken=steps * before)
    rest = 960 - steps * before
    for rank in range(after):
        sampler = WindowSampler(order, rank=rank, world_size=after)
        sampler.load_state_dict(state)
        seen.update(request.index for request in sampler)
    assert set(seen.values()) == {1}
    assert len(seen) == 960 - rest % after


def test_the_epoch_keys_the_noise_unless_frozen() -> None:
    order = WindowOrder(3)
    fresh, frozen = (
        WindowSampler(order, thinning=Schedule.constant(2, fresh_noise=f)) for f in (True, False)
    )
    for sampler in (fresh, frozen):
        sampler.set_epoch(5)
    assert {request.epoch for request in fresh} == {5}
    assert {request.epoch for request in frozen} == {0}
    assert all(isinstance(request, WindowRequest) and request.rounds == 2 for request in fresh)


def test_a_state_of_another_cache_is_refused() -> None:
    state = WindowSampler(WindowOrder(10)).state_dict()
    with pytest.raises(InvalidArgumentError, match="over 10 windows"):
        WindowSampler(WindowOrder(11)).load_state_dict(state)


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one window"):
        WindowOrder(0)
