"""Compute how often a teacher accepts the tokens that a student drafts (speculative decoding).

A token drafted from the student's distribution s and verified by the teacher's p is accepted with
probability min(1, p / s), so the acceptance probability at a position is

    sum_i s_i min(1, p_i / s_i) = sum_i min(p_i, s_i)

(Leviathan et al. 2023, arXiv 2211.17192, definition 3.1 and theorem 3.5), which is one minus the
total variation distance. The emitted tokens have the teacher's distribution for any student
(appendix A.1 of the same paper). Both models are at temperature one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NextLogits = Callable[[Tensor], Tensor]
"""Function from tokens, int64 [L], to the student's logits for the next token, float [V]."""

LastLogits = Callable[[Tensor, int], Tensor]
"""Function from tokens, int64 [L], and n to the teacher's last n rows of logits, float [n, V]."""


@dataclass(frozen=True)
class Round:
    """Result of one round of speculative decoding.

    Args:
        tokens: emitted tokens, which are the accepted drafted tokens and one from the teacher.
        acceptances: sum_i min(p_i, s_i) at each verified position, float64 [`verified`].
    """

    tokens: tuple[int, ...]
    acceptances: Tensor

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that were emitted."""
        return len(self.tokens) - 1

    @property
    def verified(self) -> int:
        """Number of drafted tokens up to and including the first rejected one."""
        return len(self.acceptances)


def expected_acceptance(log_p: Tensor, log_s: Tensor) -> Tensor:
    """Compute the acceptance probability sum_i min(p_i, s_i) over the ids that both models have.

    Args:
        log_p: log-probabilities of one model, float [P, V]; -inf for probability 0.
        log_s: log-probabilities of the other model, float [P, V']. An id that only one model has
            counts as probability 0 in the other.

    Returns:
        The sum per position, float64 [P].
    """
    common = min(log_p.shape[1], log_s.shape[1])
    smaller = torch.minimum(log_p[:, :common], log_s[:, :common]).exp_()
    # rounding of the two softmaxes may give a sum slightly above 1
    return smaller.sum(1).double().clamp_(max=1.0)


def restricted_acceptance(log_p: Tensor, log_s: Tensor) -> Tensor:
    """Compute the acceptance probability of a drafter with a draft vocabulary.

    The probability is sum_d min(p_d, q_d) over the D draft ids. q is the drafter's distribution
    restricted to these ids and renormalised; p is the teacher's distribution over all ids. The
    acceptance is therefore at most the teacher's probability of the draft vocabulary.

    Args:
        log_p: the teacher's log-probabilities of D ids and of the rest, float [P, D + 1].
        log_s: the drafter's log-probabilities (or logits) of the same classes, float [P, D + 1].

    Returns:
        The sum per position, float64 [P].
    """
    return expected_acceptance(log_p[:, :-1], log_s[:, :-1].log_softmax(1))


def draft_and_verify(
    prefix: Tensor,
    student: NextLogits,
    teacher: LastLogits,
    draft: int,
    generator: torch.Generator,
) -> Round:
    """Draft tokens with the student, verify them with the teacher, and return the emitted tokens.

    The student runs once per drafted token, the teacher once. The student's vocabulary must contain
    all ids of the teacher's.

    Args:
        prefix: tokens before the draft, int64 [L], L at least 1.
        student: function that computes the student's logits for the next token.
        teacher: function that computes the teacher's logits at the last positions.
        draft: number of tokens to draft, at least 1.
        generator: random generator on the CPU.
    """
    tokens, drafted_from = prefix, []
    for _ in range(draft):
        drafted_from.append(_probabilities(student(tokens)))
        tokens = torch.cat([tokens, torch.multinomial(drafted_from[-1], 1, generator=generator)])
    s, drafted = torch.stack(drafted_from), tokens[len(prefix) :]
    p = _probabilities(teacher(tokens, draft + 1))
    known = p.shape[1]
    p = torch.nn.functional.pad(p, (0, s.shape[1] - known))
    acceptances = torch.minimum(p[:-1], s).sum(1)
    at = torch.arange(draft)
    chance = torch.rand(draft, dtype=torch.float64, generator=generator)
    rejected = (chance >= p[at, drafted] / s[at, drafted]).nonzero().flatten()
    if len(rejected):
        accepted = int(rejected[0])
        residual = (p[accepted] - s[accepted]).clamp(min=0)
        # if p = s up to rounding, the residual is zero and p is the distribution to draw from
        last = residual if float(residual.sum()) > 0 else p[accepted]
    else:
        accepted, last = draft, p[draft]
    extra = torch.multinomial(last, 1, generator=generator)
    emitted = (*drafted[:accepted].tolist(), int(extra))
    return Round(emitted, acceptances[: min(accepted + 1, draft)])


def _probabilities(logits: Tensor) -> Tensor:
    """Compute the softmax of logits over the last dimension, float64 on the CPU."""
    return logits.cpu().double().softmax(-1)
