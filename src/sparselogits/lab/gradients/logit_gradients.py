"""Gradients of the loss with respect to the logits of some positions, mostly never formed.

Full distillation's is s - p, as wide as the vocabulary. A sparse target's is

    share * s - spread + (values at ids)

whatever its missing-mass rule (see `losses/rows.py`), so its inner products, its way through the
unembedding and its part of the head's gradient need the wide tensors s and p once for all targets
and draws together, and a few entries a position for each. They are the gradients that training
forms: tests/lab/gradients/test_gradients.py compares them with autograd through the library's loss.

Cost: s, p and one temporary [P, V] for P positions; one product [V, P] [P, D] for each target
whose `share` is not one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselogits.lab.gradients.moments import Moments
from sparselogits.losses.targets import RowTargets

_ROUNDING = 2.0**-20  # of a mass that is one, summed from float32 weights


@dataclass(frozen=True)
class LogitGradient:
    """share * s - spread + (values at ids), for P positions; ids that weigh anything are distinct.

    Args:
        share: [P].
        spread: [P], or None for 0.
        ids: int64 [P, K].
        values: [P, K], 0 at padding.
    """

    share: Tensor
    spread: Tensor | None
    ids: Tensor
    values: Tensor

    @staticmethod
    def of(targets: RowTargets, student: Tensor) -> LogitGradient:
        """Of targets after their missing-mass rule, with the student's distribution [P, V]."""
        share, ids, values = targets.mass, targets.ids, -targets.weights
        if targets.ghost is not None:
            stored = torch.where(values != 0, student.gather(1, ids), 0.0)
            # exactly the student's mass elsewhere: one minus the stored mass would cancel
            rest = student.scatter_add(1, ids, -stored).sum(1)
            elsewhere = rest > 0
            pull = torch.where(elsewhere, targets.ghost / rest, 0.0)
            share = share - torch.where(elsewhere, pull, targets.ghost)
            values = values + pull[:, None] * stored
        return LogitGradient(share, targets.spread, ids, _merge_last(ids, values))

    def with_labels(self, labels: Tensor, alpha: float) -> LogitGradient:
        """(1 - alpha) of this and alpha of the labels' cross-entropy; labels int64 [P]."""
        if alpha == 0:
            return self
        rest = 1 - alpha
        ids = torch.cat([self.ids, labels[:, None]], 1)
        label = torch.full_like(self.share, -alpha)[:, None]
        values = torch.cat([rest * self.values, label], 1)
        spread = None if self.spread is None else rest * self.spread
        return LogitGradient(rest * self.share + alpha, spread, ids, _merge_last(ids, values))


def _merge_last(ids: Tensor, values: Tensor) -> Tensor:
    """Values with the last column's added where its id stands earlier (a label among the stored).

    Where nothing weighs twice, what comes back is what was given.
    """
    if ids.shape[1] < 2:
        return values
    same = (ids[:, :-1] == ids[:, -1:]) & (values[:, :-1] != 0) & (values[:, -1:] != 0)
    head = values[:, :-1] + torch.where(same, values[:, -1:], 0.0)
    last = torch.where(same.any(1, keepdim=True), 0.0, values[:, -1:])
    return torch.cat([head, last], 1)


@dataclass(frozen=True)
class Positions:
    """A student beside its teacher at P positions.

    Args:
        student: s [P, V], of the student.
        teacher: p [P, V]; zero on ids only the student has.
        states: [P, D], the head's input.
        weight: the head's [V, D].
        scale: between the head's output and the logits of s.
    """

    student: Tensor
    teacher: Tensor
    states: Tensor
    weight: Tensor
    scale: float

    @cached_property
    def _inner(self) -> tuple[Tensor, Tensor, Tensor]:
        """<s, s>, <s, p> and <p, p>, [P] each."""
        s, p = self.student, self.teacher
        return torch.linalg.vecdot(s, s), torch.linalg.vecdot(s, p), torch.linalg.vecdot(p, p)

    @cached_property
    def _through_head(self) -> tuple[Tensor, Tensor]:
        """Mean unembedding rows under s and p, [P, D] each."""
        return self.student @ self.weight, self.teacher @ self.weight

    @cached_property
    def _outer(self) -> Tensor:
        """s^T h [V, D]."""
        return self.student.T @ self.states

    def hidden_of_full(self) -> Tensor:
        """Full distillation's gradient with respect to the head's input, [P, D]."""
        s, p = self._through_head
        return self.scale * (s - p)

    def weight_of_full(self) -> Tensor:
        """Its gradient with respect to the head's weight, [V, D], summed over positions."""
        return self.scale * (self._outer - self.teacher.T @ self.states)

    def sum_of_full(self) -> Tensor:
        """Its gradient with respect to the logits summed over positions, [V]."""
        return self.student.sum(0) - self.teacher.sum(0)

    def hidden(self, gradient: LogitGradient) -> Tensor:
        """A target's gradient with respect to the head's input, [P, D]."""
        s, _ = self._through_head
        result = gradient.share[:, None] * s
        if gradient.ids.shape[1]:
            result += F.embedding_bag(
                gradient.ids, self.weight, per_sample_weights=gradient.values, mode="sum"
            )
        if gradient.spread is not None:
            result -= gradient.spread[:, None] * self.weight.sum(0)
        return self.scale * result

    def weight_(self, gradient: LogitGradient, into: Tensor) -> None:
        """Add a target's gradient with respect to the head's weight to `into` [V, D]."""
        into.add_(self._outer, alpha=self.scale)
        surplus = gradient.share - 1
        if bool((surplus.abs() > _ROUNDING).any()):
            into.addmm_(self.student.T, surplus[:, None] * self.states, alpha=self.scale)
        sparse = gradient.values[:, :, None] * self.states[:, None]
        into.index_add_(0, gradient.ids.flatten(), sparse.flatten(0, 1), alpha=self.scale)
        if gradient.spread is not None:
            into.sub_(gradient.spread @ self.states, alpha=self.scale)

    def sum(self, gradient: LogitGradient) -> Tensor:
        """A target's gradient with respect to the logits summed over positions, [V]."""
        result = gradient.share @ self.student
        result.index_add_(0, gradient.ids.flatten(), gradient.values.flatten())
        if gradient.spread is not None:
            result -= gradient.spread.sum()
        return result

    def moments(self, draws: Sequence[LogitGradient]) -> Moments:
        """Inner products over positions and vocabulary of a target's draws with s - p."""
        ss, sp, pp = (inner.double() for inner in self._inner)
        full = float((ss - 2 * sp + pp).sum())
        pairs = [self._products(draw) for draw in draws]
        squares = torch.stack([square for _, square in pairs])
        total = float(squares[0]) if len(draws) == 1 else self._square_of_sum(draws)
        return Moments(full, torch.stack([dot for dot, _ in pairs]), squares, total)

    def _products(self, g: LogitGradient) -> tuple[Tensor, Tensor]:
        """<s - p, g> and |g|^2, summed over positions; float64 on the CPU."""
        ss, sp, _ = (inner.double() for inner in self._inner)
        share, values = g.share.double(), g.values.double()
        s = (values * self.student.gather(1, g.ids)).sum(1)
        p = (values * self.teacher.gather(1, g.ids)).sum(1)
        dot = share * (ss - sp) + s - p  # s and p both sum to one: a spread meets nothing
        square = share.square() * ss + 2 * share * s + values.square().sum(1)
        if g.spread is not None:
            b, vocabulary = g.spread.double(), self.student.shape[1]
            square += b.square() * vocabulary - 2 * b * (share + values.sum(1))
        return dot.sum().cpu(), square.sum().cpu()

    def _square_of_sum(self, draws: Sequence[LogitGradient]) -> float:
        """|sum over draws|^2, summed over positions."""
        share = torch.stack([draw.share for draw in draws]).sum(0)
        summed = share[:, None] * self.student
        for draw in draws:
            summed.scatter_add_(1, draw.ids, draw.values)
            if draw.spread is not None:
                summed -= draw.spread[:, None]
        return float(torch.linalg.vecdot(summed, summed).double().sum())
