"""The results of a comparison: `results.json`, and the same without curves as CSV.

The schema is these classes; `read_results` reads a file back. Metrics of one run are in `runs`,
those of a method over its seeds, with intervals, in `methods`. The per-window sums from which the
intervals are computed are in `windows.npz` (windows.py) and in `finished/runs` (finished.py).
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sparselogits.errors import CacheError

FORMAT = 1


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Ends(_Value):
    """The ends of a 95 % interval; None if there are too few values."""

    low: float | None
    high: float | None


class Figure(_Value):
    """A metric of a method over its seeds, with three intervals (see `SeedEstimate`).

    Results written before windows.npz existed hold a bootstrap over windows and seeds in `both`,
    and in `gap_closed` a mean of the seeds' ratios with Student's t.
    """

    mean: float
    windows: Ends = Field(description="bootstrap over held-out windows, students fixed")
    seeds: Ends = Field(description="Student's t over seeds, Fieller's for shares, text fixed")
    both: Ends = Field(description="over seeds and windows")


class ReliabilityBin(_Value):
    """A point of a reliability diagram, over the positions of all seeds."""

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


class Realised(_Value):
    """Drafting over all seeds: accepted tokens, and their expected share."""

    verified: int
    accepted: int
    acceptance: float
    expected: float
    error: float = Field(description="standard deviation of acceptance about expected")


class OfBatches(_Value):
    """The mean of a metric over batches of one size, with Student's t at 95 %."""

    mean: float
    low: float | None = Field(description="None for a single batch")
    high: float | None


class GradientSize(_Value):
    """The gradient of a target for all parameters of the student, in batches of one size."""

    batch_tokens: int
    batches: int
    angle: OfBatches = Field(description="to full distillation's, degrees")
    norm_ratio: OfBatches = Field(description="to full distillation's")
    bias: float | None = Field(
        description="over the norm of full distillation's; None if not distinguishable from zero"
    )
    bias_below: float | None = Field(description="upper bound of the bias, in that case")
    noise: float = Field(description="over the norm of full distillation's")


class Gradient(_Value):
    """The gradient of a method's targets, compared with that of full distillation.

    Measured on one trained student of the comparison, the same for all methods (docs/compare.md).
    """

    student_method: str = Field(description="method that the measured student was trained with")
    student_seed: int
    student_folder: str = Field(description="folder of that run in the directory of the comparison")
    entries: float | None = Field(
        description="entries per position on this text; None for labels alone"
    )
    draws: int = Field(description="draws per batch; one without randomness")
    sizes: list[GradientSize] = Field(description="ascending in tokens per batch")


class MethodRow(_Value):
    """A method with one student, over its seeds."""

    method: str
    student: str
    family: str = Field(description="name of the training method, `none`, or the sampler")
    spec: dict[str, Any] = Field(description="as in the recipe")
    sampler: dict[str, Any] | None = Field(description="its parameters, a budget resolved")
    unbiased: bool | None = Field(description="None without cached targets")
    entries: float | None = Field(description="entries per position that training used")
    bytes_per_token: float | None = Field(
        description="size of the targets in the cache, without the text"
    )
    seeds_done: list[int]
    seeds_failed: list[int]
    seeds_not_run: list[int]
    figures: dict[str, Figure] = Field(description="loss, kl, ... (evaluate.METRICS)")
    minus_ce: dict[str, Figure] = Field(
        description="the same less those of CE, paired by seed and window; empty without CE"
    )
    gap_closed: Figure | None = Field(
        description="per cent of the way from CE's loss to full KD's, over seeds that all three "
        "have; None where that gap is not distinguishable from zero"
    )
    recovered: Figure | None = Field(
        None,
        description="per cent of the way from the untrained student's KL to full KD's, over seeds "
        "that all three have; None where full KD's is not distinguishably lower",
    )
    reliability: list[ReliabilityBin] = Field(description="15 bins of equal width")
    tasks: dict[str, Figure] = Field(
        default_factory=dict,
        description="by TASK/METRIC, zero-shot; `windows` and `both` are over a task's samples",
    )
    realised: Realised | None
    tokens_per_second: float | None = Field(description="wall time, median over runs")
    tokens_per_cpu_second: float | None = Field(description="processor time, median over runs")
    gradient: Gradient | None = Field(None, description="None if not measured")
    gradient_failure: str | None = Field(None, description="why the measurement failed")

    @property
    def perplexity(self) -> Figure | None:
        """exp of the mean loss and of its ends, computed from the stored loss."""
        loss = self.figures.get("loss")
        if loss is None:
            return None

        def ends(own: Ends) -> Ends:
            low, high = (None if end is None else _exp(end) for end in (own.low, own.high))
            return Ends(low=low, high=high)

        return Figure(
            mean=_exp(loss.mean),
            windows=ends(loss.windows),
            seeds=ends(loss.seeds),
            both=ends(loss.both),
        )


class RunRow(_Value):
    """One student."""

    method: str
    student: str
    seed: int
    status: Literal["done", "failed", "not run"]
    message: str | None = Field(None, description="why the run failed")
    folder: str | None = Field(None, description="in the directory of the comparison")
    figures: dict[str, float] = Field(
        default_factory=dict,
        description="loss, perplexity, kl, agreement, acceptance, accuracy, confidence, "
        "overconfidence, ece, ece_equal_mass",
    )
    gap_closed: float | None = Field(None, description="per cent, with CE and full KD of this seed")
    realised: Realised | None = None
    curve: list[tuple[int, float]] = Field(
        default_factory=list, description="(step, training cross-entropy to the labels, nats)"
    )
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = Field(
        None, description="wall time of training; None if training was resumed"
    )
    cpu_seconds: float | None = Field(
        None, description="processor time of training; None if training was resumed"
    )
    commit: str | None = Field(None, description="commit of the source tree")
    tasks: dict[str, float] = Field(default_factory=dict, description="zero-shot, by TASK/METRIC")
    tasks_failed: dict[str, str] = Field(default_factory=dict, description="why, by task")


class TeacherRow(_Value):
    """The teacher on the same held-out windows."""

    figures: dict[str, float]
    reliability: list[ReliabilityBin]
    positions: int
    windows: int
    tasks: dict[str, float] = Field(default_factory=dict, description="zero-shot, by TASK/METRIC")
    tasks_failed: dict[str, str] = Field(default_factory=dict, description="why, by task")


class Results(_Value):
    """A comparison."""

    format: int = FORMAT
    title: str
    complete: bool = Field(description="whether every run of the recipe is finished")
    settings: dict[str, Any] = Field(
        description="recipe, teacher, corpus, numbers of parameters of the students"
    )
    provenance: dict[str, str] = Field(description="commit, versions, processor, threads, date")
    teacher: TeacherRow | None
    methods: list[MethodRow]
    runs: list[RunRow]

    @property
    def tasks_not_measured(self) -> list[str]:
        """Tasks that failed for runs or the teacher, with the reason, each message once."""
        failed = [run.tasks_failed for run in self.runs]
        failed += [self.teacher.tasks_failed] if self.teacher else []
        return list(dict.fromkeys(f"{n}: {why}" for own in failed for n, why in own.items()))

    @property
    def outgrown_teacher(self) -> list[str]:
        """A message per student that reaches the teacher's loss from the text alone."""
        if self.teacher is None:
            return []
        known = self.teacher.figures["loss"]
        return [
            f"{row.student}: {row.method} reached a loss of {own.mean:.3f}, the teacher has "
            f"{known:.3f} on the same windows. It is not good enough to teach this student; take a "
            "better one, or compare on less text"
            for row in self.methods
            if row.family == "ce" and (own := row.figures.get("loss")) and own.mean <= known
        ]

    def to_csv(self) -> str:
        """Return CSV: a line per method and student, per run, and for the teacher."""
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
            writer.writerow({"row": "teacher", **_plain_figures(self.teacher)})
        return out.getvalue()


def read_results(path: Path) -> Results:
    """Read the results of a comparison.

    Args:
        path: `results.json`, or the directory that holds it.

    Raises:
        CacheError: there are no results, or they are of another format.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        found = Results.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CacheError(
            f"there are no results at {file} ({error.strerror}); `sparselogits compare` writes them"
        ) from error
    except ValueError as error:
        raise CacheError(f"{file} holds no results this version can read: {error}") from error
    if found.format != FORMAT:
        raise CacheError(f"{file} has format {found.format}, this version reads {FORMAT}")
    return found


_FIGURES = ("loss", "kl", "ece", "ece_equal_mass", "overconfidence", "acceptance", "agreement")
_COLUMNS = (
    *("row", "method", "student", "seed", "status", "seeds", "entries", "bytes_per_token"),
    *(name + end for name in _FIGURES for end in ("", "_low", "_high")),
    *("loss_minus_ce", "loss_minus_ce_low", "loss_minus_ce_high"),
    *("gap_closed", "gap_closed_low", "gap_closed_high", "tokens_per_cpu_second"),
    *("gradient_angle", "gradient_angle_low", "gradient_angle_high", "gradient_batch_tokens"),
)

_LATER_COLUMNS = (  # after all others, which keep their places
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
    for name, figure in row.tasks.items():
        line |= _ends(name, figure)
    for name in _FIGURES:
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
    """Return exp of a loss, finite also for a student that has diverged."""
    return math.exp(min(loss, 700.0))


def _ends(name: str, figure: Figure | None) -> dict[str, Any]:
    if figure is None:
        return {}
    return {name: figure.mean, f"{name}_low": figure.both.low, f"{name}_high": figure.both.high}


def _drafts(realised: Realised | None) -> dict[str, Any]:
    if realised is None:
        return {}
    names = ("acceptance", "expected", "error", "verified")
    return {f"realised_{name}": getattr(realised, name) for name in names}


def _plain_figures(row: RunRow | TeacherRow) -> dict[str, Any]:
    """Return metrics and task scores of one model, without intervals."""
    return {name: row.figures.get(name) for name in (*_FIGURES, "perplexity")} | row.tasks


def _run_line(row: RunRow) -> dict[str, Any]:
    speed = None if not row.cpu_seconds or row.tokens is None else row.tokens / row.cpu_seconds
    return {
        "row": "run",
        "method": row.method,
        "student": row.student,
        "seed": row.seed,
        "status": row.status,
        **_plain_figures(row),
        **_drafts(row.realised),
        "gap_closed": row.gap_closed,
        "tokens_per_cpu_second": speed,
    }
