"""Compute dense distillation losses with an online teacher, as baselines for sparse targets.

The logits of both models exist for only one chunk of rows at a time. Let u and v be the logits of
student and teacher divided by the temperature, and s and p their softmax. The divergences are:

    forward_kl       KL(p || s)                          d/du = s - p
    reverse_kl       KL(s || p), as in MiniLLM           d/du = s (log s - log p - KL)
    jensen_shannon   beta KL(p || m) + (1 - beta) KL(s || m),  m = beta p + (1 - beta) s,
                     as in TRL's GKD                     d/du = (1 - beta) s (r - <s, r>),
                                                         r = log s - log m

Ids outside the teacher's vocabulary (which may be smaller than the student's) or excluded by
`token_mask` have p = 0. reverse_kl would then be infinite, so its s is the student's distribution
restricted to the ids with p > 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses.call import Call, LossParts, Operands, prepare
from sparselogits.losses.chunked import loss_and_gradients
from sparselogits.losses.criterion import PLAIN, Criterion
from sparselogits.losses.rows import WHOLE, row_losses_, transform_
from sparselogits.losses.targets import RowTargets


class Divergence(ABC):
    """Base class of divergences between the distributions of teacher and student."""

    @abstractmethod
    def rows_(self, u: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of R rows, [R], and its derivative with respect to u, [R, V].

        Args:
            u: logits of the student divided by the temperature, [R, V]; may be overwritten.
            log_p: log-probabilities of the teacher, [R, V], in the same dtype, -inf for ids with
                p = 0; may be overwritten.
        """


class ForwardKL(Divergence):
    """Divergence KL(p || s), whose gradient is the expected gradient of unbiased sparse targets."""

    def rows_(self, u: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence and its derivative; see `Divergence.rows_`."""
        log_s = torch.log_softmax(u, 1)
        p = log_p.exp()
        kl = _expected(p, log_p - log_s)
        return kl, log_s.exp_().sub_(p)


class ReverseKL(Divergence):
    """Divergence KL(s || p), with s restricted to ids with p > 0 (MiniLLM, Gu et al. 2024)."""

    def rows_(self, u: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence and its derivative; see `Divergence.rows_`."""
        log_s = torch.log_softmax(u.masked_fill_(log_p == -torch.inf, -torch.inf), 1)
        s = log_s.exp()
        ratio = torch.where(s == 0, 0.0, log_s - log_p)
        kl = (s * ratio).sum(1)
        return kl, ratio.sub_(kl[:, None]).mul_(s)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024).

    Args:
        beta: share of the teacher's distribution in the mixture m, in (0, 1).

    Raises:
        InvalidArgumentError: beta is not in (0, 1).
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise InvalidArgumentError(
                f"beta must be in (0, 1), found {self.beta}: use forward_kl or reverse_kl for the "
                "limits"
            )

    def rows_(self, u: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence and its derivative; see `Divergence.rows_`."""
        log_s = torch.log_softmax(u, 1)
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_s + math.log1p(-self.beta))
        p, s = log_p.exp(), log_s.exp()
        ratio = torch.where(s == 0, 0.0, log_s - log_m)
        student = (s * ratio).sum(1)
        jsd = self.beta * _expected(p, log_p - log_m) + (1 - self.beta) * student
        return jsd, ratio.sub_(student[:, None]).mul_(s).mul_(1 - self.beta)


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
}
"""Divergence classes by name, for `linear_dense_kd`."""


@dataclass(frozen=True)
class TeacherHead:
    """Teacher's last hidden states and head, which receive no gradients.

    Args:
        hidden: hidden states [N, Dt], one row per row of the student.
        weight: head [Vt, Dt]; Vt is at most the student's V.
        bias: bias [Vt] of the head; None for no bias.
        logit_softcap: bound of the teacher's logits after scaling; None for no bound.
        logit_scale: factor of the teacher's logits.
        token_mask: bool [Vt], True for valid token ids; None if all ids are valid.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    token_mask: Tensor | None = None

    def logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return the logits of R rows after scale and softcap, [R, Vt]; -inf for invalid ids."""
        v = F.linear(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias).to(dtype)
        v, _ = transform_(v, self.logit_scale, self.logit_softcap, with_slope=False)
        if self.token_mask is not None:
            v.masked_fill_(~self.token_mask, -torch.inf)
        return v


def linear_dense_kd(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    teacher: TeacherHead,
    *,
    divergence: Divergence | str = "forward_kl",
    beta: float | None = None,
    labels: Tensor | None = None,
    linear_bias: Tensor | None = None,
    position_weights: Tensor | None = None,
    criterion: Criterion = PLAIN,
    **options: Any,
) -> LossParts:
    """Compute the divergence from an online teacher, mixed with cross-entropy to labels.

    The distributions are over the whole vocabulary. Arguments that are not listed are those of
    `linear_sparse_cross_entropy`.

    Args:
        input: hidden states of the student [N, D], in any floating-point dtype.
        linear_weight: head of the student [V, D] in the same dtype; with autocast, in any
            floating-point dtype except float64.
        teacher: hidden states of the teacher for the same N rows, and its head.
        divergence: a `Divergence`, or a key of `DIVERGENCES`.
        beta: share of the teacher's distribution in the mixture of "jensen_shannon"; None for 1/2.
            No effect with another name or a `Divergence`.
        criterion: options of the loss. Scale and softcap are those of the student; the temperature
            divides the logits of both models in the KD part. `missing_mass` must be "drop", and
            `impl` "auto" or "chunked".

    Returns:
        The loss and its parts, where `kd` is the divergence; 0-dimensional, float32 (float64 for
        float64 input).

    Raises:
        InvalidArgumentError: an option is invalid, labels are required and missing, the student's
            shapes or dtypes do not match, or the teacher has another number of rows than the
            student or a larger vocabulary.
        TypeError: an option is not a field of `Criterion`.

    Examples:
        >>> import torch
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> teacher = TeacherHead(torch.randn(6, 16), torch.randn(100, 16))
        >>> linear_dense_kd(hidden, head, teacher, divergence="reverse_kl").loss.backward()
        >>> hidden.grad.shape
        torch.Size([6, 8])
    """
    criterion = criterion.updated(options)
    criterion.require_chunked("linear_dense_kd")
    if criterion.missing_mass != "drop":
        raise InvalidArgumentError(
            f"missing_mass={criterion.missing_mass!r} is not applicable to a dense teacher, whose "
            "targets have no missing mass: use 'drop'"
        )
    if isinstance(divergence, str):
        if divergence not in DIVERGENCES:
            raise InvalidArgumentError(
                f"unknown divergence {divergence!r}; choose one of {', '.join(DIVERGENCES)}"
            )
        kind = DIVERGENCES[divergence]
        divergence = kind() if beta is None or kind is not JensenShannon else JensenShannon(beta)
    none = input.new_zeros((*input.shape[:-1], 0))
    operands = Operands(input, linear_weight, linear_bias)
    call = prepare(operands, none.long(), none, labels, position_weights, criterion)
    _check_teacher(operands, teacher)
    sums = loss_and_gradients(
        call.operands,
        call.row_weight,
        _DenseLosses(teacher, divergence, call),
        needs=call.needs,
        chunk_rows=criterion.chunk_rows,
    )
    return call.finish(sums, with_ce=call.label is not None)


@dataclass(frozen=True)
class _DenseLosses:
    """Callable that computes losses of a dense teacher; implements `chunked.ChunkLosses`."""

    teacher: TeacherHead
    divergence: Divergence
    call: Call

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        criterion, row_weight = self.call.criterion, self.call.row_weight
        T, with_grad = criterion.temperature, gradient is not None
        kd = ce = row_weight.new_zeros(())
        teacher_logits = self.teacher.logits(rows, row_weight.dtype)
        step = WHOLE.block_rows(logits)
        for start in range(0, logits.shape[0], step):
            block = slice(start, start + step)
            among_all = slice(rows.start + start, min(rows.start + start + step, rows.stop))
            weight = row_weight[among_all]
            raw = logits[block].to(row_weight.dtype)
            d_label = None
            if self.call.label is not None:
                mixed = with_grad and criterion.alpha > 0
                d_label, ce_rows = self._label_part(raw.clone(), among_all, with_grad=mixed)
                ce = ce + weight.dot(ce_rows)
            z, slope = transform_(
                raw, criterion.logit_scale, criterion.logit_softcap, with_slope=with_grad
            )
            log_p = torch.log_softmax(teacher_logits[block].div_(T), 1)
            log_p = F.pad(log_p, (0, z.shape[1] - log_p.shape[1]), value=-torch.inf)
            kd_rows, d_u = self.divergence.rows_(z.div_(T), log_p)
            del log_p  # frees a tensor of the logits' size before the next block
            # excluded rows of the teacher may contain NaN
            kd = kd + torch.where(weight != 0, weight * kd_rows, 0.0).sum()
            if gradient is None:
                continue
            d_u *= (1 - criterion.alpha) / T * weight[:, None]
            d_u *= criterion.logit_scale if slope is None else slope
            d_u = torch.where((weight != 0)[:, None], d_u, 0.0)
            gradient[block] = d_u if d_label is None else d_u + d_label
        return kd, ce

    def _label_part(
        self, raw: Tensor, rows: slice, *, with_grad: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradient of alpha * row_weight * ce, [R, V] or None, and ce, [R].

        The raw logits [R, V] of the rows are overwritten.
        """
        assert self.call.label is not None
        criterion, weight = self.call.criterion, self.call.row_weight[rows]
        none = weight.new_zeros(weight.shape[0], 0)
        targets = RowTargets(none.long(), none, weight, none.sum(1), self.call.label[rows])
        at_one = criterion.updated({"alpha": 1.0, "temperature": 1.0})
        _, ce = row_losses_(raw, targets, at_one, with_ce=True, with_grad=with_grad)
        assert ce is not None
        return (raw.mul_(criterion.alpha) if with_grad else None), ce


def _expected(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Return the sum of p * log_ratio per row, where terms with p = 0 are 0."""
    return torch.where(p == 0, 0.0, p * log_ratio).sum(1)


def _check_teacher(student: Operands, teacher: TeacherHead) -> None:
    """Validate that a teacher has as many rows as the student, and no larger vocabulary."""
    assert student.weight is not None
    if teacher.hidden.shape[0] != student.input.shape[0]:
        raise InvalidArgumentError(
            f"the teacher has {teacher.hidden.shape[0]} rows, the student "
            f"{student.input.shape[0]}: pass hidden states of the same positions"
        )
    if teacher.weight.shape[0] > student.weight.shape[0]:
        raise InvalidArgumentError(
            f"the teacher's vocabulary ({teacher.weight.shape[0]}) is larger than the student's "
            f"({student.weight.shape[0]}): use a student with the teacher's tokenizer"
        )
