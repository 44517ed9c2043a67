"""Dense distillation with the teacher online: the baselines that sparse targets are compared with.

The teacher comes as hidden states and head, so that both sides' logits exist one chunk of rows at
a time. With u and v the logits of student and teacher over the temperature, s and p their softmax:

    forward_kl       KL(p || s)                          d/du = s - p
    reverse_kl       KL(s || p), as in MiniLLM           d/du = s (log s - log p - KL)
    jensen_shannon   beta KL(p || m) + (1 - beta) KL(s || m),  m = beta p + (1 - beta) s,
                     as in TRL's GKD                     d/du = (1 - beta) s (r - <s, r>),
                                                         r = log s - log m

The sparse loss is the cross-entropy to p, which is forward_kl plus the teacher's entropy: same
gradient. Ids the teacher does not have (a longer student vocabulary) or that are no token
(`token_mask`) have p = 0. Under reverse_kl that would make the loss infinite, so there s is the
student's distribution over the ids that the teacher has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses.arguments import prepare
from sparselogits.losses.chunked import block_rows, loss_and_gradients
from sparselogits.losses.criterion import Criterion, Reduction
from sparselogits.losses.function import LossParts, finish, needed
from sparselogits.losses.rows import row_losses_, transform_
from sparselogits.losses.targets import RowTargets

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's last hidden states and what turns them into logits; nothing is differentiated.

    Args:
        hidden: [N, Dt].
        weight: [Vt, Dt]; Vt at most the student's V.
        bias: [Vt] or None.
        logit_softcap: as of the student; see `criterion.py`.
        logit_scale: likewise.
        token_mask: bool [Vt], True where an id is a token; None if all are.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    token_mask: Tensor | None = None

    def logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """[R, Vt] in `dtype`, transformed; ids that are no token at -inf."""
        v = F.linear(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias).to(dtype)
        criterion = Criterion(logit_scale=self.logit_scale, logit_softcap=self.logit_softcap)
        v, _ = transform_(v, criterion, with_slope=False)
        if self.token_mask is not None:
            v.masked_fill_(~self.token_mask, -torch.inf)
        return v


def linear_dense_kd(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    teacher: TeacherHead,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    alpha: float = 0.0,
    linear_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    position_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
) -> LossParts:
    """Divergence between student and teacher over the whole vocabulary, mixed with labels.

    Args:
        input: the student's hidden states [N, D].
        linear_weight: the student's head [V, D].
        teacher: its hidden states of the same N rows, and its head.
        divergence: see the module's docstring.
        beta: of jensen_shannon, in (0, 1).
        labels: int64 [N]; rows labelled `ignore_index` add nothing.
        alpha: share of the label's cross-entropy.
        linear_bias: [V].
        logit_softcap: of the student.
        logit_scale: of the student.
        temperature: divides both sides' logits in the KD part; the loss is not multiplied by its
            square.
        position_weights: float [N], ones when None.
        ignore_index: see `labels`.
        reduction: "mean" over the weights of rows that count, or "sum".
        chunk_rows: rows whose logits exist at a time; None chooses.

    Returns:
        loss and its parts; `kd` is the divergence.

    Raises:
        InvalidArgumentError: options out of range, or a teacher that does not fit.
    """
    criterion = Criterion(
        alpha, "drop", logit_scale, logit_softcap, temperature, ignore_index, reduction
    )
    none = input.new_zeros((*input.shape[:-1], 0))
    call = prepare(
        input, linear_weight, linear_bias, none.long(), none, labels, position_weights, criterion
    )
    _check(input, linear_weight, teacher, divergence, beta)
    x, head, bias = call.input, call.weight, call.bias
    assert head is not None
    needs = needed(x, head, bias)  # asked before gradients are switched off
    losses_of = _DenseLosses(teacher, divergence, beta, call.row_weight, call.label, criterion)
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        result = loss_and_gradients(
            x, head, bias, call.row_weight, losses_of, needs=needs, chunk_rows=chunk_rows
        )
    return finish(result, alpha, call.factor, x, head, bias, with_ce=call.label is not None)


@dataclass(frozen=True)
class _DenseLosses:
    teacher: TeacherHead
    divergence: Divergence
    beta: float
    row_weight: Tensor
    label: Tensor | None
    criterion: Criterion

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        dtype = self.row_weight.dtype
        kd = ce = self.row_weight.new_zeros(())
        teacher_logits = self.teacher.logits(rows, dtype)
        step = block_rows(logits)
        for start in range(0, logits.shape[0], step):
            block = slice(start, start + step)
            own = slice(rows.start + start, min(rows.start + start + step, rows.stop))
            weight = self.row_weight[own]
            raw = logits[block].to(dtype)
            d_label = None
            if self.label is not None:
                mixed = gradient is not None and self.criterion.alpha > 0
                d_label, ce_rows = self._label_part(raw.clone(), own, with_grad=mixed)
                ce = ce + weight.dot(ce_rows)
            z, slope = transform_(raw, self.criterion, with_slope=gradient is not None)
            v = teacher_logits[block]
            T = self.criterion.temperature
            kd_rows, d_u = _divergence_(z.div_(T), v.div_(T), self.divergence, self.beta)
            # rows that do not count may hold anything on the teacher's side
            kd = kd + torch.where(weight != 0, weight * kd_rows, 0.0).sum()
            if gradient is None:
                continue
            d_u *= (1 - self.criterion.alpha) / T * weight[:, None]
            d_u *= self.criterion.logit_scale if slope is None else slope
            d_u = torch.where((weight != 0)[:, None], d_u, 0.0)
            gradient[block] = d_u if d_label is None else d_u + d_label
        return kd, ce

    def _label_part(
        self, raw: Tensor, own: slice, *, with_grad: bool
    ) -> tuple[Tensor | None, Tensor]:
        """alpha times the weighted gradient of the label's part, and that part [R]."""
        assert self.label is not None
        weight = self.row_weight[own]
        none = weight.new_zeros(weight.shape[0], 0)
        targets = RowTargets(none.long(), none, weight, none.sum(1), self.label[own])
        criterion = Criterion(
            alpha=1.0,
            logit_scale=self.criterion.logit_scale,
            logit_softcap=self.criterion.logit_softcap,
        )
        losses = row_losses_(raw, targets, criterion, with_ce=True, with_grad=with_grad)
        assert losses.ce is not None
        return (raw.mul_(self.criterion.alpha) if with_grad else None), losses.ce


def _divergence_(
    u: Tensor, v: Tensor, divergence: Divergence, beta: float
) -> tuple[Tensor, Tensor]:
    """Divergence [R] and its derivative [R, V] with respect to u; both arguments are used up."""
    log_p = F.pad(torch.log_softmax(v, 1), (0, u.shape[1] - v.shape[1]), value=-torch.inf)
    if divergence == "forward_kl":
        log_s = torch.log_softmax(u, 1)
        p = log_p.exp()
        kl = _product(p, log_p - log_s).sum(1)
        return kl, log_s.exp_().sub_(p)
    if divergence == "reverse_kl":
        log_s = torch.log_softmax(u.masked_fill_(log_p == -torch.inf, -torch.inf), 1)
        s = log_s.exp()
        ratio = torch.where(s == 0, 0.0, log_s - log_p)
        kl = (s * ratio).sum(1)
        return kl, ratio.sub_(kl[:, None]).mul_(s)
    log_s = torch.log_softmax(u, 1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_s + math.log1p(-beta))
    p, s = log_p.exp(), log_s.exp()
    ratio = torch.where(s == 0, 0.0, log_s - log_m)
    student = (s * ratio).sum(1)
    jsd = beta * _product(p, log_p - log_m).sum(1) + (1 - beta) * student
    return jsd, ratio.sub_(student[:, None]).mul_(s).mul_(1 - beta)


def _product(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio with 0 * inf = 0 (an id without probability), NaN staying NaN."""
    return torch.where(p == 0, 0.0, p * log_ratio)


def _check(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    teacher: TeacherHead,
    divergence: Divergence,
    beta: float,
) -> None:
    if divergence not in get_args(Divergence):
        raise InvalidArgumentError(
            f"unknown divergence {divergence!r}: choose one of {', '.join(get_args(Divergence))}"
        )
    if not 0.0 < beta < 1.0:
        raise InvalidArgumentError(
            f"beta must lie in (0, 1), found {beta}; its limits are forward_kl and reverse_kl"
        )
    if teacher.hidden.shape[0] != input.shape[0]:
        raise InvalidArgumentError(
            f"the teacher has {teacher.hidden.shape[0]} rows, the student {input.shape[0]}"
        )
    if teacher.weight.shape[0] > weight.shape[0]:
        raise InvalidArgumentError(
            f"the teacher's vocabulary ({teacher.weight.shape[0]}) is larger than the student's "
            f"({weight.shape[0]}): distillation needs one tokenizer"
        )
