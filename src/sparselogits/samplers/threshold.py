"""Keep likely tokens exactly, and unlikely ones at random with one common weight.

Every token with p_i >= tau is kept with weight p_i; any other is kept with probability p_i / tau
and then weighs tau, so the expectation is p. Among unbiased targets with the same expected number
of entries this has the least squared error in probability space (VarOpt, arXiv 0803.0473;
efficient unbiased sparsification, arXiv 2402.14925). The tail is drawn systematically in token-id
order, like `Systematic`'s rounds. Its real-valued weights cost more bits than counts do, which is
why it is not the default; docs/theory.md, section 5.

Cost: as for `Systematic`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparselogits.samplers.sampler import Sampler, Stored, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.samplers.budget import Pilot
    from sparselogits.samplers.distribution import Blocks
    from sparselogits.targets import SparseTargets


@dataclass(frozen=True)
class Threshold(Sampler):
    """Keep likely tokens exactly, and sample the others with weight tau.

    Args:
        tau: smallest probability that is kept exactly; a position has at most 1 / tau + 1 entries.
    """

    tau: float = parameter(
        0.05,
        "Smallest probability that is kept exactly",
        least=2.0**-20,
        most=1,
        label=" tau {:g}",
    )

    name = "threshold"
    title = "threshold"
    unbiased = True
    uniforms_per_position = 1
    budget_parameter = "tau"

    @property
    def stores(self) -> Stored:
        """Store the weights of the likely tokens; the others weigh tau."""
        return Stored.shared_weight(self.tau)

    @property
    def max_entries(self) -> int:
        """Largest number of entries per position."""
        return math.floor(1 / self.tau) + 1

    def of_size(self, size: int) -> Threshold:
        """Return the sampler with tau = 1 / size."""
        return replace(self, tau=1 / size)

    def expected_entries(self, pilot: Pilot) -> float:
        """Return the sum of the inclusion probabilities min(1, p / tau); nothing is drawn."""
        return pilot.entries(lambda p: (p / self.tau).clamp_max(1))

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample a few positions; see `Sampler`."""
        import torch

        from sparselogits.samplers.distribution import Blocks
        from sparselogits.targets import SparseTargets, offsets_from_lengths

        blocks = Blocks.of(logits, first_position=first_position)
        total = blocks.total
        tail, rows, ids, weights = _split(blocks, self.tau * total)
        tail_rows, tail_ids = self._draw_tail(tail, uniforms, total)
        rows, ids = torch.cat([rows, tail_rows]), torch.cat([ids, tail_ids])
        weights = torch.cat(
            [weights / total[rows[: weights.numel()], 0], total.new_full(tail_ids.shape, self.tau)]
        )
        order = (rows * logits.shape[1] + ids).argsort()
        return SparseTargets(
            ids[order],
            weights[order].to(torch.float32),
            offsets_from_lengths(rows.bincount(minlength=logits.shape[0])),
            logits.shape[1],
            check=False,
        )

    def _draw_tail(self, tail: Blocks, uniforms: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and ids of light tokens, each included with probability p / tau."""
        import torch

        edges, scale = tail.edges()
        ordinal = torch.arange(1, self.max_entries + 1, dtype=torch.float64, device=edges.device)
        level = (ordinal - uniforms) * (self.tau * total * scale)
        inside = level <= edges[:, -1:]
        level = torch.where(inside, level, edges[:, -1:].double())
        tokens = tail.tokens_at(edges, level.ceil().to(torch.int64).clamp_min(1))
        # A light token is narrower than the spacing of the levels. If rounding lets it be hit
        # twice all the same, one of the two is dropped.
        inside[:, 1:] &= tokens[:, 1:] != tokens[:, :-1]
        return inside.nonzero(as_tuple=True)[0], tokens[inside]


def _split(blocks: Blocks, ceiling: Tensor) -> tuple[Blocks, Tensor, Tensor, Tensor]:
    """Split positions into light and heavy tokens.

    Returns:
        The light tokens' blocks; rows int64 [H], ids int64 [H], weights float64 [H] of the heavy.
    """
    suspects = blocks.sums >= ceiling * (1 - 1e-5)  # a block sum may be float32's
    rows, index = suspects.nonzero(as_tuple=True)
    weights = blocks.weights_in(rows, index)
    heavy = weights >= ceiling[rows]
    sums = blocks.sums.clone()
    sums[rows, index] = weights.masked_fill(heavy, 0).sum(-1)
    hit, column = heavy.nonzero(as_tuple=True)
    ids = index[hit] * weights.shape[1] + column
    return replace(blocks, sums=sums, ceiling=ceiling), rows[hit], ids, weights[heavy]
