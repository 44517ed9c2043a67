"""Turn a budget (mean entries per position) into a sampler's parameters, on pilot windows.

Expected entries are computed where a sampler has a formula for them: a token of proposal
probability q is in a systematic draw of N rounds with probability min(1, N q), in N independent
rounds with probability 1 - (1 - q)^N. These depend on q alone, so one pass that sorts the pilot
tokens by log q into narrow bins serves every N. Without a formula they are measured by drawing.

Cost: one float64 pass over the pilot logits, a few hundred positions.
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

_PER_OCTAVE = 64
_OCTAVES = 64  # probabilities below 2**-64 are in no draw
_FEW_WINDOWS = 4  # that are drawn from: a draw is repeated for each size that is tried


@dataclass(frozen=True, eq=False)
class PilotSlice:
    """Hold the teacher's logits at some positions of a pilot window.

    Args:
        window: number of the window.
        tokens: int64 [L], tokens of the whole window.
        positions: the positions that the logits belong to.
        logits: float [P, V].
    """

    window: int
    tokens: Tensor
    positions: slice
    logits: Tensor


class Pilot:
    """Read pilot windows, which are spread over the corpus, when a sampler needs them.

    Args:
        windows: a function per window, which returns the window's slices.
    """

    def __init__(self, windows: Sequence[Callable[[], Iterable[PilotSlice]]]) -> None:
        self._windows = windows
        self._histogram = cache(self._make_histogram)
        self.few = cache(self._read_few)

    @classmethod
    def of_logits(cls, slices: Iterable[Tensor]) -> Pilot:
        """Wrap logits, float [P, V] each, whose tokens are not known."""

        def read() -> Iterable[PilotSlice]:
            for number, logits in enumerate(slices):
                tokens = torch.zeros(len(logits), dtype=torch.int64)
                yield PilotSlice(number, tokens, slice(0, len(logits)), logits)

        return cls([read])

    def _read_few(self) -> list[PilotSlice]:
        """Read the slices of about four windows, evenly spaced over all pilot windows."""
        chosen = self._windows[:: max(1, len(self._windows) // _FEW_WINDOWS)]
        return [part for read in chosen for part in read()]

    def entries(self, inclusion: Callable[[Tensor], Tensor], exponent: float = 1.0) -> float:
        """Return the mean over positions of the sum of inclusion probabilities over tokens.

        Args:
            inclusion: function from proposal probabilities to inclusion probabilities.
            exponent: exponent of the teacher's probability in the proposal.
        """
        count, mean = self._histogram(exponent)
        return float((count * inclusion(mean)).sum())

    def drawn_entries(self, sampler: Sampler) -> float:
        """Return the mean entries per position of a draw from a few windows."""
        total, positions = 0, 0
        for part in self.few():
            uniforms = window_uniforms(
                0, part.window, len(part.tokens), sampler.uniforms_per_position
            )
            here = sampler.at(part.tokens, part.positions)
            drawn = here(part.logits, uniforms[part.positions])
            total, positions = total + drawn.entries, positions + len(drawn)
        return total / max(1, positions)

    def _make_histogram(self, exponent: float) -> tuple[Tensor, Tensor]:
        """Return per bin of probability: how many tokens per position, and their mean."""
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
                "no pilot positions were given; expected logits of at least one position"
            )
        return count / positions, mass / count.clamp_min(1)


def fit_budget(sampler: Sampler, logits_slices: Iterable[Tensor], budget: float) -> Sampler:
    """Return the same sampler with the parameter whose mean entries come closest to a budget.

    Args:
        sampler: sampler whose other parameters (such as the exponent) are kept.
        logits_slices: float [P, V] each, pilot positions spread over the corpus.
        budget: mean entries per position, at least one.

    Raises:
        InvalidArgumentError: the budget is below one or cannot be met, there are no pilot
            positions, or no single parameter determines the sampler's entries.
    """
    sampler.left_open(budget)
    return sampler.fitted(Pilot.of_logits(logits_slices), budget)


def size_for_budget(sampler: Sampler, pilot: Pilot, budget: float) -> int:
    """Return the size (see `Sampler.of_size`) whose entries come closest to a budget.

    Raises:
        InvalidArgumentError: the budget is below one or cannot be met, or there are no pilot
            positions.
    """

    @cache  # a draw, where the sampler has no formula
    def entries(size: int) -> float:
        return sampler.of_size(size).expected_entries(pilot)

    if budget < 1:
        raise InvalidArgumentError(
            f"a budget of {budget:g} entries is out of reach; expected a mean of at least 1"
        )
    low = high = 1
    while entries(high) < budget:
        if high == sampler.largest_size:
            raise InvalidArgumentError(
                f"a budget of {budget:g} entries is out of reach: on this text the sampler "
                f"{sampler.name!r} stores at most {entries(high):.1f}; give a smaller budget"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if entries(middle) < budget else (low, middle)
    return min((low, high), key=lambda size: abs(entries(size) - budget))


def _proposal(logits: Tensor, exponent: float) -> Tensor:
    scaled = logits.double()
    scaled = scaled.masked_fill(scaled > -torch.inf, 0) if exponent == 0 else scaled * exponent
    return scaled.softmax(-1).flatten()
