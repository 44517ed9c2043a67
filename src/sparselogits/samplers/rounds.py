"""Samplers that draw N rounds with equal weight: systematic, independent, uniform.

A target is (count_i / N) * p_i / q_i, with q the proposal the rounds are drawn from; with q = p it
is count_i / N. Unbiased for every proposal that is positive wherever p is.

`Systematic` draws all rounds with one uniform: with C the cumulative proposal in token-id order,
count_i = floor(N C_i + u) - floor(N C_{i-1} + u). A count is then within one of N q_i, so a likely
token carries next to no noise, and neighbouring ids, which tokenizers make alike, compensate each
other. Independent rounds (`Multinomial`) are random-sampling knowledge distillation as published,
arXiv 2503.16870, section 3; they are here to be compared with.

Cost: see distribution.py; a proposal exponent other than one doubles it, since the weights then
need the teacher's own normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.distribution import Blocks, position_slices
from sparselogits.targets import SparseTargets, offsets_from_lengths

_MOST_ROUNDS = 2**20


class _InRounds:
    """What the samplers of this file share: all but where their rounds fall."""

    rounds: int
    proposal_exponent: float

    unbiased = True

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            raise InvalidArgumentError(
                f"rounds must lie in [1, {_MOST_ROUNDS}], found {self.rounds}"
            )
        if not 0 <= self.proposal_exponent <= 2:
            raise InvalidArgumentError(
                f"proposal_exponent must lie in [0, 2], found {self.proposal_exponent}"
            )

    @property
    def uniforms_per_position(self) -> int:
        """Columns of the uniforms."""
        raise NotImplementedError

    @property
    def max_entries(self) -> int:
        """No position has more entries than this."""
        return self.rounds

    def points(self, uniforms: Tensor) -> Tensor:
        """float64 [P, N], ascending in (0, 1]: where the rounds read the cumulative proposal."""
        raise NotImplementedError

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Self:
        """Itself: every position is sampled alike."""
        return self

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Draw; see `Sampler`."""
        return self.draw(logits, uniforms)[0]

    def draw(
        self, logits: Tensor, uniforms: Tensor, *, with_moment: bool = False
    ) -> tuple[SparseTargets, list[Blocks]]:
        """Draw, and keep the distributions drawn from, a few positions each.

        Args:
            logits: see `Sampler`.
            uniforms: see `Sampler`.
            with_moment: see `Blocks.of`.

        Raises:
            InvalidLogitsError: see `Sampler`.
        """
        uniforms = uniforms.to(logits.device, torch.float64)
        targets, blocks = [], []
        for part in position_slices(logits, uniforms, self.uniforms_per_position):
            few = Blocks.of(
                logits[part], self.proposal_exponent, part.start, with_moment=with_moment
            )
            targets.append(_draw_few(self, few, uniforms[part], logits.shape[1]))
            blocks.append(few)
        return SparseTargets.cat(targets), blocks


@dataclass(frozen=True)
class Systematic(_InRounds):
    """N rounds drawn systematically from q proportional to p ** proposal_exponent.

    Args:
        rounds: N, at least 1; a position has at most N entries.
        proposal_exponent: in [0, 2]; 1 draws from the teacher's distribution itself.

    Raises:
        InvalidArgumentError: for values outside these ranges.
    """

    rounds: int = 50
    proposal_exponent: float = 1.0

    name = "systematic"
    uniforms_per_position = 1

    def parameters(self) -> dict[str, Any]:
        """What rebuilds it, with its name."""
        return {"rounds": self.rounds, "proposal_exponent": self.proposal_exponent}

    def points(self, uniforms: Tensor) -> Tensor:
        """float64 [P, N]: N steps of 1 / N from one uniform."""
        ordinal = torch.arange(1, self.rounds + 1, dtype=torch.float64, device=uniforms.device)
        return (ordinal - uniforms) / self.rounds


class _Independent(_InRounds):
    """Rounds that know nothing of each other, one uniform each."""

    @property
    def uniforms_per_position(self) -> int:
        """One a round."""
        return self.rounds

    def points(self, uniforms: Tensor) -> Tensor:
        """float64 [P, N]: the uniforms themselves, in order."""
        return (1 - uniforms).sort(-1).values


@dataclass(frozen=True)
class Multinomial(_Independent):
    """N independent rounds from q proportional to p ** proposal_exponent: RS-KD as published.

    Args:
        rounds: N, at least 1; a position has at most N entries.
        proposal_exponent: in [0, 2]; 1 draws from the teacher's distribution itself.

    Raises:
        InvalidArgumentError: for values outside these ranges.
    """

    rounds: int = 50
    proposal_exponent: float = 1.0

    name = "multinomial"

    def parameters(self) -> dict[str, Any]:
        """What rebuilds it, with its name."""
        return {"rounds": self.rounds, "proposal_exponent": self.proposal_exponent}


@dataclass(frozen=True)
class Uniform(_Independent):
    """N independent rounds from the uniform distribution over the tokens: unbiased, very noisy.

    Args:
        rounds: N, at least 1.

    Raises:
        InvalidArgumentError: for rounds below one.
    """

    rounds: int = 50

    name = "uniform"
    proposal_exponent = 0.0

    def parameters(self) -> dict[str, Any]:
        """What rebuilds it, with its name."""
        return {"rounds": self.rounds}


def _draw_few(
    sampler: _InRounds, blocks: Blocks, uniforms: Tensor, vocab_size: int
) -> SparseTargets:
    edges, _ = blocks.edges()
    top = edges[:, -1:]
    levels = (sampler.points(uniforms) * top).ceil().to(torch.int64).clamp_min(1).minimum(top)
    tokens = blocks.tokens_at(edges, levels)
    ids, counts, offsets = count_runs(tokens)
    weights = counts.to(torch.float32) / sampler.rounds
    if sampler.proposal_exponent != 1:
        weights = _importance_weights(blocks, ids, counts, offsets) / sampler.rounds
    return SparseTargets(
        ids,
        weights.to(torch.float32),
        offsets,
        vocab_size,
        counts=counts,
        rounds=sampler.rounds,
        check=False,
    )


def count_runs(tokens: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge repeated tokens.

    Args:
        tokens: int64 [R, N], ascending in each row.
        drawn: bool [R, N], true up to some column of each row: the rounds that count. None for all.

    Returns:
        The distinct ids int64 [E], how often each was drawn int32 [E], offsets int64 [R + 1].
    """
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    kept = tokens
    if drawn is not None:
        first &= drawn
        first_kept, kept = first[drawn], tokens[drawn]
    else:
        first_kept = first.flatten()
    begins = first_kept.nonzero()[:, 0]
    counts = torch.diff(begins, append=begins.new_tensor([kept.numel()]))
    return tokens[first], counts.to(torch.int32), offsets_from_lengths(first.sum(-1))


def _importance_weights(blocks: Blocks, ids: Tensor, counts: Tensor, offsets: Tensor) -> Tensor:
    """float64 [E]: count * p / q, from logits and the two normalisers."""
    teacher = Blocks.of(blocks.logits)
    rows = torch.arange(offsets.numel() - 1, device=ids.device).repeat_interleave(offsets.diff())
    gap = blocks.logits[rows, ids].double() - blocks.shift[rows, 0].double()
    normaliser = (blocks.total / teacher.total)[rows, 0]
    return counts * ((1 - blocks.exponent) * gap).exp() * normaliser
