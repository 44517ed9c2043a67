"""Measure students and their teacher on held-out windows; docs/evaluation.md defines the metrics.

The teacher runs once for all students. Logits are computed for one slice of positions at a time,
except by a model whose head cannot be run separately; one float32 per position and model is
stored, for calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.data import DraftVocabulary, TextDataset
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.acceptance import expected_acceptance, restricted_acceptance
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
from sparselogits.evaluate.passes import (
    StudentLogits,
    labelled_positions,
    model_inputs,
    require_ids,
    teacher_slices,
    without_padding,
)
from sparselogits.language_model import in_eval_mode, require_predicting
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.teacher import Engine

BLOCK_ROWS = 32
"""Number of positions whose logits are processed together, unless the teacher is on a GPU."""

_LOSS, _KL, _AGREEMENT, _ACCEPTANCE, _POSITIONS = range(5)


@dataclass(frozen=True)
class HeldOut:
    """Metrics of a model on held-out text, without windows that have no label.

    Args:
        loss: mean negative log-likelihood of the labels, nats.
        kl: mean KL(teacher || student), nats; None without a teacher.
        agreement: share of positions at which model and teacher have the same most likely token;
            None without a teacher.
        acceptance: mean probability that a token drafted by the model is accepted by the teacher,
            sum_i min(p_i, s_i) at every position, both at temperature one; None without a teacher.
            With a draft vocabulary see `restricted_acceptance`; the teacher's metric is then the
            mean probability of the draft vocabulary, which no drafter can exceed.
        calibration: calibration of the predictions.
        positions: number of positions with a label.
        loss_by_window: mean loss of each window, nats.
        kl_by_window: mean KL of each window, nats; empty without a teacher.
        agreement_by_window: agreement of each window; empty without a teacher.
        acceptance_by_window: acceptance of each window; empty without a teacher.
        positions_by_window: number of positions with a label in each window.
        intervals: estimates with 95 % bootstrap intervals over windows, by the name of the metric:
            all of `METRICS`, without a teacher those that need none.
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
        """Perplexity, exp(loss), at most exp(700)."""
        return math.exp(min(self.loss, 700.0))

    def interval(self, metric: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
        """Compute a metric with its bootstrap interval over windows.

        Args:
            metric: name of the metric, one of `METRICS`.
            resamples: number of bootstrap resamples of the windows.
            seed: random seed for the resamples.

        Raises:
            InvalidArgumentError: the metric does not exist or needs a teacher, or there are no
                resamples.
        """
        return bootstrap_interval(
            self.sums(metric), statistic_of(metric), resamples=resamples, seed=seed
        )

    def difference(
        self, other: HeldOut, metric: str = "loss", *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Estimate:
        """Compute this model's metric minus the other's, with a paired interval over windows.

        Args:
            other: metrics of the other model on the same windows.
            metric: name of the metric, one of `METRICS`.
            resamples: number of bootstrap resamples of the windows.
            seed: random seed for the resamples.

        Raises:
            InvalidArgumentError: the numbers of positions per window differ, one model does not
                have the metric, or there are no resamples.
        """
        if self.positions_by_window != other.positions_by_window:
            raise InvalidArgumentError(
                "the models were measured on different windows, with "
                f"{self.positions:,} and {other.positions:,} positions; measure both on the same "
                "windows"
            )
        first, second = self.sums(metric), other.sums(metric)
        return paired_interval(first, second, statistic_of(metric), resamples=resamples, seed=seed)

    def sums(self, metric: str) -> Tensor:
        """Return the sums per window from which `statistic_of` computes a metric.

        Args:
            metric: name of the metric, one of `METRICS`.

        Returns:
            float64 [W, C]. The last column is the number of positions. The others are
            `Reliability.gaps` for binned metrics (`ece`, `ece_equal_mass`, `overconfidence`),
            otherwise the sum of the metric over positions.

        Raises:
            InvalidArgumentError: the metric does not exist, or needs a teacher.
        """
        count = torch.tensor(self.positions_by_window, dtype=torch.float64)[:, None]
        by_window = {
            "loss": self.loss_by_window,
            "kl": self.kl_by_window,
            "agreement": self.agreement_by_window,
            "acceptance": self.acceptance_by_window,
        }
        if values := by_window.get(metric):
            mean = torch.tensor(values, dtype=torch.float64)[:, None]
            return torch.cat([mean * count, count], 1)
        binned: dict[str, Reliability] = {
            "ece": self.calibration.equal_width,
            "ece_equal_mass": self.calibration.equal_mass,
            "overconfidence": self.calibration.equal_width,
        }
        if metric not in binned:
            known = [*(name for name, values in by_window.items() if values), *binned]
            raise InvalidArgumentError(f"unknown metric {metric!r}; available: {known}")
        return torch.cat([binned[metric].gaps, count], 1)

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as JSON values."""
        intervals = {name: found.to_json() for name, found in self.intervals.items()}
        shown = {"loss": self.loss, "perplexity": self.perplexity, **vars(self)}
        return shown | {"calibration": self.calibration.to_json(), "intervals": intervals}


_WITHOUT_TEACHER = ("loss", "ece", "ece_equal_mass", "overconfidence")
METRICS = (*_WITHOUT_TEACHER, "kl", "agreement", "acceptance")
"""Names of the metrics with an interval; `ece` uses bins of equal width."""


def _ece(sums: Tensor) -> Tensor:
    """Compute ECE [R] from sums [R, B + 1]: gaps of the bins, then the number of positions."""
    return sums[:, :-1].abs().sum(1) / sums[:, -1]


def _overconfidence(sums: Tensor) -> Tensor:
    """Compute mean confidence minus accuracy [R] from sums [R, B + 1], see `_ece`."""
    return sums[:, :-1].sum(1) / sums[:, -1]


def statistic_of(metric: str) -> Statistic:
    """Return the function that computes a metric from `HeldOut.sums`, summed over windows."""
    if metric == "overconfidence":
        return _overconfidence
    return _ece if metric.startswith("ece") else ratio


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
    """Measure students, and optionally their teacher, on held-out windows.

    Args:
        students: transformers language models by name, set to eval mode during the call: masked
            language models if the windows are corrupted, otherwise causal ones.
        windows: held-out text, tokenised with the tokenizer of teacher and students. With a draft
            vocabulary (`windows.draft`), students have a head for the classes of that vocabulary,
            and metrics are those of the distributions over the classes; for `acceptance` see
            `restricted_acceptance`.
        teacher: teacher for `kl`, `agreement` and `acceptance`; None to omit these.
        resamples: number of bootstrap resamples of the windows, for the intervals.
        seed: random seed for the resamples.
        progress: function that is called with the number of windows done and the total number.

    Returns:
        The metrics by name of the student; those of the teacher under the name "teacher".

    Raises:
        InvalidArgumentError: there are no windows, labels or resamples; a student is named
            "teacher" although a teacher is given, or has fewer ids than the teacher, or not one
            output per class of the draft vocabulary; or a model is causal where the windows need a
            masked one, or the reverse.

    Examples:
        >>> from pathlib import Path
        >>> from transformers import AutoModelForCausalLM
        >>> from sparselogits.corpus import PackedCorpus
        >>> from sparselogits.data import TextDataset
        >>> student = AutoModelForCausalLM.from_pretrained("my-student")
        >>> windows = TextDataset(PackedCorpus.open(Path("my-cache/corpus")))
        >>> found = evaluate({"student": student}, windows)["student"]
        >>> sorted(found.intervals)
        ['ece', 'ece_equal_mass', 'loss', 'overconfidence']
    """
    if len(windows) == 0:
        raise InvalidArgumentError(
            "there are no held-out windows; build the cache with a hold-out, as in --holdout 0.05"
        )
    if teacher is not None and "teacher" in students:
        raise InvalidArgumentError(
            "a student has the name 'teacher', which the teacher's metrics have; rename the student"
        )
    masked = getattr(windows, "corruption", None) is not None
    learners = {name: StudentLogits(m, masked=masked) for name, m in students.items()}
    taught = getattr(teacher, "model", None)
    if taught is not None:
        require_predicting(taught, masked=masked, whose="the teacher", of="this text")
    draft = getattr(windows, "draft", None)
    names = [*(["teacher"] if teacher is not None else []), *students]
    found: dict[str, list[_Measured]] = {name: [] for name in names}
    with ExitStack() as modes:
        for model in students.values():
            modes.enter_context(in_eval_mode(model))
        for done in range(len(windows)):
            by_model = _measure_window(windows[done], learners, teacher, draft)
            for name, measured in by_model.items():
                found[name].append(measured)
            if progress is not None:
                progress(done + 1, len(windows))
    return {
        name: _summarise(measured, with_teacher=teacher is not None, resamples=resamples, seed=seed)
        for name, measured in found.items()
    }


@dataclass(frozen=True)
class _Measured:
    """Sums of one model's metrics over a window or a slice of a window."""

    sums: Tensor  # of loss, KL, agreements, acceptances and positions, float64 [5]
    confidence: Tensor  # per position, float32 [P], see `signed_confidence`


def _measure_window(
    item: Mapping[str, Any],
    learners: Mapping[str, StudentLogits],
    teacher: Engine | None,
    draft: DraftVocabulary | None,
) -> dict[str, _Measured]:
    item = without_padding(item)
    labels = item["shift_labels"]
    logits_of = {name: student.over(model_inputs(item)) for name, student in learners.items()}
    names = [*(["teacher"] if teacher is not None else []), *learners]
    pieces: dict[str, list[_Measured]] = {name: [] for name in names}
    # only positions with a label are multiplied by a head: few, for a masked language model
    for part, taught in teacher_slices(teacher, item, labels != IGNORE_INDEX):
        positions = labelled_positions(labels, part)
        for rows in _blocks(len(positions), taught):
            true_tokens = labels[positions[rows]]
            predicted = None
            if taught is not None:
                log_p = taught[rows].log_softmax(1)
                if draft is not None:
                    log_p = draft.restrict_log_probabilities(log_p)
                predicted = _TeacherPredictions.of(log_p, restricted=draft is not None)
                pieces["teacher"].append(_measure_teacher(predicted, true_tokens))
            for name, logits in logits_of.items():
                log_s = logits(positions[rows]).log_softmax(1)
                if draft is not None:
                    draft.require_head(log_s.shape[1])
                pieces[name].append(_measure_student(log_s, true_tokens, predicted))
    return {name: _joined(slices) for name, slices in pieces.items()}


def _blocks(rows: int, taught: Tensor | None) -> Iterator[slice]:
    """Divide rows of logits into blocks of `BLOCK_ROWS`, or one block if the teacher is on a GPU.

    On a CPU, mapping memory for one large tensor would take longer than the arithmetic.
    """
    size = BLOCK_ROWS if taught is None or taught.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


@dataclass(frozen=True)
class _TeacherPredictions:
    """Predictions of the teacher at P positions, computed once for all students."""

    log_p: Tensor  # log-probabilities, float32 [P, V]
    p: Tensor  # probabilities, float32 [P, V]
    largest: Tensor  # largest log-probability, float32 [P]
    likeliest: Tensor  # most likely id, int64 [P]
    restricted: bool  # whether the last column is the rest of a draft vocabulary

    @classmethod
    def of(cls, log_p: Tensor, *, restricted: bool) -> _TeacherPredictions:
        """Compute probabilities and most likely tokens from log-probabilities, float32 [P, V]."""
        largest, likeliest = log_p.max(1)
        return cls(log_p, log_p.exp(), largest, likeliest, restricted)


def _measure_teacher(predicted: _TeacherPredictions, labels: Tensor) -> _Measured:
    """Measure the teacher's predictions; the teacher's agreement is 1 at each position."""
    sums = torch.zeros(5, dtype=torch.float64)
    sums[_LOSS] = _loss(predicted.log_p, labels)
    sums[_AGREEMENT] = sums[_ACCEPTANCE] = sums[_POSITIONS] = len(labels)
    if predicted.restricted:
        log_p = predicted.log_p
        sums[_ACCEPTANCE] = float(restricted_acceptance(log_p, log_p).sum())
    return _Measured(sums, signed_confidence(predicted.largest, predicted.likeliest, labels))


def _measure_student(
    log_s: Tensor, labels: Tensor, predicted: _TeacherPredictions | None
) -> _Measured:
    """Measure the log-probabilities of a student, float32 [P, V'], at positions with a label."""
    largest, likeliest = log_s.max(1)
    sums = torch.zeros(5, dtype=torch.float64)
    sums[_LOSS] = _loss(log_s, labels)
    sums[_POSITIONS] = len(labels)
    if predicted is not None:
        common = predicted.log_p.shape[1]
        require_ids(log_s.shape[1], common)
        p, log_p = predicted.p.to(log_s.device), predicted.log_p.to(log_s.device)
        # the term of p = 0 is 0, but 0 * inf is computed as NaN
        terms = (log_p - log_s[:, :common]).mul_(p).masked_fill_(p == 0, 0.0)
        sums[_KL] = float(terms.sum(1).double().sum())
        sums[_AGREEMENT] = float((likeliest == predicted.likeliest.to(likeliest.device)).sum())
        acceptance = restricted_acceptance if predicted.restricted else expected_acceptance
        sums[_ACCEPTANCE] = float(acceptance(log_p, log_s).sum())
    return _Measured(sums, signed_confidence(largest, likeliest, labels))


def _loss(log_s: Tensor, labels: Tensor) -> float:
    return float(-log_s.gather(1, labels.to(log_s.device)[:, None]).double().sum())


def _joined(slices: list[_Measured]) -> _Measured:
    empty = _Measured(torch.zeros(5, dtype=torch.float64), torch.empty(0))
    parts = [empty, *slices]
    sums = torch.stack([part.sums for part in parts]).sum(0)
    return _Measured(sums, torch.cat([part.confidence for part in parts]))


def _summarise(
    measured: list[_Measured], *, with_teacher: bool, resamples: int, seed: int
) -> HeldOut:
    used = [window for window in measured if len(window.confidence)]
    if not used:
        raise InvalidArgumentError(
            "no held-out position has a label, expected at least one: hold out other text"
        )
    table = torch.stack([window.sums for window in used])
    means = table / table[:, _POSITIONS:]
    total = (table.sum(0) / table[:, _POSITIONS].sum()).tolist()

    def by_window(column: int) -> tuple[float, ...]:
        return tuple(means[:, column].tolist())

    result = HeldOut(
        loss=total[_LOSS],
        kl=total[_KL] if with_teacher else None,
        agreement=total[_AGREEMENT] if with_teacher else None,
        acceptance=total[_ACCEPTANCE] if with_teacher else None,
        calibration=measure_calibration([window.confidence for window in used]),
        positions=int(table[:, _POSITIONS].sum()),
        loss_by_window=by_window(_LOSS),
        kl_by_window=by_window(_KL) if with_teacher else (),
        agreement_by_window=by_window(_AGREEMENT) if with_teacher else (),
        acceptance_by_window=by_window(_ACCEPTANCE) if with_teacher else (),
        positions_by_window=tuple(len(window.confidence) for window in used),
    )
    names = METRICS if with_teacher else _WITHOUT_TEACHER
    intervals = {n: result.interval(n, resamples=resamples, seed=seed) for n in names}
    return replace(result, intervals=intervals)
