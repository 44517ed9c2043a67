"""Define the targets whose gradients are compared: those of the RS-KD paper, and further ones."""

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
"""Name of the published method's row: independent rounds from the teacher's distribution."""


@dataclass(frozen=True)
class Target:
    """Describe one row of the table.

    Args:
        name: name of the row.
        sampler: the sampler that draws the target; None for the label itself, which is
            cross-entropy without a teacher.
        missing_mass: the loss's rule for the mass that a biased target lacks.
        alpha: share of the labels' cross-entropy in the loss, in [0, 1]. The target is compared
            with full distillation without labels, whatever alpha.
        rounds: rounds to thin the draw to, as in training; None for all.

    Raises:
        InvalidArgumentError: If the rule would bias an unbiased target, alpha is out of range, or
            there are more rounds than are drawn.
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
            raise InvalidArgumentError(f"alpha must be a share in [0, 1], found {self.alpha}")
        if self.rounds is not None:
            drawn = None if self.sampler is None else self.sampler.rounds
            Schedule.constant(self.rounds).require_within(drawn)

    def draws(self, wanted: int) -> int:
        """Return the number of draws to make: one for a target that is not random."""
        return wanted if self.sampler is not None and self.sampler.is_random else 1


def standard_targets(
    pilot: Sequence[Tensor],
    *,
    budget: float,
    top_k: Sequence[int] = (12, 50, 300),
    missing_mass: Sequence[MissingMass] = ("drop",),
    adaptive: Sampler | None = None,
) -> list[Target]:
    """Return Top-K targets with each rule, unbiased targets of one budget, and the label.

    Args:
        pilot: the teacher's logits, float [P, V] each, from positions spread over the text; they
            turn the budget into rounds and thresholds.
        budget: mean entries per position of the unbiased targets.
        top_k: entries per position of the Top-K targets.
        missing_mass: rules to combine with every K.
        adaptive: a sampler that follows a student, compared as it is.
    """
    rows = []
    for k in top_k:
        sampler = TopK(k)
        rows += [Target(_top_k_name(k, rule), sampler, rule) for rule in missing_mass]
    rows += [
        Target(sampler.title, fit_budget(sampler, pilot, budget))
        for sampler in (Multinomial(), Systematic(), Threshold(), Uniform())
    ]
    if adaptive is not None:
        rows.append(Target(adaptive.title, adaptive))
    return [*rows, Target("label (CE)", None)]


def _top_k_name(k: int, rule: MissingMass) -> str:
    return f"Top-{k}" if rule == "drop" else f"Top-{k}, {rule.replace('_', ' ')}"
