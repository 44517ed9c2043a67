"""Define the targets whose gradients are compared with the gradient of full distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparselogits.data import Schedule
from sparselogits.errors import InvalidArgumentError
from sparselogits.losses import MissingMass, require_rule_for
from sparselogits.samplers import (
    Multinomial,
    Sampler,
    Systematic,
    Threshold,
    TopK,
    Uniform,
    fit_budget,
)

PUBLISHED = Multinomial.title
"""Name of the target as published for RS-KD: independent rounds from the teacher's distribution."""


@dataclass(frozen=True)
class Target:
    """Target whose gradient is measured.

    Args:
        name: name of the target.
        sampler: sampler that draws the target; None for the label alone (cross-entropy loss
            without a teacher).
        missing_mass: rule for the probability mass that a biased target lacks.
        alpha: share of the labels' cross-entropy in the loss, in [0, 1]. For any alpha, the
            gradient is compared with that of full distillation without labels.
        rounds: number of rounds to which draws are thinned, as in training; None for all.

    Raises:
        InvalidArgumentError: If the rule would bias an unbiased target, `alpha` is out of range, or
            `rounds` is less than 1 or more than the rounds that the sampler draws.
    """

    name: str
    sampler: Sampler | None
    missing_mass: MissingMass = "drop"
    alpha: float = 0.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        biased = self.sampler is None or not self.sampler.unbiased
        require_rule_for(self.missing_mass, unbiased=not biased)
        if not 0 <= self.alpha <= 1:
            raise InvalidArgumentError(
                f"alpha is {self.alpha}; give the share of the labels in the loss, in [0, 1]"
            )
        if self.rounds is not None:
            drawn = None if self.sampler is None else self.sampler.rounds
            Schedule.constant(self.rounds).require_within(drawn)

    def draws(self, wanted: int) -> int:
        """Return the number of draws: `wanted` for a random target, otherwise one."""
        return wanted if self.sampler is not None and self.sampler.is_random else 1


def standard_targets(
    pilot: Sequence[Tensor],
    *,
    budget: float,
    top_k: Sequence[int] = (12, 50, 300),
    missing_mass: Sequence[MissingMass] = ("drop",),
    adaptive: Sampler | None = None,
) -> list[Target]:
    """Return Top-K targets, unbiased targets of equal budget, and the label as a target.

    Args:
        pilot: the teacher's logits at positions spread over the text, float [P, V] each. The
            unbiased samplers are fitted to the budget on these logits.
        budget: mean entries per position of the unbiased targets.
        top_k: values of K, the entries per position of a Top-K target.
        missing_mass: missing-mass rules; there is a Top-K target per K and rule.
        adaptive: sampler that follows a student; added without fitting if given.

    Raises:
        InvalidArgumentError: If the budget is less than 1 or cannot be met by an unbiased sampler,
            or a value of `top_k` is invalid.
    """
    targets = []
    for k in top_k:
        sampler = TopK(k)
        for rule in missing_mass:
            suffix = "" if rule == "drop" else f", {rule.replace('_', ' ')}"
            targets.append(Target(f"Top-{k}{suffix}", sampler, rule))
    targets += [
        Target(sampler.title, fit_budget(sampler, pilot, budget))
        for sampler in (Multinomial(), Systematic(), Threshold(), Uniform())
    ]
    if adaptive is not None:
        targets.append(Target(adaptive.title, adaptive))
    return [*targets, Target("label (CE)", None)]
