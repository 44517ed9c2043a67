"""Students on held-out windows, beside their teacher.

One pass of the teacher serves every student. Logits exist one slice of positions at a time, the
teacher's and one student's; of every position one float32 a model stays, for calibration.

What each figure is, and what the intervals mean: docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.data import TextDataset
from sparselogits.data.dataset import IGNORE_INDEX
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
from sparselogits.teacher import Engine

BLOCK_ROWS = 32
"""Positions that are measured at a time on a CPU."""

_LOSS, _KL, _AGREEMENT, _ACCEPTANCE, _POSITIONS = range(5)


@dataclass(frozen=True)
class HeldOut:
    """A model on held-out text.

    Windows are those with a position that has a label.

    Args:
        loss: mean negative log-likelihood of the next token, nats.
        kl: mean KL(teacher || student), nats; None without a teacher.
        agreement: share of positions whose likeliest token is the teacher's; None without one.
        acceptance: mean probability that a token drafted by the model is accepted by the teacher,
            sum_i min(p_i, s_i) at every position, both at temperature one; None without one.
        calibration: of the next-token prediction; shares, in [0, 1].
        positions: how many positions the means are over.
        loss_by_window: mean loss of each window, nats.
        kl_by_window: likewise; empty without a teacher.
        agreement_by_window: likewise.
        acceptance_by_window: likewise.
        positions_by_window: how many positions each window's means are over.
        intervals: by name (`FIGURES`) each figure with its 95 % bootstrap interval over windows.
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
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def interval(self, figure: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
        """One of `FIGURES` with its bootstrap interval over windows.

        Raises:
            InvalidArgumentError: for a figure there is not, as without a teacher.
        """
        return bootstrap_interval(
            self.sums(figure), statistic_of(figure), resamples=resamples, seed=seed
        )

    def difference(
        self, other: HeldOut, figure: str = "loss", *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Estimate:
        """This model's figure minus the other's, with the paired bootstrap interval over windows.

        Args:
            other: measured on the same windows; that they hold as many positions is checked.
            figure: one of `FIGURES`.
            resamples: of the windows.
            seed: of the resamples.

        Raises:
            InvalidArgumentError: for other windows, or a figure that one of them has not.
        """
        if self.positions_by_window != other.positions_by_window:
            raise InvalidArgumentError(
                "a difference is between models on the same windows; these were measured on "
                f"{self.positions:,} and {other.positions:,} positions, divided differently"
            )
        first, second = self.sums(figure), other.sums(figure)
        return paired_interval(first, second, statistic_of(figure), resamples=resamples, seed=seed)

    def sums(self, figure: str) -> Tensor:
        """float64 [W, C]: what each window adds to the sums of which `statistic_of` forms a figure.

        Raises:
            InvalidArgumentError: for a figure there is not, as without a teacher.
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
            raise InvalidArgumentError(f"no figure is called {figure!r} here; there are {known}")
        return torch.cat([binned[figure].gaps, count], 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
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
"""Names of the figures that have an interval; `ece` is that of bins of equal width."""


def _gap_size(sums: Tensor) -> Tensor:
    """ECE [R] of [R, B + 1]: gaps of the bins, positions."""
    return sums[:, :-1].abs().sum(1) / sums[:, -1]


def _gap(sums: Tensor) -> Tensor:
    """Mean confidence minus accuracy, likewise."""
    return sums[:, :-1].sum(1) / sums[:, -1]


def statistic_of(figure: str) -> Statistic:
    """What forms one of `FIGURES` of the sums over windows (see `HeldOut.sums`)."""
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
    """Measure students, and the teacher itself under the name "teacher" if there is one.

    Args:
        students: transformers causal language models by name; put in eval mode and back.
        windows: held-out text, tokenised as teacher and students were.
        teacher: for `kl`, `agreement` and `acceptance`.
        resamples: of the windows, for the intervals.
        seed: of the resamples.
        progress: called with windows done and in all.

    Raises:
        InvalidArgumentError: for no windows, no resamples, or a student with fewer ids than the
            teacher.
    """
    if len(windows) == 0:
        raise InvalidArgumentError(
            "there are no held-out windows; build the cache with --holdout 0.05, say"
        )
    learners = {name: StudentLogits(model) for name, model in students.items()}
    modes = {name: model.training for name, model in students.items()}
    for model in students.values():
        model.eval()
    names = [*(["teacher"] if teacher is not None else []), *students]
    found: dict[str, list[_Measured]] = {name: [] for name in names}
    try:
        for done in range(len(windows)):
            measured = _measure_window(windows[done], learners, teacher)
            for name, own in measured.items():
                found[name].append(own)
            if progress is not None:
                progress(done + 1, len(windows))
    finally:
        for name, model in students.items():
            model.train(modes[name])
    return {
        name: _summarise(own, with_teacher=teacher is not None, resamples=resamples, seed=seed)
        for name, own in found.items()
    }


@dataclass(frozen=True)
class _Measured:
    """A model on one window, or on a slice of it.

    Args:
        sums: float64 [5], of loss, KL, agreements, acceptances and positions.
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
    """Divide a run of positions so that what is as wide as the vocabulary stays small on a CPU.

    A fresh tensor of tens of megabytes is mapped by the system page by page, which costs more than
    the arithmetic on it; a small one comes from memory that was used a moment ago.
    """
    rows = positions.stop - positions.start
    if taught is None or taught.device.type == "cpu":
        rows = BLOCK_ROWS
    for start in range(positions.start, positions.stop, rows):
        yield slice(start, min(start + rows, positions.stop))


def _log_softmax(logits: Tensor, counted: Tensor) -> Tensor:
    """Log-probabilities of the rows that have a label."""
    if not bool(counted.all()):
        logits = logits[counted.to(logits.device)]
    return logits.log_softmax(1)


@dataclass(frozen=True)
class _Taught:
    """The teacher on some positions, computed once for every student.

    Args:
        log_p: float32 [P, V], log-probabilities.
        p: their exponentials.
        largest: float32 [P], the largest log-probability.
        likeliest: int64 [P], its id.
    """

    log_p: Tensor
    p: Tensor
    largest: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, log_p: Tensor) -> _Taught:
        """Compute everything from the log-probabilities."""
        largest, likeliest = log_p.max(1)
        return cls(log_p, log_p.exp(), largest, likeliest)


def _of_teacher(known: _Taught, labels: Tensor) -> _Measured:
    """Measure the teacher against the labels; beside itself it agrees everywhere."""
    sums = torch.zeros(5, dtype=torch.float64)
    sums[_LOSS] = _loss(known.log_p, labels)
    sums[_AGREEMENT] = sums[_ACCEPTANCE] = sums[_POSITIONS] = len(labels)
    return _Measured(sums, signed_confidence(known.largest, known.likeliest, labels))


def _of_student(log_s: Tensor, labels: Tensor, known: _Taught | None) -> _Measured:
    """Measure a student, float32 [P, V'], against the labels and the teacher, if there is one."""
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
        raise InvalidArgumentError("no held-out position has a label; there is nothing to measure")
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
