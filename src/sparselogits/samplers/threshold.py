"""Threshold sampling: likely tokens exactly, unlikely ones now and then at one common weight.

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
from typing import Any

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.distribution import Blocks, position_slices
from sparselogits.targets import SparseTargets, offsets_from_lengths


@dataclass(frozen=True)
class Threshold:
    """Heavy tokens exactly, the tail at weight tau.

    Args:
        tau: in (0, 1]; a position has at most 1 / tau + 1 entries.

    Raises:
        InvalidArgumentError: for tau outside (0, 1].
    """

    tau: float = 0.05

    name = "threshold"
    unbiased = True
    rounds = None
    uniforms_per_position = 1

    def __post_init__(self) -> None:
        if not 2.0**-20 <= self.tau <= 1:
            raise InvalidArgumentError(f"tau must lie in [2**-20, 1], found {self.tau}")

    @property
    def max_entries(self) -> int:
        """No position has more entries than this."""
        return math.floor(1 / self.tau) + 1

    def parameters(self) -> dict[str, Any]:
        """What rebuilds it, with its name."""
        return {"tau": self.tau}

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Threshold:
        """Itself: every position is sampled alike."""
        return self

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Draw; see `Sampler`."""
        uniforms = uniforms.to(logits.device, torch.float64)
        return SparseTargets.cat(
            [
                self._draw(logits[part], uniforms[part], part.start)
                for part in position_slices(logits, uniforms, self.uniforms_per_position)
            ]
        )

    def _draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
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
        """Rows and ids of light tokens, each included with probability p / tau."""
        edges, scale = tail.edges()
        ordinal = torch.arange(1, self.max_entries + 1, dtype=torch.float64, device=edges.device)
        level = (ordinal - uniforms) * (self.tau * total * scale)
        inside = level <= edges[:, -1:]
        level = torch.where(inside, level, edges[:, -1:].double())
        tokens = tail.tokens_at(edges, level.ceil().to(torch.int64).clamp_min(1))
        # A light token is narrower than the spacing of the levels; should rounding let it be hit
        # twice all the same, one of the two is dropped.
        inside[:, 1:] &= tokens[:, 1:] != tokens[:, :-1]
        return inside.nonzero(as_tuple=True)[0], tokens[inside]


def _split(blocks: Blocks, ceiling: Tensor) -> tuple[Blocks, Tensor, Tensor, Tensor]:
    """The light tokens' blocks; rows int64 [H], ids int64 [H], weights float64 [H] of the heavy."""
    suspects = blocks.sums >= ceiling * (1 - 1e-5)  # a block sum may be float32's
    rows, index = suspects.nonzero(as_tuple=True)
    weights = blocks.weights_in(rows, index)
    heavy = weights >= ceiling[rows]
    sums = blocks.sums.clone()
    sums[rows, index] = weights.masked_fill(heavy, 0).sum(-1)
    hit, column = heavy.nonzero(as_tuple=True)
    ids = index[hit] * weights.shape[1] + column
    return replace(blocks, sums=sums, ceiling=ceiling), rows[hit], ids, weights[heavy]
