"""Draw N rounds with equal weight: systematically, independently, or from all tokens alike.

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
    return parameter(
        1.0,
        "Power of the teacher's probabilities to draw from",
        least=0,
        most=2,
        label=", exponent {:g}",
    )


@dataclass(frozen=True)
class DrawnInRounds(Sampler):
    """Draw rounds; a subclass decides where they fall."""

    rounds: int = parameter(50, "Sampling rounds per token", least=1, most=2**20, label=" N = {:g}")

    proposal_exponent = 1.0
    unbiased = True
    budget_parameter = "rounds"
    needs_size = True

    @property
    def stores(self) -> Stored:
        """Store counts, and weights where the proposal is not the teacher's distribution."""
        if self.proposal_exponent == 1:
            return Stored.counts(self.rounds)
        return Stored.counts_and_floats(self.rounds)

    @property
    def max_entries(self) -> int:
        """Largest number of entries per position."""
        return self.rounds

    @abstractmethod
    def points(self, uniforms: Tensor) -> Tensor:
        """Return where the rounds read the cumulative proposal.

        Returns:
            float64 [P, N], ascending in (0, 1].
        """

    @abstractmethod
    def inclusion(self, proposal: Tensor) -> Tensor:
        """Return the probability that a token is drawn at all, given its proposal probability."""

    def expected_entries(self, pilot: Pilot) -> float:
        """Return the sum of the inclusion probabilities; nothing is drawn."""
        return pilot.entries(self.inclusion, self.proposal_exponent)

    def most_mass(self, vocab_size: int) -> float:
        """Return the bound of the importance weights p ** (1 - a) * sum(p ** a)."""
        ids, exponent = float(vocab_size), self.proposal_exponent
        if exponent <= 1:  # by Hoelder's inequality
            return float(ids ** (1 - exponent)) * (1 + ROUNDING)
        # unbounded in principle; more than this has not been drawn in 10^15 positions
        return max(2.0, float(ids ** (4 * (exponent - 1))))

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample a few positions; see `Sampler`."""
        from sparselogits.samplers.distribution import Blocks

        blocks = Blocks.of(logits, self.proposal_exponent, first_position)
        return self.draw_from(blocks, uniforms, logits.shape[1])

    def draw_from(self, blocks: Blocks, uniforms: Tensor, vocab_size: int) -> SparseTargets:
        """Sample positions whose proposals are summed by block already."""
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
    """Draw N rounds systematically from q proportional to p ** proposal_exponent.

    Args:
        rounds: N; a position has at most N entries.
        proposal_exponent: 1 draws from the teacher's distribution itself.
    """

    proposal_exponent: float = _proposal_exponent()

    name = "systematic"
    title = "systematic"
    uniforms_per_position = 1

    def points(self, uniforms: Tensor) -> Tensor:
        """Return N steps of 1 / N from one uniform, float64 [P, N]."""
        import torch

        ordinal = torch.arange(1, self.rounds + 1, dtype=torch.float64, device=uniforms.device)
        return (ordinal - uniforms) / self.rounds

    def inclusion(self, proposal: Tensor) -> Tensor:
        """Return min(1, N q)."""
        return (self.rounds * proposal).clamp_max(1)


class _Independent(DrawnInRounds):
    """Draw independent rounds, each with its own uniform."""

    @property
    def uniforms_per_position(self) -> int:
        """Use one uniform per round."""
        return self.rounds

    def points(self, uniforms: Tensor) -> Tensor:
        """Return the uniforms themselves in ascending order, float64 [P, N]."""
        return (1 - uniforms).sort(-1).values

    def inclusion(self, proposal: Tensor) -> Tensor:
        """Return 1 - (1 - q) ** N."""
        missed = self.rounds * (-proposal.clamp_max(1 - 2.0**-53)).log1p()
        return -missed.expm1()


@dataclass(frozen=True)
class Multinomial(_Independent):
    """Draw N independent rounds from q proportional to p ** proposal_exponent: RS-KD as published.

    Args:
        rounds: N; a position has at most N entries.
        proposal_exponent: 1 draws from the teacher's distribution itself.
    """

    proposal_exponent: float = _proposal_exponent()

    name = "multinomial"
    title = "RS-KD"


@dataclass(frozen=True)
class Uniform(_Independent):
    """Draw N independent rounds from all tokens alike: unbiased, and very noisy."""

    name = "uniform"
    title = "uniform"
    proposal_exponent = 0.0
