"""Draw N sampling rounds per position: systematically, independently, or uniformly over ids.

The weight of token i is (count_i / N) * p_i / q_i, with q the proposal from which rounds are drawn.
These weights are unbiased for every proposal that is positive wherever p is.

`Systematic` draws all rounds with one uniform u: with C the cumulative proposal in token-id order,
count_i = floor(N C_i + u) - floor(N C_{i-1} + u). So a count differs from N q_i by less than one.
Independent rounds (`Multinomial`) are the published form of random-sampling knowledge distillation
(arXiv 2503.16870, section 3). A proposal exponent other than 1 about doubles the cost, because the
weights then require the normaliser of the teacher's distribution, too.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparselogits.samplers.sampler import ROUNDING, Sampler, Stored, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.samplers.budget import Pilot
    from sparselogits.samplers.distribution import Blocks
    from sparselogits.targets import SparseTargets


def _proposal_exponent() -> Any:
    """Declare the field `proposal_exponent`."""
    return parameter(
        1.0,
        "Exponent of the teacher's probabilities in the proposal",
        least=0,
        most=2,
        label=", exponent {:g}",
    )


@dataclass(frozen=True)
class DrawnInRounds(Sampler):
    """Base class of samplers that draw N rounds; subclasses define `points` and `inclusion`."""

    rounds: int = parameter(50, "Sampling rounds per token", least=1, most=2**20, label=" N = {:g}")

    proposal_exponent = 1.0
    unbiased = True
    budget_parameter = "rounds"
    needs_size = True

    @property
    def stores(self) -> Stored:
        """Kind of the stored weights: counts, and float32 weights if the exponent is not 1."""
        if self.proposal_exponent == 1:
            return Stored.counts(self.rounds)
        return Stored.counts_and_floats(self.rounds)

    @abstractmethod
    def points(self, uniforms: Tensor) -> Tensor:
        """Return the levels of the cumulative proposal at which tokens are drawn.

        The result is float64 [P, N], ascending in (0, 1].
        """

    @abstractmethod
    def inclusion(self, proposal: Tensor) -> Tensor:
        """Return the probability of at least one draw, given tokens' proposal probabilities."""

    def expected_entries(self, pilot: Pilot) -> float:
        """Return the mean entries per position from inclusion probabilities, without drawing."""
        return pilot.entries(self.inclusion, self.proposal_exponent)

    def most_mass(self, vocab_size: int) -> float:
        """Return the largest valid sum of a position's weights; see `Sampler.most_mass`.

        A weight is p ** (1 - e) * sum(p ** e) times its count / N, with e the proposal exponent.
        """
        ids, exponent = float(vocab_size), self.proposal_exponent
        if exponent <= 1:  # by Hoelder's inequality
            return float(ids ** (1 - exponent)) * (1 + ROUNDING)
        # Such weights have no bound; a larger sum is too improbable to occur in practice.
        return max(2.0, float(ids ** (4 * (exponent - 1))))

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample targets at a few positions; see `Sampler.draw`."""
        from sparselogits.samplers.distribution import Blocks

        blocks = Blocks.of(logits, self.proposal_exponent, first_position)
        return self.draw_from(blocks, uniforms, logits.shape[1])

    def draw_from(self, blocks: Blocks, uniforms: Tensor, vocab_size: int) -> SparseTargets:
        """Sample targets at a few positions, given the block sums of their proposals.

        `uniforms` is float64 [R, uniforms_per_position], and `vocab_size` is V without the padding
        of the blocks.
        """
        import torch

        from sparselogits.samplers.distribution import count_runs
        from sparselogits.targets import SparseTargets

        edges, _ = blocks.edges()
        top = edges[:, -1:]
        levels = (self.points(uniforms) * top).ceil().to(torch.int64).clamp_min(1).minimum(top)
        ids, counts, offsets = count_runs(blocks.tokens_at(edges, levels))
        weights = counts.to(torch.float32) / self.rounds
        if self.proposal_exponent != 1:
            weights = counts * blocks.importance(ids, offsets) / self.rounds
        return SparseTargets(
            ids,
            weights.to(torch.float32),
            offsets,
            vocab_size,
            counts=counts,
            rounds=self.rounds,
            check=False,
        )


@dataclass(frozen=True)
class Systematic(DrawnInRounds):
    """Sampler of N systematic rounds from the proposal q, proportional to p ** proposal_exponent.

    Args:
        rounds: number N of rounds; a position has at most N entries.
        proposal_exponent: exponent of p in the proposal, from 0 to 2; with 1, q = p.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> Systematic(10)(logits, torch.tensor([[0.5]])).counts
        tensor([1, 2, 7], dtype=torch.int32)
    """

    proposal_exponent: float = _proposal_exponent()

    name = "systematic"
    title = "systematic"
    uniforms_per_position = 1

    def points(self, uniforms: Tensor) -> Tensor:
        """Return N levels spaced 1 / N apart and shifted by one uniform, float64 [P, N]."""
        import torch

        ordinal = torch.arange(1, self.rounds + 1, dtype=torch.float64, device=uniforms.device)
        return (ordinal - uniforms) / self.rounds

    def inclusion(self, proposal: Tensor) -> Tensor:
        """Return the inclusion probability min(1, N q)."""
        return (self.rounds * proposal).clamp_max(1)


class _Independent(DrawnInRounds):
    """Base class of samplers whose rounds are independent, with one uniform per round."""

    @property
    def uniforms_per_position(self) -> int:
        """Number of uniforms per position: one per round."""
        return self.rounds

    def points(self, uniforms: Tensor) -> Tensor:
        """Return one minus the uniforms, in ascending order, float64 [P, N]."""
        return (1 - uniforms).sort(-1).values

    def inclusion(self, proposal: Tensor) -> Tensor:
        """Return the inclusion probability 1 - (1 - q) ** N."""
        missed = self.rounds * (-proposal.clamp_max(1 - 2.0**-53)).log1p()
        return -missed.expm1()


@dataclass(frozen=True)
class Multinomial(_Independent):
    """Sampler of N independent rounds from q proportional to p ** proposal_exponent (RS-KD).

    This is random-sampling knowledge distillation as published (arXiv 2503.16870, section 3).

    Args:
        rounds: number N of rounds; a position has at most N entries.
        proposal_exponent: exponent of p in the proposal, from 0 to 2; with 1, q = p.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> Multinomial(3)(logits, torch.tensor([[0.1, 0.5, 0.95]])).counts
        tensor([1, 2], dtype=torch.int32)
    """

    proposal_exponent: float = _proposal_exponent()

    name = "multinomial"
    title = "RS-KD"


@dataclass(frozen=True)
class Uniform(_Independent):
    """Sampler of N independent rounds with equal proposal probabilities; unbiased but very noisy.

    The weight of a token is the share of the rounds that drew it, times its probability and the
    number of tokens, so the weights of a position sum to 1 only on average.

    Args:
        rounds: number N of rounds; a position has at most N entries.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> Uniform(2)(logits, torch.tensor([[0.1, 0.9]])).padded()
        (tensor([[0, 2]]), tensor([[0.1500, 1.0500]]))
    """

    name = "uniform"
    title = "uniform"
    proposal_exponent = 0.0
