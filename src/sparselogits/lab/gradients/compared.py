"""The targets that a table of gradients compares: the paper's, and those that go past it."""

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
"""Name of the row of the published method, independent rounds from the teacher itself."""


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Args:
        name: of the row.
        sampler: what makes the target; None for the label itself, cross-entropy without a teacher.
        missing_mass: the loss's rule for what a biased target lacks.
        alpha: share of the labels' cross-entropy, as in the loss. What it is compared with remains
            full distillation without labels.
        rounds: of those drawn, how many are kept, thinned as in training; None for all.

    Raises:
        InvalidArgumentError: for a rule that would bias an unbiased sampler's target, a share
            outside [0, 1], or more rounds than are drawn.
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
            raise InvalidArgumentError(f"alpha is a share in [0, 1], found {self.alpha}")
        if self.rounds is not None:
            drawn = None if self.sampler is None else self.sampler.rounds
            Schedule.constant(self.rounds).require_within(drawn)

    def draws(self, wanted: int) -> int:
        """How many draws it takes: one where nothing is random."""
        return wanted if self.sampler is not None and self.sampler.is_random else 1


def standard_targets(
    pilot: Sequence[Tensor],
    *,
    budget: float,
    top_k: Sequence[int] = (12, 50, 300),
    missing_mass: Sequence[MissingMass] = ("drop",),
    adaptive: Sampler | None = None,
) -> list[Target]:
    """Top-K with each rule, unbiased samplers at one budget, the label.

    Args:
        pilot: teacher's logits, float [P, V] each, spread over the text; they turn the budget
            into rounds and thresholds.
        budget: mean entries a position of the unbiased targets.
        top_k: entries of the Top-K targets.
        missing_mass: rules, each for every K.
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
