"""Students on held-out windows, beside their teacher.

One pass of the teacher serves every student. Logits exist one slice of positions at a time, the
teacher's and one student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.causal_lm import agrees_with_model, split
from sparselogits.data import TextDataset
from sparselogits.errors import InvalidArgumentError
from sparselogits.teacher import Engine

_SLICE = 256


@dataclass(frozen=True)
class HeldOut:
    """A model on held-out text.

    Args:
        loss: mean negative log-likelihood of the next token, nats.
        kl: mean KL(teacher || student), nats; None without a teacher.
        agreement: share of positions whose likeliest token is the teacher's; None without one.
        positions: how many positions the means are over.
        loss_by_window: mean loss of each window, for intervals.
        kl_by_window: likewise; empty without a teacher.
    """

    loss: float
    kl: float | None
    agreement: float | None
    positions: int
    loss_by_window: tuple[float, ...]
    kl_by_window: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "kl": self.kl,
            "agreement": self.agreement,
            "positions": self.positions,
            "loss_by_window": list(self.loss_by_window),
            "kl_by_window": list(self.kl_by_window),
        }


@torch.no_grad()
def evaluate(
    students: Mapping[str, nn.Module],
    windows: TextDataset,
    teacher: Engine | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, HeldOut]:
    """Measure students, and the teacher itself under the name "teacher" if there is one.

    Args:
        students: transformers causal language models by name; put in eval mode and back.
        windows: held-out text, tokenised as teacher and students were.
        teacher: for `kl` and `agreement`.
        progress: called with windows done and in all.

    Raises:
        InvalidArgumentError: for no windows, or a student with fewer ids than the teacher.
    """
    if len(windows) == 0:
        raise InvalidArgumentError(
            "there are no held-out windows; build the cache with --holdout 0.05, say"
        )
    learners = {name: _Student(model) for name, model in students.items()}
    modes = {name: model.training for name, model in students.items()}
    for model in students.values():
        model.eval()
    names = [*(["teacher"] if teacher is not None else []), *students]
    sums: dict[str, list[Tensor]] = {name: [] for name in names}
    try:
        for done in range(len(windows)):
            rows = _measure_window(windows[done], learners, teacher)
            for name, row in rows.items():
                sums[name].append(row)
            if progress is not None:
                progress(done + 1, len(windows))
    finally:
        for name, model in students.items():
            model.train(modes[name])
    return {name: _summarise(rows, with_teacher=teacher is not None) for name, rows in sums.items()}


class _Student:
    """A student's logits over a run of positions, from hidden states computed once a window."""

    def __init__(self, model: nn.Module) -> None:
        parts = split(model)
        self.model = model
        self.parts = parts if parts is not None and agrees_with_model(model, parts) else None

    def over(self, inputs: dict[str, Tensor]) -> Callable[[slice], Tensor]:
        device = next(self.model.parameters()).device
        arguments = {k: v.to(device)[None] for k, v in inputs.items()} | {"use_cache": False}
        if self.parts is None:
            logits = self.model(**arguments).logits[0]
            return lambda positions: logits[positions].float()
        hidden = self.parts.trunk(**arguments).last_hidden_state[0]
        head = self.parts.bound_head()
        return lambda positions: head(hidden[positions])


def _measure_window(
    item: dict[str, Any], learners: Mapping[str, _Student], teacher: Engine | None
) -> dict[str, Tensor]:
    """For each model float64 [4]: summed loss, summed KL, agreements, positions."""
    labels = item["shift_labels"]
    inputs = {k: v for k, v in item.items() if k in ("input_ids", "position_ids")}
    logits_of = {name: learner.over(inputs) for name, learner in learners.items()}
    names = [*(["teacher"] if teacher is not None else []), *learners]
    totals = {name: torch.zeros(4, dtype=torch.float64) for name in names}
    for positions, taught in teacher_slices(teacher, item):
        wanted = labels[positions]
        counted = wanted != -100
        if not bool(counted.any()):
            continue
        wanted = wanted[counted]
        log_p = None
        if taught is not None:
            log_p = taught[counted.to(taught.device)].log_softmax(1)
            totals["teacher"] += _against(log_p, wanted, log_p)
        for name, logits in logits_of.items():
            piece = logits(positions)
            totals[name] += _against(piece[counted.to(piece.device)].log_softmax(1), wanted, log_p)
    return totals


def teacher_slices(
    teacher: Engine | None, item: dict[str, Any]
) -> Iterator[tuple[slice, Tensor | None]]:
    """Runs of positions of one window, with the teacher's logits [P, V] if there is one."""
    length = len(item["input_ids"])
    if teacher is None:
        for start in range(0, length, _SLICE):
            yield slice(start, min(start + _SLICE, length)), None
        return
    starts = None
    if "position_ids" in item:
        starts = [(item["position_ids"] == 0).nonzero().flatten().numpy()]
    for piece in teacher.logits(item["input_ids"][None], starts):
        yield piece.positions, piece.logits


def _against(log_s: Tensor, labels: Tensor, log_p: Tensor | None) -> Tensor:
    """Summed loss, summed KL(p || s), agreements, positions of float32 [P, V] log-probabilities."""
    loss = -log_s.gather(1, labels.to(log_s.device)[:, None]).double().sum()
    result = torch.tensor([float(loss), 0.0, 0.0, float(len(labels))], dtype=torch.float64)
    if log_p is not None:
        common = log_p.shape[1]
        if log_s.shape[1] < common:
            raise InvalidArgumentError(
                f"the student's vocabulary has {log_s.shape[1]} ids, the teacher's {common}; "
                "a student may have more ids than its teacher, not fewer"
            )
        log_p = log_p.to(log_s.device)
        p = log_p.exp()
        # where p = 0 the term is 0, also against log s = -inf
        gap = torch.where(p > 0, log_p - log_s[:, :common], 0.0)
        result[1] = float((p * gap).sum(dtype=torch.float64))
        result[2] = float((log_s.argmax(1) == log_p.argmax(1)).sum())
    return result


def _summarise(rows: list[Tensor], *, with_teacher: bool) -> HeldOut:
    table = torch.stack(rows)
    total = table.sum(0)
    count = float(total[3])
    by_window = table[table[:, 3] > 0]
    means = by_window[:, :2] / by_window[:, 3:]
    return HeldOut(
        loss=float(total[0]) / count,
        kl=float(total[1]) / count if with_teacher else None,
        agreement=float(total[2]) / count if with_teacher else None,
        positions=int(count),
        loss_by_window=tuple(means[:, 0].tolist()),
        kl_by_window=tuple(means[:, 1].tolist()) if with_teacher else (),
    )
