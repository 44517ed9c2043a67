"""Measure students and their teacher on held-out windows.

One pass of the teacher serves all students. Logits of the teacher and one student exist for one
slice of positions at a time; one float32 per position and model is kept, for calibration.

docs/evaluation.md defines the metrics and their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.data import TextDataset
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.acceptance import expected_acceptance
from sparselogits.evaluate.calibration import (
    Calibration,
    Reliability,
    measure_calibration,
    signed_confidence,
)
from sparselogits.evaluate.intervals import (
    RESAMPLES,
    Estimate,
    Statistic,
    bootstrap_interval,
    paired_interval,
    ratio,
)
from sparselogits.evaluate.passes import StudentLogits, model_inputs, require_ids, teacher_slices
from sparselogits.language_model import in_eval_mode
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.teacher import Engine

BLOCK_ROWS = 32
"""Number of positions that are measured at a time on a CPU."""

_LOSS, _KL, _AGREEMENT, _ACCEPTANCE, _POSITIONS = range(5)


@dataclass(frozen=True)
class HeldOut:
    """Hold the metrics of one model on held-out text.

    Windows without a label are left out.

    Args:
        loss: mean negative log-likelihood of the next token, nats.
        kl: mean KL(teacher || student), nats; None without a teacher.
        agreement: share of positions whose likeliest token is the teacher's; None without a
            teacher.
        acceptance: mean probability that a token drafted by the model is accepted by the teacher,
            sum_i min(p_i, s_i) at every position, both at temperature one; None without a teacher.
        calibration: calibration of the next-token predictions, as shares in [0, 1].
        positions: number of positions.
        loss_by_window: mean loss of each window, nats.
        kl_by_window: mean KL of each window, nats; empty without a teacher.
        agreement_by_window: agreement of each window; empty without a teacher.
        acceptance_by_window: acceptance of each window; empty without a teacher.
        positions_by_window: number of positions of each window.
        intervals: metrics by name (`FIGURES`) with their 95 % bootstrap intervals over windows.
    """

    loss: float
    kl: float | None
    agreement: float | None
    acceptance: float | None
    calibration: Calibration
    positions: int
    loss_by_window: tuple[float, ...]
    kl_by_window: tuple[float, ...]
    agreement_by_window: tuple[float, ...]
    acceptance_by_window: tuple[float, ...]
    positions_by_window: tuple[int, ...]
    intervals: dict[str, Estimate] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Perplexity, exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def interval(self, figure: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
        """Compute a metric with its bootstrap interval over windows.

        Raises:
            InvalidArgumentError: If the metric does not exist, or needs a teacher.
        """
        return bootstrap_interval(
            self.sums(figure), statistic_of(figure), resamples=resamples, seed=seed
        )

    def difference(
        self, other: HeldOut, figure: str = "loss", *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Estimate:
        """Compute this model's metric minus the other's, with its paired interval over windows.

        Args:
            other: model on the same windows; the numbers of positions are compared.
            figure: name of the metric, one of `FIGURES`.
            resamples: number of resamples of the windows.
            seed: random seed of the resamples.

        Raises:
            InvalidArgumentError: If the windows differ, or one model does not have the metric.
        """
        if self.positions_by_window != other.positions_by_window:
            raise InvalidArgumentError(
                "the models were measured on different windows, with "
                f"{self.positions:,} and {other.positions:,} positions; measure both on the same "
                "windows"
            )
        first, second = self.sums(figure), other.sums(figure)
        return paired_interval(first, second, statistic_of(figure), resamples=resamples, seed=seed)

    def sums(self, figure: str) -> Tensor:
        """Return each window's contribution to the sums for `statistic_of`, float64 [W, C].

        Raises:
            InvalidArgumentError: If the metric does not exist, or needs a teacher.
        """
        count = torch.tensor(self.positions_by_window, dtype=torch.float64)[:, None]
        by_window = {
            "loss": self.loss_by_window,
            "kl": self.kl_by_window,
            "agreement": self.agreement_by_window,
            "acceptance": self.acceptance_by_window,
        }
        if values := by_window.get(figure):
            mean = torch.tensor(values, dtype=torch.float64)[:, None]
            return torch.cat([mean * count, count], 1)
        binned: dict[str, Reliability] = {
            "ece": self.calibration.equal_width,
            "ece_equal_mass": self.calibration.equal_mass,
            "overconfidence": self.calibration.equal_width,
        }
        if figure not in binned:
            known = [*(name for name, own in by_window.items() if own), *binned]
            raise InvalidArgumentError(f"unknown metric {figure!r}; available: {known}")
        return torch.cat([binned[figure].gaps, count], 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "kl": self.kl,
            "agreement": self.agreement,
            "acceptance": self.acceptance,
            "calibration": self.calibration.to_json(),
            "positions": self.positions,
            "loss_by_window": list(self.loss_by_window),
            "kl_by_window": list(self.kl_by_window),
            "agreement_by_window": list(self.agreement_by_window),
            "acceptance_by_window": list(self.acceptance_by_window),
            "positions_by_window": list(self.positions_by_window),
            "intervals": {name: found.to_json() for name, found in self.intervals.items()},
        }


ALONE = ("loss", "ece", "ece_equal_mass", "overconfidence")
BESIDE_A_TEACHER = ("kl", "agreement", "acceptance")
FIGURES = (*ALONE, *BESIDE_A_TEACHER)
"""Names of the metrics with an interval; `ece` is the one of bins of equal width."""


def _gap_size(sums: Tensor) -> Tensor:
    """Compute ECE [R] from sums [R, B + 1]: gaps of the bins, then positions."""
    return sums[:, :-1].abs().sum(1) / sums[:, -1]


def _gap(sums: Tensor) -> Tensor:
    """Compute mean confidence minus accuracy [R] from sums [R, B + 1]."""
    return sums[:, :-1].sum(1) / sums[:, -1]


def statistic_of(figure: str) -> Statistic:
    """Return the function that computes a metric from the sums over windows of `HeldOut.sums`."""
    binned: dict[str, Statistic] = {
        "ece": _gap_size,
        "ece_equal_mass": _gap_size,
        "overconfidence": _gap,
    }
    return binned.get(figure, ratio)


@torch.no_grad()
def evaluate(
    students: Mapping[str, nn.Module],
    windows: TextDataset,
    teacher: Engine | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, HeldOut]:
    """Measure students, and the teacher under the name "teacher" if one is given.

    Args:
        students: transformers causal language models by name, in eval mode during the call.
        windows: held-out text, with the tokenizer of teacher and students.
        teacher: teacher for `kl`, `agreement` and `acceptance`; None leaves these out.
        resamples: number of resamples of the windows, for the intervals.
        seed: random seed of the resamples.
        progress: function that is called with the windows done and their number.

    Raises:
        InvalidArgumentError: If there are no windows or resamples, or a student has fewer ids than
            the teacher.
    """
    if len(windows) == 0:
        raise InvalidArgumentError(
            "there are no held-out windows; build the cache with a hold-out, as in --holdout 0.05"
        )
    learners = {name: StudentLogits(model) for name, model in students.items()}
    names = [*(["teacher"] if teacher is not None else []), *students]
    found: dict[str, list[_Measured]] = {name: [] for name in names}
    with ExitStack() as modes:
        for model in students.values():
            modes.enter_context(in_eval_mode(model))
        for done in range(len(windows)):
            measured = _measure_window(windows[done], learners, teacher)
            for name, own in measured.items():
                found[name].append(own)
            if progress is not None:
                progress(done + 1, len(windows))
    return {
        name: _summarise(own, with_teacher=teacher is not None, resamples=resamples, seed=seed)
        for name, own in found.items()
    }


@dataclass(frozen=True)
class _Measured:
    """Hold sums of one model over one window, or over a slice of it.

    Args:
        sums: float64 [5], sums of loss, KL, agreements, acceptances and positions.
        confidence: float32 [P], see `signed_confidence`.
    """

    sums: Tensor
    confidence: Tensor


def _measure_window(
    item: Mapping[str, Any], learners: Mapping[str, StudentLogits], teacher: Engine | None
) -> dict[str, _Measured]:
    labels = item["shift_labels"]
    logits_of = {name: own.over(model_inputs(item)) for name, own in learners.items()}
    names = [*(["teacher"] if teacher is not None else []), *learners]
    pieces: dict[str, list[_Measured]] = {name: [] for name in names}
    for positions, taught in teacher_slices(teacher, item):
        for rows in _blocks(positions, taught):
            wanted = labels[rows]
            counted = wanted != IGNORE_INDEX
            if not bool(counted.any()):
                continue
            wanted = wanted[counted]
            known = None
            if taught is not None:
                here = slice(rows.start - positions.start, rows.stop - positions.start)
                known = _Taught.of(_log_softmax(taught[here], counted))
                pieces["teacher"].append(_of_teacher(known, wanted))
            for name, logits in logits_of.items():
                log_s = _log_softmax(logits(rows), counted)
                pieces[name].append(_of_student(log_s, wanted, known))
    return {name: _joined(own) for name, own in pieces.items()}


def _blocks(positions: slice, taught: Tensor | None) -> Iterator[slice]:
    """Divide a slice of positions, so that tensors as wide as the vocabulary stay small on a CPU.

    The system maps a new tensor of tens of megabytes page by page, which costs more than the
    arithmetic on it; a small tensor reuses memory.
    """
    rows = positions.stop - positions.start
    if taught is None or taught.device.type == "cpu":
        rows = BLOCK_ROWS
    for start in range(positions.start, positions.stop, rows):
        yield slice(start, min(start + rows, positions.stop))


def _log_softmax(logits: Tensor, counted: Tensor) -> Tensor:
    """Compute the log-probabilities of the rows that have a label."""
    if not bool(counted.all()):
        logits = logits[counted.to(logits.device)]
    return logits.log_softmax(1)


@dataclass(frozen=True)
class _Taught:
    """Hold the teacher's predictions at some positions, computed once for all students.

    Args:
        log_p: float32 [P, V], log-probabilities.
        p: float32 [P, V], probabilities.
        largest: float32 [P], largest log-probability.
        likeliest: int64 [P], id with the largest log-probability.
    """

    log_p: Tensor
    p: Tensor
    largest: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, log_p: Tensor) -> _Taught:
        """Compute probabilities and each position's most likely token from log-probabilities."""
        largest, likeliest = log_p.max(1)
        return cls(log_p, log_p.exp(), largest, likeliest)


def _of_teacher(known: _Taught, labels: Tensor) -> _Measured:
    """Measure the teacher against the labels; its agreement with itself is 1."""
    sums = torch.zeros(5, dtype=torch.float64)
    sums[_LOSS] = _loss(known.log_p, labels)
    sums[_AGREEMENT] = sums[_ACCEPTANCE] = sums[_POSITIONS] = len(labels)
    return _Measured(sums, signed_confidence(known.largest, known.likeliest, labels))


def _of_student(log_s: Tensor, labels: Tensor, known: _Taught | None) -> _Measured:
    """Measure a student, float32 [P, V'], against the labels and the teacher, if given."""
    largest, likeliest = log_s.max(1)
    sums = torch.zeros(5, dtype=torch.float64)
    sums[_LOSS] = _loss(log_s, labels)
    sums[_POSITIONS] = len(labels)
    if known is not None:
        common = known.log_p.shape[1]
        require_ids(log_s.shape[1], common)
        p, log_p = known.p.to(log_s.device), known.log_p.to(log_s.device)
        # where p = 0 the term is 0, also against log s = -inf
        terms = (log_p - log_s[:, :common]).mul_(p).masked_fill_(p == 0, 0.0)
        sums[_KL] = float(terms.sum(1).double().sum())
        sums[_AGREEMENT] = float((likeliest == known.likeliest.to(likeliest.device)).sum())
        sums[_ACCEPTANCE] = float(expected_acceptance(log_p, log_s).sum())
    return _Measured(sums, signed_confidence(largest, likeliest, labels))


def _loss(log_s: Tensor, labels: Tensor) -> float:
    return float(-log_s.gather(1, labels.to(log_s.device)[:, None]).double().sum())


def _joined(slices: list[_Measured]) -> _Measured:
    none = torch.zeros(5, dtype=torch.float64)
    sums = torch.stack([none, *(own.sums for own in slices)]).sum(0)
    return _Measured(sums, torch.cat([torch.empty(0), *(own.confidence for own in slices)]))


def _summarise(
    measured: list[_Measured], *, with_teacher: bool, resamples: int, seed: int
) -> HeldOut:
    used = [own for own in measured if len(own.confidence)]
    if not used:
        raise InvalidArgumentError(
            "no held-out position has a label, so nothing can be measured: use other text"
        )
    table = torch.stack([own.sums for own in used])
    means = table / table[:, _POSITIONS:]
    total = (table.sum(0) / table[:, _POSITIONS].sum()).tolist()

    def by_window(column: int) -> tuple[float, ...]:
        return tuple(means[:, column].tolist())

    result = HeldOut(
        loss=total[_LOSS],
        kl=total[_KL] if with_teacher else None,
        agreement=total[_AGREEMENT] if with_teacher else None,
        acceptance=total[_ACCEPTANCE] if with_teacher else None,
        calibration=measure_calibration([own.confidence for own in used]),
        positions=int(table[:, _POSITIONS].sum()),
        loss_by_window=by_window(_LOSS),
        kl_by_window=by_window(_KL) if with_teacher else (),
        agreement_by_window=by_window(_AGREEMENT) if with_teacher else (),
        acceptance_by_window=by_window(_ACCEPTANCE) if with_teacher else (),
        positions_by_window=tuple(len(own.confidence) for own in used),
    )
    names = FIGURES if with_teacher else ALONE
    intervals = {n: result.interval(n, resamples=resamples, seed=seed) for n in names}
    return replace(result, intervals=intervals)
