"""Compute speculative acceptance: how well a student drafts for its teacher.

A token drafted from the student's distribution s and verified by the teacher's p is accepted with
probability min(1, p / s), so the acceptance probability at a position is

    sum_i s_i min(1, p_i / s_i) = sum_i min(p_i, s_i)

(Leviathan et al. 2023, arXiv 2211.17192, definition 3.1 and theorem 3.5), which is one minus the
total variation distance. `expected_acceptance` is this sum; `draft_and_verify` is one round of the
algorithm, whose tokens have the teacher's distribution for any student (their appendix A.1). Both
models are at temperature one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NextLogits = Callable[[Tensor], Tensor]
"""Function from tokens int64 [L] to the student's logits float [V] of the next token."""

LastLogits = Callable[[Tensor, int], Tensor]
"""Function from tokens int64 [L] and n to the teacher's logits float [n, V] of the last n."""


@dataclass(frozen=True)
class Round:
    """Hold the outcome of one draft of speculative decoding that the teacher has verified.

    Args:
        tokens: emitted tokens: the accepted draft tokens, then one token of the teacher.
        acceptances: float64 [verified], sum_i min(p_i, s_i) at each verified position, up to and
            including the first rejection.
    """

    tokens: tuple[int, ...]
    acceptances: Tensor

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that were emitted."""
        return len(self.tokens) - 1

    @property
    def verified(self) -> int:
        """Number of drafted tokens that were accepted or rejected; later ones are neither."""
        return len(self.acceptances)


def expected_acceptance(log_p: Tensor, log_s: Tensor) -> Tensor:
    """Compute sum_i min(p_i, s_i) over the ids that both models have, float64 [P].

    Args:
        log_p: float [P, V], log-probabilities of one model; -inf for probability 0.
        log_s: float [P, V'], log-probabilities of the other model; ids that only one model has
            count as probability 0 in the other.
    """
    common = min(log_p.shape[1], log_s.shape[1])
    smaller = torch.minimum(log_p[:, :common], log_s[:, :common]).exp_()
    # rounding of the two softmaxes may give a sum slightly above 1
    return smaller.sum(1).double().clamp_(max=1.0)


def draft_and_verify(
    prefix: Tensor,
    student: NextLogits,
    teacher: LastLogits,
    draft: int,
    generator: torch.Generator,
) -> Round:
    """Draft with the student, and verify with the teacher.

    The student runs once per drafted token, the teacher once. The student must have all ids of the
    teacher.

    Args:
        prefix: int64 [L], L at least 1.
        student: see `NextLogits`.
        teacher: see `LastLogits`.
        draft: number of tokens to draft, at least 1.
        generator: random generator on the CPU.
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
        # p = s up to rounding: the residual is empty, and p is the right distribution
        last = rest if float(rest.sum()) > 0 else p[accepted]
    else:
        accepted, last = draft, p[draft]
    extra = torch.multinomial(last, 1, generator=generator)
    emitted = (*drafted[:accepted].tolist(), int(extra))
    return Round(emitted, acceptances[: min(accepted + 1, draft)])


def _probabilities(logits: Tensor) -> Tensor:
    """Return float64 probabilities on the CPU."""
    return logits.cpu().double().softmax(-1)
