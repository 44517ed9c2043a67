"""Compute the rows of a comparison: means over seeds, intervals, and differences from CE."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparselogits.evaluate import METRICS, Estimate, SeedEstimate, over_seeds, statistic_of
from sparselogits.evaluate.intervals import difference_of, ratio
from sparselogits.lab.compare.caches import Draw, Setting
from sparselogits.lab.compare.recipe import UNTRAINED, CompareRecipe, MethodSpec
from sparselogits.lab.compare.results import (
    Ends,
    MethodRow,
    MetricEstimate,
    Realised,
    ReliabilityBin,
    RunRow,
)
from sparselogits.lab.compare.runs import Outcome, Planned
from sparselogits.store import Cache, sample_cache

PAIRED = ("loss", "kl", "acceptance", "ece")
"""Names of the metrics for which the difference from CE is reported."""


RunKey = tuple[str, str, int]
"""Key that identifies a run: title of the method, name of the student, and seed."""

WindowSums = Mapping[str, Any]
"""Per-window sums [W, C] by the names in `METRICS`, see `HeldOut.sums`."""


@dataclass(frozen=True)
class Run:
    """Planned run and its state.

    Args:
        planned: the run.
        outcome: outcome of the run; None if it is not finished.
        failure: reason why the last attempt failed, or None.
    """

    planned: Planned
    outcome: Outcome | None
    failure: str | None

    @property
    def key(self) -> RunKey:
        """Title of the method, name of the student, and seed."""
        return self.planned.method.title, self.planned.student, self.planned.seed


def run_rows(runs: Sequence[Run], recipe: CompareRecipe) -> list[RunRow]:
    """Return a row for each run of the recipe, finished or not."""
    references = _references(recipe)
    losses = {run.key: run.outcome.figures["loss"] for run in runs if run.outcome}
    return [_run_row(run, losses, references, recipe) for run in runs]


def method_rows(
    runs: Sequence[Run],
    recipe: CompareRecipe,
    setting: Setting,
    computed: dict[tuple[object, ...], MethodRow],
) -> list[MethodRow]:
    """Return a row for each method and student, over the finished seeds.

    Args:
        runs: all runs of the recipe.
        recipe: the comparison.
        setting: result of `caches.prepare`.
        computed: rows that were computed before, by the state of the runs that they depend on; new
            rows are added.
    """
    outcomes = {run.key: run.outcome for run in runs if run.outcome}
    references = _references(recipe)
    rows = []
    for student in recipe.students:
        for method in recipe.methods:
            key = (method.title, student, *_dependencies(method, student, runs, references))
            if key not in computed:
                of_row = [r for r in runs if r.key[:2] == (method.title, student)]
                computed[key] = _method_row(
                    method, student, of_row, outcomes, references, recipe, setting
                )
            rows.append(computed[key])
    return rows


@dataclass(frozen=True)
class References:
    """Titles of the methods with which other methods are compared.

    Args:
        ce: title of the first CE without `alpha`; None if there is none.
        full: title of the first full KD without `alpha`, or None.
        untrained: title of the student before training, or None.
    """

    ce: str | None
    full: str | None
    untrained: str | None

    @classmethod
    def of_rows(cls, rows: Iterable[MethodRow]) -> References:
        """Return the titles of the reference methods among the rows of one student."""
        without_labels: dict[str, str] = {}
        for row in rows:
            if not row.spec.get("alpha"):
                without_labels.setdefault(row.family, row.method)
        return cls(*(without_labels.get(name) for name in ("ce", "full", UNTRAINED)))


def _references(recipe: CompareRecipe) -> References:
    def title_of(name: str) -> str | None:
        found = (m.title for m in recipe.methods if m.method == name and m.alpha == 0)
        return next(found, None)

    return References(title_of("ce"), title_of("full"), title_of(UNTRAINED))


def _dependencies(
    method: MethodSpec, student: str, runs: Sequence[Run], references: References
) -> list[object]:
    """Return the state of all runs on which the row of a method depends."""
    titles = (method.title, references.ce, references.full, references.untrained)
    return [
        (run.planned.fingerprint, run.outcome is not None, run.failure is not None)
        for run in runs
        if run.planned.student == student and run.planned.method.title in titles
    ]


def _run_row(
    run: Run,
    losses: Mapping[tuple[str, str, int], float],
    references: References,
    recipe: CompareRecipe,
) -> RunRow:
    title, student, seed = run.key
    if run.outcome is None:
        status: Literal["not run", "failed"] = "not run" if run.failure is None else "failed"
        return RunRow(method=title, student=student, seed=seed, status=status, message=run.failure)
    outcome, folder = run.outcome, run.planned.folder
    ce, full = (
        losses.get((name, student, seed)) if name else None
        for name in (references.ce, references.full)
    )
    gap = None
    if ce is not None and full is not None and ce > full:
        gap = 100 * (ce - outcome.figures["loss"]) / (ce - full)
    return RunRow(
        method=title,
        student=student,
        seed=seed,
        status="done",
        folder=None if folder is None else folder.relative_to(recipe.out).as_posix(),
        figures=outcome.figures,
        gap_closed=gap,
        realised=_realised([outcome]),
        curve=outcome.curve,
        steps=outcome.steps,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        cpu_seconds=outcome.cpu_seconds,
        commit=outcome.commit,
    )


def _method_row(
    method: MethodSpec,
    student: str,
    runs: Sequence[Run],
    outcomes: Mapping[tuple[str, str, int], Outcome],
    references: References,
    recipe: CompareRecipe,
    setting: Setting,
) -> MethodRow:
    done = {run.planned.seed: run.outcome for run in runs if run.outcome is not None}
    metrics = metrics_of(
        (method.title, student),
        {key: outcome.sums for key, outcome in outcomes.items()},
        references,
        seeds=list(done),
        first_seed=recipe.seeds[0],
        resamples=recipe.resamples,
    )
    first = Draw.of(method, recipe, recipe.seeds[0])
    cache = setting.caches.get(first.key) if method.sampler else None
    per_token = None if cache is None else _target_bytes_per_text_token(Cache.open(cache))
    sampler = None if cache is None else dict(Cache.open(cache).identity.sampler)
    entries = [each.entries for each in done.values() if each.entries is not None]
    per_second = [each.tokens / each.seconds for each in done.values() if each.seconds]
    per_cpu = [each.tokens / each.cpu_seconds for each in done.values() if each.cpu_seconds]
    return MethodRow(
        method=method.title,
        student=student,
        family=method.sampler.kind.name if method.sampler else method.method,
        spec=method.model_dump(mode="json", exclude_defaults=True),
        sampler=sampler,
        unbiased=None if method.sampler is None else method.sampler.kind.unbiased,
        entries=statistics.fmean(entries) if entries else None,
        bytes_per_token=per_token,
        seeds_done=list(done),
        seeds_failed=[r.planned.seed for r in runs if r.outcome is None and r.failure],
        seeds_not_run=[r.planned.seed for r in runs if r.outcome is None and not r.failure],
        **metrics,
        reliability=_pooled([each.reliability["equal_width"] for each in done.values()]),
        realised=_realised(list(done.values())),
        tokens_per_second=statistics.median(per_second) if per_second else None,
        tokens_per_cpu_second=statistics.median(per_cpu) if per_cpu else None,
    )


def _target_bytes_per_text_token(cache: Cache) -> float:
    """Return the bytes of the targets per token of text.

    Padding is estimated if windows have one document each; padding in rows of token ids counts as
    text.
    """
    found, share = cache.statistics(), 1.0
    if cache.identity.packing.get("kind") == "documents":
        share = sample_cache(cache).text_share
    return (found.bytes_on_disk - found.text_bytes) / (found.tokens * share)


def metrics_of(
    method_and_student: tuple[str, str],
    sums: Mapping[RunKey, WindowSums],
    references: References,
    *,
    seeds: Sequence[int],
    first_seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Compute a method's metrics over seeds, and its differences from the reference methods.

    Args:
        method_and_student: title of the method and name of the student.
        sums: per-window sums of all finished runs.
        references: titles of the reference methods.
        seeds: finished seeds of the method.
        first_seed: seed whose untrained student is used for seeds without one; an existing model
            has the same untrained weights for all seeds.
        resamples: number of resamples per bootstrap.

    Returns:
        Values of the fields `figures`, `minus_ce`, `gap_closed` and `recovered` of a `MethodRow`.
    """
    title, student = method_and_student

    def of(name: str | None, seed: int) -> WindowSums | None:
        return None if name is None else sums.get((name, student, seed))

    def aligned(*others: Callable[[int], WindowSums | None]) -> list[tuple[WindowSums, ...]]:
        """Return the sums of the method and of others, for the seeds that all of them have."""
        found = [(sums[title, student, seed], *(other(seed) for other in others)) for seed in seeds]
        return [tuple(x for x in all_of if x is not None) for all_of in found if None not in all_of]

    def untrained(seed: int) -> WindowSums | None:
        return of(references.untrained, seed) or of(references.untrained, first_seed)

    ce, full = partial(of, references.ce), partial(of, references.full)
    without_others, with_ce = aligned(), aligned(ce)
    metrics, minus_ce = {}, {}
    for name in METRICS:
        if without_others:
            metrics[name] = metric_estimate(
                over_seeds(_units(name, without_others), statistic_of(name), resamples=resamples)
            )
        if with_ce and title != references.ce and name in PAIRED:
            difference = difference_of(statistic_of(name))
            minus_ce[name] = metric_estimate(
                over_seeds(_units(name, with_ce), difference, resamples=resamples)
            )
    return {
        "figures": metrics,
        "minus_ce": minus_ce,
        "gap_closed": _closed_share("loss", aligned(ce, full), resamples),
        "recovered": _closed_share("kl", aligned(untrained, full), resamples),
    }


def _units(name: str, by_seed: Sequence[tuple[WindowSums, ...]]) -> Tensor:
    """Return the sums of a metric, float64 [S, W, C], the models of a seed concatenated along C."""
    return torch.stack(
        [
            torch.cat([torch.as_tensor(model[name], dtype=torch.float64) for model in models], 1)
            for models in by_seed
        ]
    )


def _closed_share(
    name: str, by_seed: Sequence[tuple[WindowSums, ...]], resamples: int
) -> MetricEstimate | None:
    """Compute the percentage of the gap between two models that a method closes.

    `by_seed` has the sums of the method, of the model at 0 %, and of that at 100 %. The result is
    None without seeds, or if the gap or the lower end of its interval is not positive.
    """
    if not by_seed:
        return None

    # a ratio of means over seeds, because a seed with a small gap would dominate a mean of ratios

    def closed(sums: Tensor) -> Tensor:
        method, before, _ = (ratio(part) for part in sums.chunk(3, 1))
        return 100 * (before - method)

    def gap(sums: Tensor) -> Tensor:
        _, before, after = (ratio(part) for part in sums.chunk(3, 1))
        return before - after

    units = _units(name, by_seed)
    mean_gap = over_seeds(units, gap, resamples=resamples).both
    if mean_gap.mean <= 0 or (mean_gap.low is not None and mean_gap.low <= 0):
        return None
    return metric_estimate(over_seeds(units, closed, gap, resamples=resamples))


def metric_estimate(found: SeedEstimate) -> MetricEstimate:
    """Convert an estimate over seeds to a `MetricEstimate`, the form used in results."""

    def ends(estimate: Estimate) -> Ends:
        return Ends(low=estimate.low, high=estimate.high)

    windows, seeds, both = map(ends, (found.windows, found.seeds, found.both))
    return MetricEstimate(mean=found.mean, windows=windows, seeds=seeds, both=both)


def _pooled(diagrams: Sequence[Sequence[Mapping[str, Any]]]) -> list[ReliabilityBin]:
    """Merge bins of equal width over several models."""
    bins: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for diagram in diagrams:
        for each in diagram:
            bins.setdefault((each["low"], each["high"]), []).append(each)
    return [
        ReliabilityBin(
            low=low,
            high=high,
            confidence=_weighted_mean(same, "confidence"),
            accuracy=_weighted_mean(same, "accuracy"),
            count=sum(each["count"] for each in same),
        )
        for (low, high), same in sorted(bins.items())
    ]


def _weighted_mean(bins: Sequence[Mapping[str, Any]], name: str) -> float:
    count = sum(each["count"] for each in bins)
    return float(sum(each[name] * each["count"] for each in bins) / count)


def _realised(outcomes: Sequence[Outcome]) -> Realised | None:
    """Combine the results of drafting of several runs; None if no run has such results."""
    drafted = [outcome.drafting for outcome in outcomes if outcome.drafting is not None]
    if not drafted:
        return None
    verified = sum(each["verified"] for each in drafted)
    accepted = sum(each["accepted"] for each in drafted)
    expected = sum(each["expected"] * each["verified"] for each in drafted) / verified
    variance = sum((each["error"] * each["verified"]) ** 2 for each in drafted)
    return Realised(
        verified=verified,
        accepted=accepted,
        acceptance=accepted / verified,
        expected=expected,
        error=math.sqrt(variance) / verified,
    )
