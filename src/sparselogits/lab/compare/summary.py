"""Rows of a comparison from its finished runs: means over seeds, intervals, differences to CE."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselogits.evaluate import METRICS, Estimate, SeedEstimate, over_seeds, statistic_of
from sparselogits.evaluate.intervals import Statistic, ratio
from sparselogits.lab.compare.caches import Draw, Setting
from sparselogits.lab.compare.recipe import CompareRecipe, MethodSpec
from sparselogits.lab.compare.results import (
    Ends,
    Figure,
    MethodRow,
    Realised,
    ReliabilityBin,
    RunRow,
)
from sparselogits.lab.compare.runs import Outcome, Planned
from sparselogits.store import Cache

PAIRED = ("loss", "kl", "acceptance", "ece")
"""Metrics whose difference to CE is reported."""


Place = tuple[str, str, int]
"""Title of the method, name of the student, seed."""

Sums = Mapping[str, Any]
"""By metric (`METRICS`) an array-like [W, C], see `HeldOut.sums`."""


@dataclass(frozen=True)
class Run:
    """A planned run with its outcome or its failure."""

    planned: Planned
    outcome: Outcome | None
    failure: str | None

    @property
    def place(self) -> Place:
        """Method, student, seed."""
        return self.planned.method.title, self.planned.student, self.planned.seed


def run_rows(runs: Sequence[Run], recipe: CompareRecipe) -> list[RunRow]:
    """Return a row for every run of the recipe, finished or not."""
    lines = _reference_lines(recipe)
    losses = {run.place: run.outcome.figures["loss"] for run in runs if run.outcome}
    return [_run_row(run, losses, lines, recipe) for run in runs]


def method_rows(
    runs: Sequence[Run],
    recipe: CompareRecipe,
    setting: Setting,
    kept: dict[tuple[object, ...], MethodRow],
) -> list[MethodRow]:
    """Return a row for every method and student, over the finished seeds.

    Args:
        runs: all runs of the recipe.
        recipe: the comparison.
        setting: see `caches.prepare`.
        kept: rows computed before for this recipe and setting, by what they depend on; new rows
            are added.
    """
    outcomes = {run.place: run.outcome for run in runs if run.outcome}
    lines = _reference_lines(recipe)
    rows = []
    for student in recipe.students:
        for method in recipe.methods:
            key = (method.title, student, *_rests_on(method, student, runs, lines))
            if key not in kept:
                own = [r for r in runs if r.place[:2] == (method.title, student)]
                kept[key] = _method_row(method, student, own, outcomes, lines, recipe, setting)
            rows.append(kept[key])
    return rows


@dataclass(frozen=True)
class Lines:
    """Titles of the methods that others are compared with; None if the recipe lacks one."""

    ce: str | None
    full: str | None
    untrained: str | None

    @classmethod
    def of_rows(cls, rows: Iterable[MethodRow]) -> Lines:
        """Find the titles among the rows of one student."""
        plain: dict[str, str] = {}
        for row in rows:
            if not row.spec.get("alpha"):
                plain.setdefault(row.family, row.method)
        return cls(plain.get("ce"), plain.get("full"), plain.get("none"))


def _reference_lines(recipe: CompareRecipe) -> Lines:
    def plain(name: str) -> str | None:
        found = (m.title for m in recipe.methods if m.method == name and m.alpha == 0)
        return next(found, None)

    return Lines(plain("ce"), plain("full"), plain("none"))


def _rests_on(method: MethodSpec, student: str, runs: Sequence[Run], lines: Lines) -> list[object]:
    """Return the state of the runs of a method and of those that it is compared with."""
    titles = (method.title, lines.ce, lines.full, lines.untrained)
    return [
        (run.planned.fingerprint, run.outcome is not None, run.failure is not None)
        for run in runs
        if run.planned.student == student and run.planned.method.title in titles
    ]


def _run_row(
    run: Run,
    losses: Mapping[tuple[str, str, int], float],
    lines: Lines,
    recipe: CompareRecipe,
) -> RunRow:
    title, student, seed = run.place
    if run.outcome is None:
        status = "not run" if run.failure is None else "failed"
        return RunRow.model_validate(
            {
                "method": title,
                "student": student,
                "seed": seed,
                "status": status,
                "message": run.failure,
            }
        )
    own, folder = run.outcome, run.planned.folder
    ce, full = (
        losses.get((name, student, seed)) if name else None for name in (lines.ce, lines.full)
    )
    gap = None
    if ce is not None and full is not None and ce > full:
        gap = 100 * (ce - own.figures["loss"]) / (ce - full)
    return RunRow(
        method=title,
        student=student,
        seed=seed,
        status="done",
        folder=None if folder is None else folder.relative_to(recipe.out).as_posix(),
        figures=own.figures,
        gap_closed=gap,
        realised=_realised([own]),
        curve=own.curve,
        steps=own.steps,
        tokens=own.tokens,
        seconds=own.seconds,
        cpu_seconds=own.cpu_seconds,
        commit=own.commit,
    )


def _method_row(
    method: MethodSpec,
    student: str,
    runs: Sequence[Run],
    outcomes: Mapping[tuple[str, str, int], Outcome],
    lines: Lines,
    recipe: CompareRecipe,
    setting: Setting,
) -> MethodRow:
    done = {run.planned.seed: run.outcome for run in runs if run.outcome is not None}
    metrics = metrics_of(
        (method.title, student),
        {place: own.sums for place, own in outcomes.items()},
        lines,
        seeds=list(done),
        first_seed=recipe.seeds[0],
        resamples=recipe.resamples,
    )
    first = Draw.of(method, recipe, recipe.seeds[0])
    cache = setting.caches.get(first.key) if method.sampler else None
    statistics_of = None if cache is None else Cache.open(cache).statistics()
    sampler = None if cache is None else dict(Cache.open(cache).identity.sampler)
    entries = [own.entries for own in done.values() if own.entries is not None]
    per_second = [own.tokens / own.seconds for own in done.values() if own.seconds]
    per_cpu = [own.tokens / own.cpu_seconds for own in done.values() if own.cpu_seconds]
    return MethodRow(
        method=method.title,
        student=student,
        family=method.sampler.kind.name if method.sampler else method.method,
        spec=method.model_dump(mode="json", exclude_defaults=True),
        sampler=sampler,
        unbiased=None if method.sampler is None else method.sampler.kind.unbiased,
        entries=statistics.fmean(entries) if entries else None,
        bytes_per_token=None
        if statistics_of is None
        else (statistics_of.bytes_on_disk - statistics_of.text_bytes) / statistics_of.tokens,
        seeds_done=list(done),
        seeds_failed=[r.planned.seed for r in runs if r.outcome is None and r.failure],
        seeds_not_run=[r.planned.seed for r in runs if r.outcome is None and not r.failure],
        **metrics,
        reliability=_pooled([own.reliability["equal_width"] for own in done.values()]),
        realised=_realised(list(done.values())),
        tokens_per_second=statistics.median(per_second) if per_second else None,
        tokens_per_cpu_second=statistics.median(per_cpu) if per_cpu else None,
    )


def metrics_of(
    own: tuple[str, str],
    sums: Mapping[Place, Sums],
    lines: Lines,
    *,
    seeds: Sequence[int],
    first_seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Compute a method's metrics over seeds, and its differences to the reference methods.

    Args:
        own: titles of the method and the student.
        sums: per-window sums of all finished runs.
        lines: the reference methods.
        seeds: the method's finished seeds.
        first_seed: seed of the untrained student, where one stands for all seeds.
        resamples: number of resamples of every bootstrap.

    Returns:
        `figures`, `minus_ce`, `gap_closed` and `recovered` of a `MethodRow`.
    """
    title, student = own

    def of(name: str | None, seed: int) -> Sums | None:
        return None if name is None else sums.get((name, student, seed))

    def aligned(*others: Callable[[int], Sums | None]) -> list[tuple[Sums, ...]]:
        """The method's sums with those of others, for the seeds that all of them have."""
        found = [(sums[title, student, seed], *(one(seed) for one in others)) for seed in seeds]
        return [tuple(x for x in all_of if x is not None) for all_of in found if None not in all_of]

    def ce(seed: int) -> Sums | None:
        return of(lines.ce, seed)

    def full(seed: int) -> Sums | None:
        return of(lines.full, seed)

    def untrained(seed: int) -> Sums | None:  # one for all seeds where weights are given
        return of(lines.untrained, seed) or of(lines.untrained, first_seed)

    alone, with_ce = aligned(), aligned(ce)
    figures, minus_ce = {}, {}
    for name in METRICS:
        if alone:
            figures[name] = as_figure(
                over_seeds(_units(name, alone), statistic_of(name), resamples=resamples)
            )
        if with_ce and title != lines.ce and name in PAIRED:
            statistic = _difference(name)
            minus_ce[name] = as_figure(
                over_seeds(_units(name, with_ce), statistic, resamples=resamples)
            )
    return {
        "figures": figures,
        "minus_ce": minus_ce,
        "gap_closed": _share_of_the_way("loss", aligned(ce, full), resamples),
        "recovered": _share_of_the_way("kl", aligned(untrained, full), resamples),
    }


def _units(name: str, by_seed: Sequence[tuple[Sums, ...]]) -> Tensor:
    """Return one metric's sums, float64 [S, W, C of all models]: models side by side, per seed."""
    return torch.stack(
        [
            torch.cat([torch.as_tensor(own[name], dtype=torch.float64) for own in models], 1)
            for models in by_seed
        ]
    )


def _difference(name: str) -> Statistic:
    statistic = statistic_of(name)

    def difference(sums: Tensor) -> Tensor:
        own, other = sums.chunk(2, 1)
        return statistic(own) - statistic(other)

    return difference


def _share_of_the_way(
    name: str, by_seed: Sequence[tuple[Sums, ...]], resamples: int
) -> Figure | None:
    """Compute how far a method moves a metric between two models, in per cent; None without a gap.

    The share is a ratio of means over seeds: a seed whose gap happens to be small would otherwise
    decide the mean.

    Args:
        name: the metric.
        by_seed: sums of the method and of the models at 0 and at 100 %, per seed.
        resamples: number of resamples of the windows.
    """
    if not by_seed:
        return None

    def moved(sums: Tensor) -> Tensor:
        method, before, _ = (ratio(part) for part in sums.chunk(3, 1))
        return 100 * (before - method)

    def gap(sums: Tensor) -> Tensor:
        _, before, after = (ratio(part) for part in sums.chunk(3, 1))
        return before - after

    units = _units(name, by_seed)
    whole = over_seeds(units, gap, resamples=resamples).both
    if whole.mean <= 0 or (whole.low is not None and whole.low <= 0):
        return None
    return as_figure(over_seeds(units, moved, gap, resamples=resamples))


def as_figure(found: SeedEstimate) -> Figure:
    """Return an estimate over seeds as the results store it."""

    def ends(estimate: Estimate) -> Ends:
        return Ends(low=estimate.low, high=estimate.high)

    return Figure(
        mean=found.mean,
        windows=ends(found.windows),
        seeds=ends(found.seeds),
        both=ends(found.both),
    )


def _pooled(diagrams: Sequence[Sequence[Mapping[str, Any]]]) -> list[ReliabilityBin]:
    """Return bins of equal width over all positions of several models."""
    bins: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for own in diagrams:
        for each in own:
            bins.setdefault((each["low"], each["high"]), []).append(each)
    return [
        ReliabilityBin(
            low=low,
            high=high,
            confidence=_weighted(same, "confidence"),
            accuracy=_weighted(same, "accuracy"),
            count=sum(each["count"] for each in same),
        )
        for (low, high), same in sorted(bins.items())
    ]


def _weighted(bins: Sequence[Mapping[str, Any]], name: str) -> float:
    count = sum(each["count"] for each in bins)
    return float(sum(each[name] * each["count"] for each in bins) / count)


def _realised(outcomes: Sequence[Outcome]) -> Realised | None:
    drafted = [own.drafting for own in outcomes if own.drafting is not None]
    if not drafted:
        return None
    verified = sum(own["verified"] for own in drafted)
    accepted = sum(own["accepted"] for own in drafted)
    expected = sum(own["expected"] * own["verified"] for own in drafted) / verified
    variance = sum((own["error"] * own["verified"]) ** 2 for own in drafted)
    return Realised(
        verified=verified,
        accepted=accepted,
        acceptance=accepted / verified,
        expected=expected,
        error=math.sqrt(variance) / verified,
    )
