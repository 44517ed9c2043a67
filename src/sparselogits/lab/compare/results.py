"""Define the results of a comparison, as stored in results.json, and convert them to CSV.

The classes are the schema of results.json. `runs` contains the metrics of each run, and `methods`
the metrics of each method over its seeds, with intervals. The per-window sums from which the
intervals of `figures`, `minus_ce`, `gap_closed` and `recovered` are computed are in windows.npz
(windows.py) and in `finished/runs` (finished.py).
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sparselogits.errors import CacheError
from sparselogits.objectives import TokenObjective, objective_from_json

FORMAT = 1
"""Version of the results.json format."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Ends(_Value):
    """Ends of a 95 % interval; None if no finite interval can be computed."""

    low: float | None
    high: float | None


class MetricEstimate(_Value):
    """Metric of a method over its seeds, with three intervals (see `SeedEstimate`).

    In results written by versions without windows.npz, `both` is a bootstrap over windows and
    seeds, and `gap_closed` is the mean of the ratios per seed, with Student's t interval.
    """

    mean: float
    windows: Ends = Field(description="bootstrap over held-out windows, with fixed students")
    seeds: Ends = Field(
        description="Student's t over seeds, Fieller's interval for shares, with fixed text"
    )
    both: Ends = Field(description="interval over seeds and windows")

    def text(self, scale: float, digits: int) -> str:
        """Format the mean times `scale`, with ± half the width of the interval `both`, if any."""
        mean, low, high = f"{scale * self.mean:.{digits}f}", self.both.low, self.both.high
        if low is None or high is None:
            return mean
        return f"{mean} ±{scale * (high - low) / 2:.{digits}f}"


class ReliabilityBin(_Value):
    """Bin of a reliability diagram, over the positions of one or several models (see `Bin`)."""

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


class Realised(_Value):
    """Result of drafting, over all seeds of a method or for one run (see `Drafting`)."""

    verified: int
    accepted: int
    acceptance: float
    expected: float
    error: float = Field(description="standard deviation of acceptance - expected")


class OfBatches(_Value):
    """Mean of a metric over batches, with the ends of its 95 % Student's t interval."""

    mean: float
    low: float | None = Field(description="lower end of the interval; None for a single batch")
    high: float | None = Field(description="upper end of the interval; None for a single batch")


class GradientSize(_Value):
    """Metrics of the gradient with respect to all parameters, for one target and batch size.

    Norm, bias and noise are relative to the norm of full distillation's gradient.
    """

    batch_tokens: int = Field(description="number of tokens per batch")
    batches: int = Field(description="number of batches")
    angle: OfBatches = Field(description="angle to full distillation's gradient, degrees")
    norm_ratio: OfBatches = Field(description="relative norm")
    bias: float | None = Field(
        description="relative bias; None if the bias is not distinguishable from zero"
    )
    bias_below: float | None = Field(
        description="upper bound of a bias that is not distinguishable from zero; otherwise None"
    )
    noise: float = Field(description="relative standard deviation")


class Gradient(_Value):
    """Comparison between the gradient of a method's targets and that of full distillation.

    For each student, the gradients of all methods are measured on the model of the same run
    (docs/compare.md).
    """

    student_method: str = Field(description="method by which the measured student was trained")
    student_seed: int = Field(description="seed of the measured student")
    student_folder: str = Field(
        description="folder of the measured student, relative to the directory of the comparison"
    )
    entries: float | None = Field(
        description="mean entries per position of the measured targets; None for labels alone"
    )
    draws: int = Field(description="number of draws per batch; 1 for targets that are not random")
    sizes: list[GradientSize] = Field(description="metrics by batch size, ascending")


class MethodRow(_Value):
    """Results of a method for one student, over the finished seeds."""

    method: str = Field(description="title of the method")
    student: str = Field(description="name of the student")
    family: str = Field(description="name of the sampler, or of the method if it has no sampler")
    spec: dict[str, Any] = Field(description="the method as in the recipe")
    sampler: dict[str, Any] | None = Field(
        description="name and parameters of the sampler, fitted to the budget; None without cached "
        "targets, or if the cache could not be built"
    )
    unbiased: bool | None = Field(
        description="whether the targets are unbiased; None without cached targets"
    )
    entries: float | None = Field(
        description="mean entries per position used in training; None without cached targets or "
        "finished seeds"
    )
    bytes_per_token: float | None = Field(
        description="bytes of the cache per token of text, without the text itself; None without "
        "cached targets, or if the cache could not be built"
    )
    seeds_done: list[int]
    seeds_failed: list[int]
    seeds_not_run: list[int]
    figures: dict[str, MetricEstimate] = Field(
        description="metrics by the names in evaluate.METRICS"
    )
    minus_ce: dict[str, MetricEstimate] = Field(
        description="differences of loss, kl, acceptance and ece from CE, paired by seed and "
        "window; empty for CE itself, or without a finished seed in common with CE"
    )
    gap_closed: MetricEstimate | None = Field(
        description="percentage of the gap between CE's loss and full KD's that the method closes, "
        "over the seeds that all three have; None without CE or full KD, or if the gap is not "
        "distinguishable from zero"
    )
    recovered: MetricEstimate | None = Field(
        None,
        description="percentage of the gap between the untrained student's KL and full KD's that "
        "the method closes, over the seeds that all three have; None without one of them, or if "
        "the gap is not distinguishable from zero",
    )
    reliability: list[ReliabilityBin] = Field(
        description="calibration in 15 bins of equal width, without empty bins"
    )
    tasks: dict[str, MetricEstimate] = Field(
        default_factory=dict,
        description="zero-shot scores by TASK/METRIC; in `windows` and `both`, the samples of a "
        "task take the place of windows",
    )
    realised: Realised | None = Field(description="result of drafting; None if not measured")
    tokens_per_second: float | None = Field(
        description="training tokens per second of wall time, median over runs without resuming"
    )
    tokens_per_cpu_second: float | None = Field(
        description="training tokens per second of processor time, median over runs without "
        "resuming"
    )
    gradient: Gradient | None = Field(
        None, description="metrics of the targets' gradient; None if not measured"
    )
    gradient_failure: str | None = Field(
        None, description="reason why the measurement of the gradient failed"
    )

    @property
    def perplexity(self) -> MetricEstimate | None:
        """Perplexity with its intervals, computed from the loss; None without a loss."""
        loss = self.figures.get("loss")
        if loss is None:
            return None

        def ends(of_loss: Ends) -> Ends:
            low, high = (None if x is None else _exp(x) for x in (of_loss.low, of_loss.high))
            return Ends(low=low, high=high)

        return MetricEstimate(
            mean=_exp(loss.mean),
            windows=ends(loss.windows),
            seeds=ends(loss.seeds),
            both=ends(loss.both),
        )


class RunRow(_Value):
    """Results of one run."""

    method: str = Field(description="title of the method")
    student: str = Field(description="name of the student")
    seed: int
    status: Literal["done", "failed", "not run"]
    message: str | None = Field(None, description="reason why the run failed")
    folder: str | None = Field(
        None, description="folder of the run, relative to the directory of the comparison"
    )
    figures: dict[str, float] = Field(
        default_factory=dict,
        description="metrics by name: loss, perplexity, kl, agreement, acceptance, accuracy, "
        "confidence, overconfidence, ece, ece_equal_mass",
    )
    gap_closed: float | None = Field(
        None,
        description="percentage of the gap between CE's loss and full KD's, both of the same seed, "
        "that the run closes; None without one of them, or if CE's loss is not above full KD's",
    )
    realised: Realised | None = Field(None, description="result of drafting; None if not measured")
    curve: list[tuple[int, float]] = Field(
        default_factory=list,
        description="pairs of step and training cross-entropy to the labels, nats",
    )
    steps: int | None = Field(None, description="number of optimiser steps")
    tokens: int | None = Field(
        None, description="number of steps times tokens per step, including padding"
    )
    seconds: float | None = Field(
        None, description="wall time of training in seconds; None if training was resumed"
    )
    cpu_seconds: float | None = Field(
        None, description="processor time of training in seconds; None if training was resumed"
    )
    commit: str | None = Field(None, description="commit of the source tree")
    tasks: dict[str, float] = Field(
        default_factory=dict, description="zero-shot scores by TASK/METRIC"
    )
    tasks_failed: dict[str, str] = Field(
        default_factory=dict, description="reasons why tasks failed, by task"
    )


class TeacherRow(_Value):
    """Results of the teacher on the held-out windows."""

    figures: dict[str, float] = Field(description="metrics by name, as in RunRow")
    reliability: list[ReliabilityBin] = Field(
        description="calibration in 15 bins of equal width, without empty bins"
    )
    positions: int = Field(description="number of positions with a label")
    windows: int = Field(description="number of windows")
    tasks: dict[str, float] = Field(
        default_factory=dict, description="zero-shot scores by TASK/METRIC"
    )
    tasks_failed: dict[str, str] = Field(
        default_factory=dict, description="reasons why tasks failed, by task"
    )


class Results(_Value):
    """Results of a comparison."""

    format: int = FORMAT
    title: str
    complete: bool = Field(description="whether every run of the recipe is finished")
    settings: dict[str, Any] = Field(
        description="recipe without its methods, teacher, corpus, parameters of each student, and "
        "the objective of a masked teacher"
    )
    provenance: dict[str, str] = Field(description="commit, versions, processor, threads, date")
    teacher: TeacherRow | None
    methods: list[MethodRow]
    runs: list[RunRow]

    @property
    def objective(self) -> TokenObjective:
        """Objective of teacher and students: predict the next token, or predict masked tokens."""
        return objective_from_json(self.settings.get("objective"))

    @property
    def tasks_not_measured(self) -> list[str]:
        """Distinct messages about tasks that failed for a run or the teacher."""
        failed = [run.tasks_failed for run in self.runs]
        failed += [self.teacher.tasks_failed] if self.teacher else []
        return list(dict.fromkeys(f"{n}: {why}" for each in failed for n, why in each.items()))

    @property
    def outgrown_teacher(self) -> list[str]:
        """Warnings about students that reach the teacher's loss by CE, without the teacher."""
        if self.teacher is None:
            return []
        of_teacher = self.teacher.figures["loss"]
        return [
            f"{row.student}: the loss of {row.method} is {loss.mean:.3f}, that of the teacher is "
            f"{of_teacher:.3f} on the same windows. The teacher is not good enough for this "
            "student; use a better teacher, or compare on less text"
            for row in self.methods
            if row.family == "ce" and (loss := row.figures.get("loss")) and loss.mean <= of_teacher
        ]

    def to_csv(self) -> str:
        """Return CSV with a line per method and student, per run, and for the teacher."""
        out = io.StringIO()
        tasks = dict.fromkeys(name for row in self.methods for name in row.tasks)
        tasks |= dict.fromkeys(name for row in self.runs for name in row.tasks)
        tasks |= dict.fromkeys(self.teacher.tasks if self.teacher else ())
        columns = [*_COLUMNS, *(name + end for name in tasks for end in ("", "_low", "_high"))]
        columns += _LATER_COLUMNS
        writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_method_line(row) for row in self.methods)
        writer.writerows(_run_line(row) for row in self.runs)
        if self.teacher is not None:
            writer.writerow({"row": "teacher", **_without_intervals(self.teacher)})
        return out.getvalue()


def read_results(path: Path) -> Results:
    """Read the results of a comparison.

    Args:
        path: path of results.json, or of its directory.

    Raises:
        CacheError: If the file cannot be read, or has another format.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        found = Results.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CacheError(
            f"{file} cannot be read ({error.strerror}); give the results.json of `sparselogits "
            "compare`, or its directory"
        ) from error
    except ValueError as error:
        raise CacheError(
            f"{file} contains no results that this version can read: {error}. Run `sparselogits "
            "compare` again, or use the version that wrote the file"
        ) from error
    if found.format != FORMAT:
        raise CacheError(
            f"{file} has format {found.format}, this version reads format {FORMAT}; use the "
            "version that wrote the file"
        )
    return found


_CSV_METRICS = ("loss", "kl", "ece", "ece_equal_mass", "overconfidence", "acceptance", "agreement")
_COLUMNS = (
    *("row", "method", "student", "seed", "status", "seeds", "entries", "bytes_per_token"),
    *(name + end for name in _CSV_METRICS for end in ("", "_low", "_high")),
    *("loss_minus_ce", "loss_minus_ce_low", "loss_minus_ce_high"),
    *("gap_closed", "gap_closed_low", "gap_closed_high", "tokens_per_cpu_second"),
    *("gradient_angle", "gradient_angle_low", "gradient_angle_high", "gradient_batch_tokens"),
)

_LATER_COLUMNS = (  # appended after the columns of tasks, so that earlier columns do not move
    *("perplexity", "perplexity_low", "perplexity_high"),
    *("realised_acceptance", "realised_expected", "realised_error", "realised_verified"),
    *("recovered", "recovered_low", "recovered_high"),
)


def _method_line(row: MethodRow) -> dict[str, Any]:
    line: dict[str, Any] = {
        "row": "method",
        "method": row.method,
        "student": row.student,
        "seeds": len(row.seeds_done),
        "entries": row.entries,
        "bytes_per_token": row.bytes_per_token,
        "tokens_per_cpu_second": row.tokens_per_cpu_second,
    }
    for name, score in row.tasks.items():
        line |= _ends(name, score)
    for name in _CSV_METRICS:
        line |= _ends(name, row.figures.get(name))
    line |= _ends("perplexity", row.perplexity) | _drafts(row.realised)
    line |= _ends("loss_minus_ce", row.minus_ce.get("loss"))
    if row.gradient is not None:
        largest = row.gradient.sizes[-1]
        line |= {
            "gradient_angle": largest.angle.mean,
            "gradient_angle_low": largest.angle.low,
            "gradient_angle_high": largest.angle.high,
            "gradient_batch_tokens": largest.batch_tokens,
        }
    line |= _ends("recovered", row.recovered)
    return line | _ends("gap_closed", row.gap_closed)


def _exp(loss: float) -> float:
    """Compute exp(loss), limited so that a diverged student has a finite perplexity."""
    return math.exp(min(loss, 700.0))


def _ends(name: str, estimate: MetricEstimate | None) -> dict[str, Any]:
    if estimate is None:
        return {}
    ends = estimate.both
    return {name: estimate.mean, f"{name}_low": ends.low, f"{name}_high": ends.high}


def _drafts(realised: Realised | None) -> dict[str, Any]:
    if realised is None:
        return {}
    names = ("acceptance", "expected", "error", "verified")
    return {f"realised_{name}": getattr(realised, name) for name in names}


def _without_intervals(row: RunRow | TeacherRow) -> dict[str, Any]:
    """Return the metrics and task scores of a single model, for CSV columns without intervals."""
    return {name: row.figures.get(name) for name in (*_CSV_METRICS, "perplexity")} | row.tasks


def _run_line(row: RunRow) -> dict[str, Any]:
    speed = None if not row.cpu_seconds or row.tokens is None else row.tokens / row.cpu_seconds
    return {
        "row": "run",
        "method": row.method,
        "student": row.student,
        "seed": row.seed,
        "status": row.status,
        **_without_intervals(row),
        **_drafts(row.realised),
        "gap_closed": row.gap_closed,
        "tokens_per_cpu_second": speed,
    }
