"""Test that the order is a permutation, differs per epoch, and is independent of the ranks."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselogits.data import Schedule, WindowOrder, WindowRequest, WindowSampler
from sparselogits.errors import InvalidArgumentError


@given(windows=st.integers(1, 700), seed=st.integers(0, 2**64), epoch=st.integers(0, 50))
def test_every_window_exactly_once(windows, seed, epoch):
    order = WindowOrder(windows, seed)
    assert sorted(order[epoch, i] for i in range(windows)) == list(range(windows))


def test_epochs_and_seeds_give_unrelated_orders():
    def line(seed: int, epoch: int) -> list[int]:
        return [WindowOrder(1000, seed)[epoch, i] for i in range(1000)]

    for other in (line(0, 1), line(1, 0)):
        # fixed points of a random permutation are Poisson(1): more than 12 has chance 1e-10
        assert sum(a == b for a, b in zip(line(0, 0), other, strict=True)) <= 12


def test_neighbours_are_scattered():
    order = WindowOrder(10_000)
    steps = [abs(order[0, i + 1] - order[0, i]) for i in range(1000)]
    assert 2800 < sum(steps) / len(steps) < 3900  # a third of the range, seven standard errors wide


def test_a_position_in_a_vast_order_costs_no_memory():
    order = WindowOrder(10**12)
    assert 0 <= order[3, 999_999_999_999] < 10**12


@pytest.mark.parametrize("windows", [960, 1009])
@pytest.mark.parametrize(("before", "after"), [(8, 6), (8, 16), (4, 1), (1, 7)])
def test_going_on_with_other_ranks_visits_every_window_once(windows, before, after):
    """Each epoch is interrupted on `before` ranks and ended on `after`."""
    order, steps = WindowOrder(windows, seed=3, identity="f00d"), 37
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for rank in range(before):
            sampler = WindowSampler(order, rank=rank, world_size=before, drop_last=False)
            sampler.set_epoch(epoch)
            seen.update(request.index for request in islice(sampler, steps))
        state = json.loads(json.dumps(sampler.state_dict(windows_taken=steps * before)))
        for rank in range(after):
            sampler = WindowSampler(order, rank=rank, world_size=after, drop_last=False)
            sampler.load_state_dict(state)
            taken = [request.index for request in sampler]
            assert len(taken) == len(sampler)
            seen.update(taken)
        assert seen == Counter(range(windows))


@pytest.mark.parametrize("ranks", [1, 6, 8, 16])
def test_ranks_that_wait_for_each_other_get_equally_many(ranks):
    order = WindowOrder(1009, seed=3)
    shares = [
        [request.index for request in WindowSampler(order, rank=rank, world_size=ranks)]
        for rank in range(ranks)
    ]
    assert {len(share) for share in shares} == {1009 // ranks}
    seen = [window for share in shares for window in share]
    assert len(set(seen)) == len(seen)  # none twice, at most ranks - 1 left out


def test_the_epoch_keys_the_noise_unless_frozen():
    order = WindowOrder(3)
    fresh, frozen = (
        WindowSampler(order, thinning=Schedule.constant(2, fresh_noise=f)) for f in (True, False)
    )
    for sampler in (fresh, frozen):
        sampler.set_epoch(5)
    assert {request.epoch for request in fresh} == {5}
    assert {request.epoch for request in frozen} == {0}
    assert all(isinstance(request, WindowRequest) and request.rounds == 2 for request in fresh)


def test_a_state_of_another_cache_is_refused():
    state = WindowSampler(WindowOrder(10)).state_dict()
    with pytest.raises(InvalidArgumentError, match="windows is 10, expected 11"):
        WindowSampler(WindowOrder(11)).load_state_dict(state)
    with pytest.raises(InvalidArgumentError, match="identity is '', expected 'f00d'"):
        WindowSampler(WindowOrder(10, identity="f00d")).load_state_dict(state)
    with pytest.raises(InvalidArgumentError, match="seed is None"):
        WindowSampler(WindowOrder(10)).load_state_dict({})


def test_an_empty_order_is_refused():
    with pytest.raises(InvalidArgumentError, match="at least one window"):
        WindowOrder(0)
