"""From a budget (mean entries a position) to a sampler's parameters, on pilot logits.

Expected entries are computed, not drawn: a token of probability q is in a systematic draw of N
rounds with probability min(1, N q), in N independent rounds with probability 1 - (1 - q)^N, in a
threshold target with probability min(1, q / tau). These depend on q alone, so one pass that sorts
the pilot tokens by log q into narrow bins serves every N.

Cost: one float64 pass over the pilot logits, a few hundred positions; no randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.heads import TopK
from sparselogits.samplers.protocol import Sampler
from sparselogits.samplers.rounds import Multinomial, Systematic, Uniform
from sparselogits.samplers.threshold import Threshold

_PER_OCTAVE = 64
_OCTAVES = 64  # probabilities below 2**-64 are in no draw
_MOST = 2**16  # rounds


@dataclass(frozen=True)
class _Histogram:
    """Pilot tokens by probability: how many a position (`count`), and their mean (`mean`)."""

    count: Tensor
    mean: Tensor


def fit_budget(sampler: Sampler, logits_slices: Iterable[Tensor], budget: float) -> Sampler:
    """The same sampler with the parameters whose mean entries come closest to a budget.

    Args:
        sampler: its other parameters (proposal exponent) are kept.
        logits_slices: float [P, V] each, pilot positions spread over the corpus.
        budget: mean entries a position, at least one.

    Raises:
        InvalidArgumentError: for a budget below one or beyond reach, no pilot positions, or a
            sampler whose entries no single parameter governs.
    """
    parameter = budget_parameter(sampler)
    if isinstance(sampler, TopK):
        return TopK(max(1, round(budget)))
    exponent = getattr(sampler, "proposal_exponent", 1.0)
    expected = _independent if isinstance(sampler, Multinomial | Uniform) else _systematic
    histogram = _histogram(logits_slices, exponent)
    rounds = _closest(lambda n: expected(histogram, n), budget)
    # a threshold target includes a token as systematic rounds do, with tau in the place of 1 / N
    return replace(sampler, **{parameter: 1 / rounds if parameter == "tau" else rounds})  # type: ignore[type-var]


def budget_parameter(sampler: Sampler) -> str:
    """The parameter that a budget sets: rounds, k or tau.

    Raises:
        InvalidArgumentError: for a sampler whose entries no single parameter governs.
    """
    if isinstance(sampler, TopK):
        return "k"
    if isinstance(sampler, Threshold):
        return "tau"
    if isinstance(sampler, Systematic | Multinomial | Uniform):
        return "rounds"
    raise InvalidArgumentError(
        f"sampler {sampler.name!r} cannot be fitted to a budget; give its own parameters"
    )


def _histogram(logits_slices: Iterable[Tensor], exponent: float) -> _Histogram:
    bins = _PER_OCTAVE * _OCTAVES
    count = torch.zeros(bins, dtype=torch.float64)
    mass = torch.zeros(bins, dtype=torch.float64)
    positions = 0
    for logits in logits_slices:
        for row in torch.split(logits, 16):
            proposal = _proposal(row, exponent)
            index = (proposal.log2().mul_(-_PER_OCTAVE)).clamp_(0, bins - 1).long().cpu()
            count += index.bincount(minlength=bins)
            mass += index.bincount(proposal.cpu(), minlength=bins)
        positions += logits.shape[0]
    if positions == 0:
        raise InvalidArgumentError("no pilot positions: pass logits of at least one position")
    return _Histogram(count / positions, mass / count.clamp_min(1))


def _proposal(logits: Tensor, exponent: float) -> Tensor:
    scaled = logits.double()
    scaled = scaled.masked_fill(scaled > -torch.inf, 0) if exponent == 0 else scaled * exponent
    return scaled.softmax(-1).flatten()


def _systematic(histogram: _Histogram, rounds: int) -> float:
    return float((histogram.count * (rounds * histogram.mean).clamp_max(1)).sum())


def _independent(histogram: _Histogram, rounds: int) -> float:
    missed = rounds * torch.log1p(-histogram.mean.clamp_max(1 - 2.0**-53))
    return float((histogram.count * -torch.expm1(missed)).sum())


def _closest(entries: Callable[[int], float], budget: float) -> int:
    """The N in [1, 2**16] whose expected entries, ascending in N, come closest to the budget."""
    if not 1 <= budget <= entries(_MOST):
        raise InvalidArgumentError(
            f"a budget of {budget} entries is out of reach: this teacher allows 1 to "
            f"{entries(_MOST):.1f}"
        )
    low, high = 1, _MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if entries(middle) < budget else (low, middle)
    return min((low, high), key=lambda n: abs(entries(n) - budget))
