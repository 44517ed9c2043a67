"""Fit a sampler's parameters to a budget (mean entries per position) on pilot windows.

Some samplers compute their expected number of entries by a formula: a token with proposal
probability q is drawn in N systematic rounds with probability min(1, N q), and in N independent
rounds with probability 1 - (1 - q)^N. Both probabilities depend on q alone, so one histogram of
log q over the pilot tokens suffices for every N. For other samplers, the number of entries is
measured by drawing.

Cost with a formula: one float64 pass over the logits of the pilot positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.sampler import Sampler
from sparselogits.samplers.uniforms import window_uniforms

_PER_OCTAVE = 64  # histogram bins per factor of two of the probability
_OCTAVES = 64  # probabilities below 2**-64 are counted in the last bin
_SUBSET_WINDOWS = 4  # pilot windows to draw from: the draw is repeated for every size tried


@dataclass(frozen=True, eq=False)
class PilotSlice:
    """Logits of the teacher at some positions of a pilot window.

    Args:
        window: index of the window.
        tokens: int64 [L], tokens of the whole window.
        positions: positions of the logits in the window.
        logits: float [P, V].
    """

    window: int
    tokens: Tensor
    positions: slice | Tensor
    logits: Tensor


class Pilot:
    """Pilot windows, spread over the corpus; their logits are computed when they are needed.

    Args:
        windows: one function per window, which returns the slices of that window.
    """

    def __init__(self, windows: Sequence[Callable[[], Iterable[PilotSlice]]]) -> None:
        self._windows = windows
        self._histogram = cache(self._compute_histogram)
        self.subset = cache(self._compute_subset)

    @classmethod
    def of_logits(cls, slices: Iterable[Tensor]) -> Pilot:
        """Create a pilot from logits, float [P, V] each.

        Tokens are unknown, so `Sampler.at` receives zeros. Pass a list to fit several samplers,
        because fitting the first one exhausts a generator.
        """

        def read() -> Iterable[PilotSlice]:
            for number, logits in enumerate(slices):
                tokens = torch.zeros(len(logits), dtype=torch.int64)
                yield PilotSlice(number, tokens, slice(0, len(logits)), logits)

        return cls([read])

    def _compute_subset(self) -> list[PilotSlice]:
        """Return the slices of at most seven windows, evenly spaced over all pilot windows."""
        chosen = self._windows[:: max(1, len(self._windows) // _SUBSET_WINDOWS)]
        return [part for read in chosen for part in read()]

    def entries(self, inclusion: Callable[[Tensor], Tensor], exponent: float = 1.0) -> float:
        """Return the expected entries per position, computed from inclusion probabilities.

        Args:
            inclusion: function that maps proposal probabilities to inclusion probabilities, float64
                [B].
            exponent: exponent of the teacher's probability in the proposal.

        Raises:
            InvalidArgumentError: there are no pilot positions.
        """
        count, mean = self._histogram(exponent)
        return float((count * inclusion(mean)).sum())

    def drawn_entries(self, sampler: Sampler) -> float:
        """Return the mean entries per position, measured by drawing from a few windows."""
        total, positions = 0, 0
        for part in self.subset():
            uniforms = window_uniforms(
                0, part.window, len(part.tokens), sampler.uniforms_per_position
            )
            local = sampler.at(part.tokens, part.positions)
            drawn = local(part.logits, uniforms[part.positions])
            total, positions = total + drawn.entries, positions + len(drawn)
        return total / max(1, positions)

    def _compute_histogram(self, exponent: float) -> tuple[Tensor, Tensor]:
        """Return each bin's tokens per position and mean proposal probability, float64 [B] each."""
        bins = _PER_OCTAVE * _OCTAVES
        count = torch.zeros(bins, dtype=torch.float64)
        mass = torch.zeros(bins, dtype=torch.float64)
        positions = 0
        for part in (part for read in self._windows for part in read()):
            for row in torch.split(part.logits, 16):
                proposal = _proposal(row, exponent)
                index = (proposal.log2().mul_(-_PER_OCTAVE)).clamp_(0, bins - 1).long().cpu()
                count += index.bincount(minlength=bins)
                mass += index.bincount(proposal.cpu(), minlength=bins)
            positions += part.logits.shape[0]
        if positions == 0:
            raise InvalidArgumentError(
                "there are no pilot positions to fit a budget on; pass logits of at least one"
            )
        return count / positions, mass / count.clamp_min(1)


def fit_budget(sampler: Sampler, logits_slices: Iterable[Tensor], budget: float) -> Sampler:
    """Return a sampler whose mean entries per position are close to a budget.

    Args:
        sampler: a sampler, whose fields in `sampler.left_open(budget)`, for example `rounds`, are
            replaced in the result; not an `Adaptive` sampler with a distance signal, whose student
            would need the tokens.
        logits_slices: logits of pilot positions spread over the corpus, float [P, V] each.
        budget: mean entries per position, finite and at least 1.

    Raises:
        InvalidArgumentError: the budget is below 1, not finite or cannot be met, the sampler has no
            budget parameter, or there are no pilot positions.

    Examples:
        >>> import torch
        >>> from sparselogits.samplers import TopK
        >>> fit_budget(TopK(1), [torch.randn(8, 100)], 12)
        TopK(k=12)
    """
    sampler.left_open(budget)
    return sampler.fitted(Pilot.of_logits(logits_slices), budget)


def size_for_budget(sampler: Sampler, pilot: Pilot, budget: float) -> int:
    """Return the size (see `Sampler.of_size`) whose mean entries are closest to a budget.

    Raises InvalidArgumentError if `largest_size` has fewer mean entries than the budget, which
    `Sampler.left_open` accepts.
    """

    @cache  # without a formula, each evaluation is a draw
    def entries(size: int) -> float:
        return sampler.of_size(size).expected_entries(pilot)

    low = high = 1
    while entries(high) < budget:
        if high == sampler.largest_size:
            raise InvalidArgumentError(
                f"a budget of {budget:g} entries per position is out of reach: on this text the "
                f"sampler {sampler.name!r} stores at most {entries(high):.1f}; give a smaller "
                "budget"
            )
        low, high = high, min(2 * high, sampler.largest_size)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if entries(middle) < budget else (low, middle)
    return min((low, high), key=lambda size: abs(entries(size) - budget))


def _proposal(logits: Tensor, exponent: float) -> Tensor:
    """Return the proposal probabilities for logits [P, V], float64 [P * V]."""
    scaled = logits.double()
    scaled = scaled.masked_fill(scaled > -torch.inf, 0) if exponent == 0 else scaled * exponent
    return scaled.softmax(-1).flatten()
