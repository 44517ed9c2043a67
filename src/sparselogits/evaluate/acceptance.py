"""Speculative acceptance: how good a draft model the student is for its teacher.

A token drafted from the student's s and verified by the teacher's p is accepted with probability
min(1, p / s), so at one position with probability

    sum_i s_i min(1, p_i / s_i) = sum_i min(p_i, s_i)

(Leviathan et al. 2023, arXiv 2211.17192, definition 3.1 and theorem 3.5), one minus the total
variation distance. `expected_acceptance` is this sum; `draft_and_verify` is one round of the rule
itself, whose tokens are distributed as the teacher's whatever the student (their appendix A.1).
Both models are at temperature one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NextLogits = Callable[[Tensor], Tensor]
"""From tokens int64 [L] to the student's logits float [V] of the token after them."""

LastLogits = Callable[[Tensor, int], Tensor]
"""From tokens int64 [L] and n to the teacher's logits float [n, V] at the last n positions."""


@dataclass(frozen=True)
class Round:
    """One draft and what its verification left of it.

    Args:
        tokens: emitted: the accepted ones, and one from the teacher.
        acceptances: float64 [verified], sum_i min(p_i, s_i) at each verified position: those up to
            and including the first rejection.
    """

    tokens: tuple[int, ...]
    acceptances: Tensor

    @property
    def accepted(self) -> int:
        """Drafted tokens that were emitted."""
        return len(self.tokens) - 1

    @property
    def verified(self) -> int:
        """Drafted tokens that were accepted or rejected; those after a rejection are neither."""
        return len(self.acceptances)


def expected_acceptance(log_p: Tensor, log_s: Tensor) -> Tensor:
    """float64 [P]: sum_i min(p_i, s_i) over the ids both have.

    Args:
        log_p: float [P, V], log-probabilities of one model; -inf where there is none.
        log_s: float [P, V'] of the other; where one has more ids, the other gives them nothing.
    """
    common = min(log_p.shape[1], log_s.shape[1])
    smaller = torch.minimum(log_p[:, :common], log_s[:, :common]).exp_()
    # the rounding of the two softmaxes may add up to a little more than certainty
    return smaller.sum(1).double().clamp_(max=1.0)


def draft_and_verify(
    prefix: Tensor,
    student: NextLogits,
    teacher: LastLogits,
    draft: int,
    generator: torch.Generator,
) -> Round:
    """Draft with the student, verify with the teacher.

    The student runs once a drafted token, the teacher once. The student has all the teacher's ids.

    Args:
        prefix: int64 [L], L at least one.
        student: see `NextLogits`.
        teacher: see `LastLogits`.
        draft: tokens to draft, at least one.
        generator: on the CPU, source of all chance.
    """
    tokens, given = prefix, []
    for _ in range(draft):
        given.append(_probabilities(student(tokens)))
        tokens = torch.cat([tokens, torch.multinomial(given[-1], 1, generator=generator)])
    s, drafted = torch.stack(given), tokens[len(prefix) :]
    p = _probabilities(teacher(tokens, draft + 1))
    known = p.shape[1]
    p = torch.nn.functional.pad(p, (0, s.shape[1] - known))
    acceptances = torch.minimum(p[:-1], s).sum(1)
    at = torch.arange(draft)
    chance = torch.rand(draft, dtype=torch.float64, generator=generator)
    rejected = (chance >= p[at, drafted] / s[at, drafted]).nonzero().flatten()
    if len(rejected):
        accepted = int(rejected[0])
        rest = (p[accepted] - s[accepted]).clamp(min=0)
        # p = s up to rounding: what is left over is nothing, and p is right
        last = rest if float(rest.sum()) > 0 else p[accepted]
    else:
        accepted, last = draft, p[draft]
    extra = torch.multinomial(last, 1, generator=generator)
    emitted = (*drafted[:accepted].tolist(), int(extra))
    return Round(emitted, acceptances[: min(accepted + 1, draft)])


def _probabilities(logits: Tensor) -> Tensor:
    """float64 on the CPU."""
    return logits.cpu().double().softmax(-1)
