"""Select likely tokens with their exact probabilities, and sample the others with a fixed weight.

Every token with p_i >= tau is selected with weight p_i. Any other token is selected with
probability p_i / tau and weight tau, so the expectation of the targets is p. Among unbiased targets
with the same expected number of entries, these have the smallest expected squared error in
probability space (VarOpt, arXiv 0803.0473; efficient unbiased sparsification, arXiv 2402.14925).
Tokens with p_i < tau are drawn systematically in token-id order, like the rounds of `Systematic`.
`Systematic` is the default because its counts take fewer bits than real-valued weights
(docs/theory.md, section 5).

Cost: about the same as for `Systematic`.
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
    """Sampler that selects tokens of probability tau or more, and draws others with weight tau.

    Args:
        tau: smallest probability with which a token is always selected, in [2**-20, 1]. A position
            has at most 1 / tau + 1 entries.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> Threshold(0.3)(logits, torch.tensor([[0.5]])).padded()
        (tensor([[1, 2]]), tensor([[0.3000, 0.7000]]))
    """

    tau: float = parameter(
        0.05,
        "Smallest probability that is stored exactly",
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
        """Kind of the stored weights: float32 for likely tokens; the others have weight tau."""
        return Stored.shared_weight(self.tau)

    def of_size(self, size: int) -> Threshold:
        """Return the sampler with tau = 1 / size."""
        return replace(self, tau=1 / size)

    def expected_entries(self, pilot: Pilot) -> float:
        """Return the mean entries per position from the probabilities min(1, p / tau)."""
        return pilot.entries(lambda p: (p / self.tau).clamp_max(1))

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample targets at a few positions; see `Sampler.draw`."""
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
        """Sample light tokens (p < tau), given the total weight per row; return rows and ids."""
        import torch

        edges, scale = tail.edges()
        most = math.floor(1 / self.tau) + 1
        ordinal = torch.arange(1, most + 1, dtype=torch.float64, device=edges.device)
        level = (ordinal - uniforms) * (self.tau * total * scale)
        inside = level <= edges[:, -1:]
        level = torch.where(inside, level, edges[:, -1:].double())
        tokens = tail.tokens_at(edges, level.ceil().to(torch.int64).clamp_min(1))
        # The interval of a light token is shorter than the distance of two levels. Rounding may
        # still put two levels in it; the second one is dropped.
        inside[:, 1:] &= tokens[:, 1:] != tokens[:, :-1]
        return inside.nonzero(as_tuple=True)[0], tokens[inside]


def _split(blocks: Blocks, ceiling: Tensor) -> tuple[Blocks, Tensor, Tensor, Tensor]:
    """Separate heavy tokens, whose weight is at least the ceiling [R, 1], from light ones.

    Returns:
        Blocks of the light tokens; rows, ids and weights of the heavy tokens, [H] each.
    """
    candidates = blocks.sums >= ceiling * (1 - 1e-5)  # block sums may have float32 errors
    index = candidates.flatten().nonzero()[:, 0]
    rows = index.div(blocks.sums.shape[1], rounding_mode="floor")
    weights = blocks.weights_in(index)
    heavy = weights >= ceiling[rows]
    sums = blocks.sums.clone()
    sums.view(-1)[index] = weights.masked_fill(heavy, 0).sum(-1)
    hit, column = heavy.nonzero(as_tuple=True)
    ids = (index - rows * blocks.sums.shape[1])[hit] * weights.shape[1] + column
    return replace(blocks, sums=sums, ceiling=ceiling), rows[hit], ids, weights[heavy]
