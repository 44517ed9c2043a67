"""Keep the likeliest tokens with their raw probabilities, and nothing else: Top-K and top-p.

Biased: the tail is missing, and a student trained on the head alone learns an over-confident
distribution (docs/theory.md, section 1). What becomes of the missing mass is chosen by the loss,
at training time, so the raw probabilities are what is stored.

Cost: one selection of the K largest logits and one pass for the normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparselogits.samplers.sampler import ROUNDING, Sampler, Stored, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.samplers.budget import Pilot
    from sparselogits.targets import SparseTargets


class _Head(Sampler):
    """State what Top-K and top-p have in common."""

    unbiased = False
    uniforms_per_position = 0

    @property
    def stores(self) -> Stored:
        """Store raw probabilities."""
        return Stored.floats()

    def most_mass(self, vocab_size: int) -> float:
        """Return 1 plus a rounding error, because log-probabilities may have half precision."""
        return 1 + 2 * ROUNDING


@dataclass(frozen=True)
class TopK(_Head):
    """Keep the k likeliest tokens of each position.

    Args:
        k: entries per position; fewer where fewer ids are tokens.
    """

    k: int = parameter(12, "Entries per token", least=1, label=" {:g}")

    name = "topk"
    title = "Top-K"
    budget_parameter = "k"

    @property
    def max_entries(self) -> int:
        """Largest number of entries per position."""
        return self.k

    def expected_entries(self, pilot: Pilot) -> float:
        """Return k, whatever the text."""
        return self.k

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Select the k likeliest tokens; see `Sampler`."""
        return _select(logits, first_position, self.k, until=None)


@dataclass(frozen=True)
class TopP(_Head):
    """Keep the fewest tokens whose probabilities reach p, at most `max_entries` of them.

    Args:
        p: mass to reach.
        max_entries: largest number of entries per position.
    """

    p: float = parameter(
        0.95, "Probability mass to keep per token", above=0, most=1, label=" {:g}", is_size=True
    )
    max_entries: int = parameter(
        100,
        "Largest number of entries per token",
        least=1,
        label=" of at most {:g}",
        is_size=True,
    )

    name = "topp"
    title = "Top-P"

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Select tokens until their mass reaches p; see `Sampler`."""
        return _select(logits, first_position, self.max_entries, until=self.p)


def _select(logits: Tensor, first_position: int, most: int, until: float | None) -> SparseTargets:
    import torch

    from sparselogits.samplers.distribution import Blocks
    from sparselogits.targets import SparseTargets, offsets_from_lengths

    blocks = Blocks.of(logits, first_position=first_position)
    values, ids = logits.topk(min(most, logits.shape[1]), dim=-1)
    probabilities = (values.double() - blocks.shift.double()).exp() / blocks.total
    kept = values > -torch.inf
    if until is not None:
        # The token that crosses p belongs to the set: keep while the mass before it is short.
        kept &= probabilities.cumsum(-1) - probabilities < until
    ids, order = ids.sort(-1)
    kept = kept.gather(1, order)
    return SparseTargets(
        ids[kept],
        probabilities.gather(1, order)[kept].to(torch.float32),
        offsets_from_lengths(kept.sum(-1)),
        logits.shape[1],
        check=False,
    )
