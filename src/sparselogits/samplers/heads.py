"""Select the likeliest tokens with their raw probabilities: Top-K and top-p.

Both samplers are biased because the tail is missing: a student trained on the head alone learns an
over-confident distribution (docs/theory.md, section 1). Raw probabilities are stored, because the
rule for the missing mass is chosen at training time.

Cost: one pass for the normaliser, and one pass for the largest logit of each block of 64 ids, which
selects the blocks that contain the k (or `max_entries`) largest logits.
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
    """Base class of the samplers Top-K and top-p."""

    unbiased = False
    uniforms_per_position = 0

    @property
    def stores(self) -> Stored:
        """Kind of the stored weights: float32 probabilities."""
        return Stored.floats()

    def most_mass(self, vocab_size: int) -> float:
        """Return 1 plus a tolerance, as imported probabilities may be rounded to half precision."""
        return 1 + 2 * ROUNDING


@dataclass(frozen=True)
class TopK(_Head):
    """Sampler that selects the k likeliest tokens at each position.

    Args:
        k: number of entries per position; positions with fewer possible tokens have fewer entries.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> TopK(2)(logits, torch.empty(1, 0)).padded()
        (tensor([[1, 2]]), tensor([[0.2000, 0.7000]]))
    """

    k: int = parameter(12, "Entries per token", least=1, label=" {:g}")

    name = "topk"
    title = "Top-K"
    budget_parameter = "k"

    def expected_entries(self, pilot: Pilot) -> float:
        """Return k, whatever the text."""
        return self.k

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Select the k likeliest tokens; see `Sampler.draw`."""
        return _select(logits, first_position, self.k, until=None)


@dataclass(frozen=True)
class TopP(_Head):
    """Sampler that selects the fewest tokens whose probabilities sum to at least p.

    Args:
        p: probability mass to reach, in (0, 1].
        max_entries: largest number of entries per position, even if their mass is below p.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> TopP(0.8)(logits, torch.empty(1, 0)).padded()
        (tensor([[1, 2]]), tensor([[0.2000, 0.7000]]))
    """

    p: float = parameter(
        0.95, "Probability mass to reach per token", above=0, most=1, label=" {:g}", is_size=True
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
        """Select the likeliest tokens until their mass reaches p, at most `max_entries` of them."""
        return _select(logits, first_position, self.max_entries, until=self.p)


def _select(logits: Tensor, first_position: int, most: int, until: float | None) -> SparseTargets:
    """Select at most `most` of the likeliest tokens, stopping when their mass reaches `until`.

    If `until` is None, the mass does not matter.
    """
    import torch

    from sparselogits.samplers.distribution import Blocks
    from sparselogits.targets import SparseTargets, offsets_from_lengths

    blocks = Blocks.of(logits, first_position=first_position)
    values, ids = blocks.largest(most)
    probabilities = (values.double() - blocks.log_normaliser).exp()
    kept = values > -torch.inf
    if until is not None:
        # The token at which the mass reaches p is included, so compare the mass before each token.
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
