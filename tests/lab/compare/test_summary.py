"""Test the metrics of a comparison against an independent calculation.

Nothing is trained: recipe, setting and plan are real, what the runs found is made up. Three seeds
and three windows leave 27 resamples of each, all equally likely, so that the ends of a bootstrap
are known without drawing.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from sparselogits.evaluate import METRICS, Drafting
from sparselogits.evaluate.calibration import measure_calibration
from sparselogits.lab.compare import parse_compare_recipe
from sparselogits.lab.compare.caches import Setting, prepare
from sparselogits.lab.compare.comparison import ComparisonState
from sparselogits.lab.compare.finished import FinishedWork
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.results import Ends, MethodRow
from sparselogits.lab.compare.runs import Outcome, Planned, plan
from sparselogits.lab.compare.summary import PAIRED, Run, method_rows, run_rows

METHODS: list[Any] = [
    {"method": "full", "alpha": 0.5},  # not what the gap is measured to
    "ce",
    {"sampler": "topk", "k": 3},
    "full",
]
CE, OWN, FULL, MIXED = "CE", "Top-K 3", "full KD", "full KD, alpha 0.5"
COUNTS = (10, 20, 33)  # positions of the windows: a mean over them is no mean of windows
T_THREE, T_TWO = 4.302653, 12.706205  # 97.5 % of Student's t with two degrees, and with one
RESAMPLES = 4000
SURE = 5 * math.sqrt(0.025 * 0.975 / RESAMPLES)  # five deviations of a tail's share

Losses = Mapping[int, Sequence[float]]
"""Mean loss of each window, by seed."""


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> CompareRecipe:
    folder = tmp_path_factory.mktemp("summary")
    own = {"seeds": [0, 1, 2], "resamples": RESAMPLES, "methods": METHODS}
    return parse_compare_recipe(tiny(folder, **own), source="test")


@pytest.fixture(scope="module")
def setting(recipe) -> Setting:
    return prepare(recipe, FinishedWork(recipe.out))


@pytest.fixture(scope="module")
def planned(recipe, setting) -> list[Planned]:
    return plan(recipe, setting)


def outcome(windows: Sequence[float], **changes: Any) -> Outcome:
    """Of windows with these mean losses; the other figures are made of the losses, alike."""
    sums = [[loss * count, count] for loss, count in zip(windows, COUNTS, strict=True)]
    # two bins, of which one is too sure and one not sure enough
    gaps = [[total / 10, -total / 20, count] for total, count in sums]
    binned = ("ece", "ece_equal_mass", "overconfidence")
    made = Outcome(
        fingerprint="",
        figures={"loss": mean_loss(windows)},
        sums={name: gaps if name in binned else sums for name in METRICS},
        reliability={"equal_width": [], "equal_mass": []},
        drafting=None,
        curve=[(1, 3.0)],
        entries=None,
        steps=5,
        tokens=1280,
        seconds=2.0,
        cpu_seconds=4.0,
    )
    return replace(made, **changes)


def runs_of(planned: Sequence[Planned], found: Mapping[str, Mapping[int, Outcome]]) -> list[Run]:
    """All runs of the plan, done where there is an outcome for method and seed."""
    runs = []
    for own in planned:
        done = found.get(own.method.title, {}).get(own.seed)
        done = None if done is None else replace(done, fingerprint=own.fingerprint)
        runs.append(Run(own, done, None))
    return runs


def trained(losses: Mapping[str, Losses]) -> dict[str, dict[int, Outcome]]:
    """Outcomes by method and seed."""
    return {
        title: {seed: outcome(windows) for seed, windows in own.items()}
        for title, own in losses.items()
    }


@pytest.fixture
def summed(
    recipe, setting, planned
) -> Callable[[Mapping[str, Mapping[int, Outcome]]], dict[str, MethodRow]]:
    def rows(found: Mapping[str, Mapping[int, Outcome]]) -> dict[str, MethodRow]:
        made = method_rows(runs_of(planned, found), recipe, setting, {})
        return {row.method: row for row in made}

    return rows


def mean_loss(windows: Iterable[float], times: Sequence[int] = (1, 1, 1)) -> float:
    """Over all positions, each window so many times."""
    drawn = [n * count for n, count in zip(times, COUNTS, strict=True)]
    return sum(loss * n for loss, n in zip(windows, drawn, strict=True)) / sum(drawn)


Measured = Callable[[int, Sequence[int]], float]
"""Function that returns a metric of one seed, given the weight of each window."""


def resampled(
    own: Measured, other: Measured | None = None
) -> list[tuple[list[float], list[float]]]:
    """Numerators and denominators of all seeds in each of the 27 resamples of the windows."""
    found = []
    for windows in itertools.product(range(3), repeat=3):
        times = [windows.count(w) for w in range(3)]
        below = [1.0 if other is None else other(seed, times) for seed in range(3)]
        found.append(([own(seed, times) for seed in range(3)], below))
    return found


def over_windows(own: Measured, other: Measured | None = None) -> list[float]:
    """The mean over seeds, or the ratio of two means, in each resample of the windows."""
    return [sum(above) / sum(below) for above, below in resampled(own, other)]


def assert_both(
    found: Ends, own: Measured, other: Measured | None = None, scale: float = 1
) -> None:
    """2.5 % of Student's t distribution, averaged over the resamples, lies beyond each end.

    With two degrees of freedom its distribution is 1/2 + t / (2 sqrt(2 + t^2)).
    """
    assert found.low is not None
    assert found.high is not None
    for end, expected in ((found.low / scale, 0.025), (found.high / scale, 0.975)):
        shares = []
        for above, below in resampled(own, other):
            left = [end * b - a for a, b in zip(above, below, strict=True)]
            t = statistics.fmean(left) / (statistics.stdev(left) / math.sqrt(3))
            shares.append(0.5 + t / (2 * math.sqrt(2 + t * t)))
        # of the drawn resamples each of the 27 has a share that is binomial
        assert statistics.fmean(shares) == pytest.approx(expected, abs=SURE)


def assert_ends(found: Ends, resamples: Sequence[float]) -> None:
    """Both lie where 2.5 % of all resamples are beyond them, but for the chance of the draw."""
    assert found.low is not None
    assert found.high is not None
    for end, sign in ((found.low, 1), (found.high, -1)):
        least = 1e-9 * abs(end)
        beyond = sum(sign * (own - end) < -least for own in resamples) / len(resamples)
        up_to = sum(sign * (own - end) <= least for own in resamples) / len(resamples)
        assert beyond <= 0.025 + SURE
        assert up_to >= 0.025 - SURE


def assert_t(found: Ends, values: Sequence[float], quantile: float) -> None:
    mean = statistics.fmean(values)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    assert found.low == pytest.approx(mean - half, rel=1e-5)
    assert found.high == pytest.approx(mean + half, rel=1e-5)


# Seeds far apart and close together in what a method changes; windows likewise: an interval that
# does not pair them is many times as wide.
BASE: Losses = {0: (3.0, 4.0, 6.0), 1: (5.0, 6.5, 8.0), 2: (9.0, 10.0, 13.0)}
GAIN: Losses = {0: (0.20, 0.30, 0.25), 1: (0.32, 0.41, 0.30), 2: (0.27, 0.50, 0.36)}
WHOLE: Losses = {0: (0.50, 0.70, 0.40), 1: (0.60, 0.55, 0.90), 2: (0.80, 0.95, 0.65)}


def less(gain: Losses, base: Losses = BASE) -> Losses:
    return {
        seed: [loss - own for loss, own in zip(base[seed], gain[seed], strict=True)]
        for seed in gain
    }


LOSSES = {CE: BASE, OWN: less(GAIN), FULL: less(WHOLE), MIXED: {seed: [1.0] * 3 for seed in BASE}}


def test_figures_are_means_over_positions_and_seeds(summed):
    row = summed(trained(LOSSES))[OWN]
    of_seeds = [mean_loss(LOSSES[OWN][seed]) for seed in range(3)]
    assert row.figures.keys() == set(METRICS)
    for name in ("loss", "kl", "acceptance", "agreement"):
        found = row.figures[name]
        assert found.mean == pytest.approx(statistics.fmean(of_seeds))
        assert_t(found.seeds, of_seeds, T_THREE)
        assert_ends(found.windows, over_windows(own_loss))
        assert_both(found.both, own_loss)
    # |gap| of both bins, and their sum: 1/10 + 1/20 and 1/10 - 1/20 of the loss
    assert row.figures["ece"].mean == pytest.approx(0.15 * statistics.fmean(of_seeds))
    assert row.figures["ece_equal_mass"] == row.figures["ece"]
    assert row.figures["overconfidence"].mean == pytest.approx(0.05 * statistics.fmean(of_seeds))


def own_loss(seed: int, times: Sequence[int]) -> float:
    return mean_loss(LOSSES[OWN][seed], times)


def test_minus_ce_is_paired_by_seed_and_window(summed):
    rows = summed(trained(LOSSES))
    assert rows[CE].minus_ce == {}
    found = rows[OWN].minus_ce
    assert found.keys() == set(PAIRED)

    def difference(seed: int, times: Sequence[int]) -> float:
        return -mean_loss(GAIN[seed], times)

    of_seeds = [difference(seed, (1, 1, 1)) for seed in range(3)]
    for name, share in (("loss", 1.0), ("kl", 1.0), ("acceptance", 1.0), ("ece", 0.15)):
        own = found[name]
        assert own.mean == pytest.approx(share * statistics.fmean(of_seeds))
        assert_t(own.seeds, [share * value for value in of_seeds], T_THREE)
        assert_ends(own.windows, [share * value for value in over_windows(difference)])
        assert_both(own.both, difference, scale=share)


def test_what_windows_share_and_what_seeds_share_has_no_width(summed):
    """A gain alike in all windows leaves the t interval, one alike in all seeds the bootstrap."""
    by_seed = {0: [0.1] * 3, 1: [0.4] * 3, 2: [0.2] * 3}
    own = summed(trained({CE: BASE, OWN: less(by_seed)}))[OWN].minus_ce["loss"]
    assert (own.windows.low, own.windows.high) == pytest.approx((own.mean, own.mean))
    assert (own.both.low, own.both.high) == pytest.approx((own.seeds.low, own.seeds.high))
    assert_t(own.seeds, [-0.1, -0.4, -0.2], T_THREE)
    by_window = {seed: [0.1, 0.4, 0.2] for seed in range(3)}
    own = summed(trained({CE: BASE, OWN: less(by_window)}))[OWN].minus_ce["loss"]
    assert own.mean == pytest.approx(-(1.0 + 8.0 + 6.6) / 63)
    assert (own.seeds.low, own.seeds.high) == pytest.approx((own.mean, own.mean))
    assert (own.windows.low, own.windows.high) == pytest.approx((-0.4, -0.1))
    assert (own.both.low, own.both.high) == pytest.approx((-0.4, -0.1))


def test_gap_closed_is_a_ratio_of_means_over_seeds(summed):
    rows = summed(trained(LOSSES))

    def gain(seed: int, times: Sequence[int]) -> float:
        return mean_loss(GAIN[seed], times)

    def whole(seed: int, times: Sequence[int]) -> float:
        return mean_loss(WHOLE[seed], times)

    once = (1, 1, 1)
    gains, wholes = ([own(seed, once) for seed in range(3)] for own in (gain, whole))
    found = rows[OWN].gap_closed
    assert found.mean == pytest.approx(100 * sum(gains) / sum(wholes))
    for end in (found.seeds.low, found.seeds.high):  # Fieller: a t test just rejects this ratio
        left = [g - end / 100 * w for g, w in zip(gains, wholes, strict=True)]
        t = statistics.fmean(left) / (statistics.stdev(left) / math.sqrt(3))
        assert abs(t) == pytest.approx(T_THREE, rel=1e-5)
    assert found.seeds.low < found.mean < found.seeds.high
    assert_ends(found.windows, [100 * share for share in over_windows(gain, whole)])
    assert_both(found.both, gain, whole, scale=100)
    assert rows[CE].gap_closed.mean == pytest.approx(0, abs=1e-9)
    assert rows[FULL].gap_closed.mean == pytest.approx(100)


@pytest.mark.parametrize(
    "whole",
    [
        {seed: [-own for own in WHOLE[seed]] for seed in WHOLE},  # worse than CE
        {0: [0.5] * 3, 1: [0.5] * 3, 2: [-0.1] * 3},  # better on average, but one seed in three
        {seed: [-0.1, 0.6, 0.7] for seed in WHOLE},  # or one window
    ],
)
def test_a_gap_that_may_be_none_is_not_closed(summed, whole):
    rows = summed(trained({CE: BASE, OWN: less(GAIN), FULL: less(whole)}))
    assert [rows[title].gap_closed for title in (CE, OWN, FULL)] == [None] * 3
    assert rows[OWN].minus_ce["loss"].mean < 0


def test_only_seeds_that_all_have_are_compared(summed):
    """By the seed, not by the place among those done: the first that CE has is not the method's."""
    losses = {
        CE: {seed: BASE[seed] for seed in (1, 2)},
        OWN: {seed: LOSSES[OWN][seed] for seed in (0, 2)},
    }
    rows = summed(trained({**losses, FULL: {0: LOSSES[FULL][0]}}))
    own = rows[OWN].minus_ce["loss"]
    assert own.mean == pytest.approx(-mean_loss(GAIN[2]))
    assert (own.seeds.low, own.seeds.high) == (None, None)  # one seed says nothing of others
    assert own.both == own.windows
    assert rows[OWN].gap_closed is None  # full KD has seed 0 alone
    assert rows[OWN].figures["loss"].mean == pytest.approx(
        (mean_loss(LOSSES[OWN][0]) + mean_loss(LOSSES[OWN][2])) / 2
    )
    assert (rows[OWN].seeds_done, rows[OWN].seeds_not_run) == ([0, 2], [1])
    full = summed(trained({**losses, FULL: {seed: LOSSES[FULL][seed] for seed in (0, 1, 2)}}))
    assert full[OWN].gap_closed.mean == pytest.approx(
        100 * mean_loss(GAIN[2]) / mean_loss(WHOLE[2])
    )
    of_two = [-mean_loss(WHOLE[seed]) for seed in (1, 2)]
    assert_t(full[FULL].minus_ce["loss"].seeds, of_two, T_TWO)


def test_a_run_has_the_gap_of_its_own_seed(recipe, planned):
    losses = {
        CE: {seed: BASE[seed] for seed in (0, 1)},
        OWN: LOSSES[OWN],
        FULL: {0: LOSSES[FULL][0], 1: [20.0] * 3, 2: LOSSES[FULL][2]},  # it lost to CE in one
    }
    rows = {
        (row.method, row.seed): row for row in run_rows(runs_of(planned, trained(losses)), recipe)
    }
    gap = 100 * mean_loss(GAIN[0]) / mean_loss(WHOLE[0])
    assert rows[OWN, 0].gap_closed == pytest.approx(gap)
    assert rows[CE, 0].gap_closed == pytest.approx(0, abs=1e-9)
    assert rows[FULL, 0].gap_closed == pytest.approx(100)
    assert [rows[OWN, seed].gap_closed for seed in (1, 2)] == [None, None]  # lost, and no CE
    assert [rows[CE, seed].status for seed in (0, 1, 2)] == ["done", "done", "not run"]
    assert {row.status for row in rows.values() if row.method == MIXED} == {"not run"}
    assert all(rows[OWN, seed].figures["loss"] == mean_loss(LOSSES[OWN][seed]) for seed in range(3))


def test_drafts_of_all_seeds_count_as_one(summed, recipe, planned):
    """Each verified token's probability stands for itself, whichever seed it is of."""
    probabilities = {0: [0.9] * 4, 2: [0.2, 0.5, 0.7] * 10}
    accepted = {0: 4, 2: 11}
    found = trained({OWN: LOSSES[OWN], CE: BASE})
    for seed, own in probabilities.items():
        drafting = Drafting(
            drafts=7,
            verified=len(own),
            accepted=accepted[seed],
            expected=statistics.fmean(own),
            error=math.sqrt(sum(a * (1 - a) for a in own)) / len(own),
        )
        found[OWN][seed] = replace(found[OWN][seed], drafting=drafting.to_json())
    rows = summed(found)
    assert rows[CE].realised is None
    together = [a for own in probabilities.values() for a in own]
    realised = rows[OWN].realised
    assert (realised.verified, realised.accepted) == (34, 15)
    assert realised.acceptance == pytest.approx(15 / 34)
    assert realised.expected == pytest.approx(statistics.fmean(together))
    assert realised.error == pytest.approx(math.sqrt(sum(a * (1 - a) for a in together)) / 34)
    runs = run_rows(runs_of(planned, found), recipe)
    own = {row.seed: row.realised for row in runs if row.method == OWN}
    assert own[1] is None
    assert (own[0].verified, own[0].acceptance) == (4, 1.0)
    assert own[0].error == pytest.approx(math.sqrt(4 * 0.09) / 4)


def test_reliability_is_over_the_positions_of_all_seeds(summed):
    generator = torch.Generator().manual_seed(0)
    # float32 [P] a seed: confidence, negative for a miss; the seeds do not fill the same bins
    spans = [(40, 0.02, 0.5), (7, 0.3, 0.99), (90, 0.6, 0.7)]
    signed = []
    for count, low, high in spans:
        confidence = low + (high - low) * torch.rand(count, generator=generator)
        hit = torch.rand(count, generator=generator) < confidence
        signed.append(torch.where(hit, confidence, -confidence))
    found = trained({OWN: LOSSES[OWN]})
    for seed, own in enumerate(signed):
        made = measure_calibration([own]).to_json()
        diagrams = {name: made[name]["bins"] for name in ("equal_width", "equal_mass")}
        found[OWN][seed] = replace(found[OWN][seed], reliability=diagrams)
    rows = summed(found)
    assert rows[CE].reliability == []
    held: dict[int, list[float]] = {}
    for value in torch.cat(signed).tolist():
        held.setdefault(math.ceil(abs(value) * 15) - 1, []).append(value)
    bins = rows[OWN].reliability
    assert [round(own.low * 15) for own in bins] == sorted(held)
    assert sum(own.count for own in bins) == 137
    for own, (place, values) in zip(bins, sorted(held.items()), strict=True):
        assert (own.low, own.high) == pytest.approx((place / 15, (place + 1) / 15))
        assert own.count == len(values)
        assert own.confidence == pytest.approx(statistics.fmean(map(abs, values)))
        assert own.accuracy == pytest.approx(sum(v > 0 for v in values) / len(values))


def test_what_a_method_cost(summed):
    found = trained({OWN: LOSSES[OWN], CE: BASE})
    for seed, (entries, seconds, cpu_seconds) in enumerate(
        [(2.0, 1.0, 8.0), (2.5, None, None), (3.6, 4.0, 2.0)]  # the second was resumed
    ):
        changes = {"entries": entries, "seconds": seconds, "cpu_seconds": cpu_seconds}
        found[OWN][seed] = replace(found[OWN][seed], **changes)
    rows = summed(found)
    assert rows[OWN].entries == pytest.approx(2.7)
    assert rows[OWN].tokens_per_second == pytest.approx((1280 + 320) / 2)
    assert rows[OWN].tokens_per_cpu_second == pytest.approx((160 + 640) / 2)
    assert rows[OWN].sampler == {"name": "topk", "k": 3}
    assert (rows[OWN].family, rows[OWN].unbiased) == ("topk", False)
    ce = rows[CE]
    assert (ce.entries, ce.sampler, ce.bytes_per_token, ce.unbiased) == (None, None, None, None)
    assert (ce.tokens_per_second, ce.tokens_per_cpu_second) == (640, 320)


def test_stored_and_read_they_are_the_same(summed, recipe, setting, planned):
    """Another run's outcome is nobody's."""
    state = ComparisonState(recipe, setting)
    for run in runs_of(planned, trained(LOSSES)):
        assert run.planned.folder is not None
        assert run.outcome is not None
        kept = run.outcome
        if run.key == (MIXED, "tiny", 1):
            kept = replace(kept, fingerprint="of another")
        state.setting.work.store("runs", kept.fingerprint, asdict(kept))
    runs = state.runs()
    rows = {row.method: row for row in state.method_rows(runs)}
    expected = summed(trained(LOSSES))
    assert [rows[title] for title in (CE, OWN, FULL)] == [expected[t] for t in (CE, OWN, FULL)]
    assert (rows[MIXED].seeds_done, rows[MIXED].seeds_not_run) == ([0, 2], [1])
