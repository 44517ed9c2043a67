"""From finished runs to a comparison's rows: means over seeds, intervals, differences to CE."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselogits.evaluate import FIGURES, Estimate, SeedEstimate, over_seeds, statistic_of
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
"""Figures whose difference to CE is reported."""


@dataclass(frozen=True)
class Run:
    """A planned run and what has become of it."""

    planned: Planned
    outcome: Outcome | None
    failure: str | None

    @property
    def place(self) -> tuple[str, str, int]:
        """Method, student, seed."""
        return self.planned.method.title, self.planned.student, self.planned.seed


def run_rows(runs: Sequence[Run], recipe: CompareRecipe) -> list[RunRow]:
    """A row for every run of the recipe, done or not."""
    lines = _reference_lines(recipe)
    losses = {run.place: run.outcome.figures["loss"] for run in runs if run.outcome}
    return [_run_row(run, losses, lines, recipe) for run in runs]


def method_rows(
    runs: Sequence[Run],
    recipe: CompareRecipe,
    setting: Setting,
    kept: dict[tuple[object, ...], MethodRow],
) -> list[MethodRow]:
    """A row for every method and student, over the seeds that are done.

    Args:
        runs: all of the recipe.
        recipe: the comparison.
        setting: see `caches.prepare`.
        kept: rows formed before for this recipe and setting, by what they rest on; found here
            instead of being formed again, and new ones put here.
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
class _Lines:
    """Titles of the methods that the others are compared with, where the recipe has them."""

    ce: str | None
    full: str | None
    untrained: str | None


def _reference_lines(recipe: CompareRecipe) -> _Lines:
    def plain(name: str) -> str | None:
        found = (m.title for m in recipe.methods if m.method == name and m.alpha == 0)
        return next(found, None)

    return _Lines(plain("ce"), plain("full"), plain("none"))


def _rests_on(method: MethodSpec, student: str, runs: Sequence[Run], lines: _Lines) -> list[object]:
    """Which runs of the method and of those it is compared with are done, and which have failed."""
    titles = (method.title, lines.ce, lines.full, lines.untrained)
    return [
        (run.planned.fingerprint, run.outcome is not None, run.failure is not None)
        for run in runs
        if run.planned.student == student and run.planned.method.title in titles
    ]


def _run_row(
    run: Run,
    losses: Mapping[tuple[str, str, int], float],
    lines: _Lines,
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
    lines: _Lines,
    recipe: CompareRecipe,
    setting: Setting,
) -> MethodRow:
    done = {run.planned.seed: run.outcome for run in runs if run.outcome is not None}
    how = {"resamples": recipe.resamples}

    def of(title: str | None, seed: int) -> Outcome | None:
        return None if title is None else outcomes.get((title, student, seed))

    def untrained(seed: int) -> Outcome | None:  # one for all seeds where weights are given
        return of(lines.untrained, seed) or of(lines.untrained, recipe.seeds[0])

    with_ce = {seed: ce for seed in done if (ce := of(lines.ce, seed)) is not None}
    figures, minus_ce = {}, {}
    for name in FIGURES:
        if done:
            figures[name] = as_figure(
                over_seeds(_units(name, [done.values()]), statistic_of(name), **how)
            )
        if with_ce and method.title != lines.ce and name in PAIRED:
            pairs = [[done[seed] for seed in with_ce], with_ce.values()]
            statistic = _difference(name)
            minus_ce[name] = as_figure(over_seeds(_units(name, pairs), statistic, **how))
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
        family=method.sampler or method.method,
        spec=method.model_dump(mode="json", exclude_defaults=True),
        sampler=sampler,
        unbiased=None if method.sampler is None else method.sampler not in ("topk", "topp"),
        entries=statistics.fmean(entries) if entries else None,
        bytes_per_token=None
        if statistics_of is None
        else (statistics_of.bytes_on_disk - statistics_of.text_bytes) / statistics_of.tokens,
        seeds_done=list(done),
        seeds_failed=[r.planned.seed for r in runs if r.outcome is None and r.failure],
        seeds_not_run=[r.planned.seed for r in runs if r.outcome is None and not r.failure],
        figures=figures,
        minus_ce=minus_ce,
        gap_closed=_gap_closed(
            [
                (own, with_ce[seed], full)
                for seed, own in done.items()
                if seed in with_ce and (full := of(lines.full, seed)) is not None
            ],
            recipe,
        ),
        recovered=_recovered(
            [
                (own, start, full)
                for seed, own in done.items()
                if (start := untrained(seed)) is not None
                and (full := of(lines.full, seed)) is not None
            ],
            recipe,
        ),
        reliability=_pooled([own.reliability["equal_width"] for own in done.values()]),
        realised=_realised(list(done.values())),
        tokens_per_second=statistics.median(per_second) if per_second else None,
        tokens_per_cpu_second=statistics.median(per_cpu) if per_cpu else None,
    )


def _units(name: str, models: Sequence[Iterable[Outcome]]) -> Tensor:
    """float64 [S, W, C of all models]: sums of several models side by side, seed by seed."""
    return torch.cat(
        [
            torch.stack([torch.tensor(own.sums[name], dtype=torch.float64) for own in seeds])
            for seeds in models
        ],
        2,
    )


def _difference(name: str) -> Statistic:
    statistic = statistic_of(name)

    def difference(sums: Tensor) -> Tensor:
        own, other = sums.chunk(2, 1)
        return statistic(own) - statistic(other)

    return difference


def _gap_closed(
    trios: Sequence[tuple[Outcome, Outcome, Outcome]], recipe: CompareRecipe
) -> Figure | None:
    """Share of the way from CE's loss to full KD's; of (method, CE, full), a trio per seed."""
    return _share_of_the_way("loss", trios, recipe)


def _recovered(
    trios: Sequence[tuple[Outcome, Outcome, Outcome]], recipe: CompareRecipe
) -> Figure | None:
    """Share of the way from the untrained student's KL to full KD's; (method, untrained, full)."""
    return _share_of_the_way("kl", trios, recipe)


def _share_of_the_way(
    name: str, trios: Sequence[tuple[Outcome, Outcome, Outcome]], recipe: CompareRecipe
) -> Figure | None:
    """Per cent of the way of a figure between two models; None without a way between them."""
    if not trios:
        return None
    own, start, end = zip(*trios, strict=True)

    def gap(sums: Tensor) -> Tensor:
        first, second = sums.chunk(2, 1)
        return ratio(first) - ratio(second)

    def share(sums: Tensor) -> Tensor:
        method, before, after = (ratio(part) for part in sums.chunk(3, 1))
        return 100 * (before - method) / (before - after)

    how = {"resamples": recipe.resamples}
    whole = over_seeds(_units(name, [start, end]), gap, **how).both
    if whole.mean <= 0 or (whole.low is not None and whole.low <= 0):
        return None
    return as_figure(over_seeds(_units(name, [own, start, end]), share, **how))


def as_figure(found: SeedEstimate) -> Figure:
    """An estimate over seeds, as it is stored."""

    def ends(estimate: Estimate) -> Ends:
        return Ends(low=estimate.low, high=estimate.high)

    return Figure(
        mean=found.mean,
        windows=ends(found.windows),
        seeds=ends(found.seeds),
        both=ends(found.both),
    )


def _pooled(diagrams: Sequence[Sequence[Mapping[str, Any]]]) -> list[ReliabilityBin]:
    """Bins of equal width of several models, over all their positions."""
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
