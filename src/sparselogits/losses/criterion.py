"""What the loss is: the numbers that define it, checked once.

With raw logits a = x W^T + b of one position, the criterion is

    z    = softcap * tanh(logit_scale * a / softcap)         (z = logit_scale * a without a softcap)
    kd   = cross-entropy of the target t to softmax(z / temperature)
    ce   = cross-entropy of the label to softmax(z)
    loss = (1 - alpha) * kd + alpha * ce

Scale first, softcap second. Among the models in transformers no one has both: Gemma 2 and 3 have
`final_logit_softcapping` (that is `logit_softcap`), Cohere multiplies by `logit_scale`, Granite
*divides* by `logits_scaling` (pass its inverse).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sparselogits.errors import InvalidArgumentError

Reduction = Literal["mean", "sum"]
MissingMass = Literal["drop", "renormalise", "smooth", "ghost", "ground_truth"]


@dataclass(frozen=True)
class Criterion:
    """The loss of one position, and how positions add up; see the module's docstring.

    Args:
        alpha: share of the label's cross-entropy, in [0, 1].
        missing_mass: what becomes of the mass that a biased target lacks; see `targets.py`.
        logit_scale: factor of the raw logits.
        logit_softcap: bound of the logits, positive; None for none.
        temperature: divides the student's logits in the KD part only, positive. The loss is not
            multiplied by its square: do that outside if you want gradients of like size.
        ignore_index: the label of rows that add nothing, their KD part included.
        reduction: over rows, "mean" divides by the sum of the weights of rows that count, "sum" by
            nothing.

    Raises:
        InvalidArgumentError: for a number outside its range or an unknown rule.
    """

    alpha: float = 0.0
    missing_mass: MissingMass = "drop"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise InvalidArgumentError(f"alpha must lie in [0, 1], found {self.alpha}")
        for name, choices in (("missing_mass", MissingMass), ("reduction", Reduction)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise InvalidArgumentError(
                    f"unknown {name} {value!r}: choose one of {', '.join(get_args(choices))}"
                )
        if not math.isfinite(self.logit_scale):
            raise InvalidArgumentError(f"logit_scale must be finite, found {self.logit_scale}")
        for name in ("logit_softcap", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise InvalidArgumentError(f"{name} must be positive and finite, found {value}")

    def require_labels(self, given: bool) -> None:
        """Insist on labels where the formula needs them.

        Raises:
            InvalidArgumentError: when they are missing.
        """
        if not given and self.alpha > 0:
            raise InvalidArgumentError(
                f"alpha={self.alpha} mixes in the labels' cross-entropy: pass labels, or alpha=0"
            )
        if not given and self.missing_mass == "ground_truth":
            raise InvalidArgumentError(
                "missing_mass='ground_truth' gives the missing mass to the label: pass labels"
            )


def require_rule_for(rule: MissingMass, *, unbiased: bool) -> None:
    """Refuse to touch up targets that need no touching up.

    Args:
        rule: of the loss.
        unbiased: of the sampler that made the targets.

    Raises:
        InvalidArgumentError: for any rule but "drop" on unbiased targets: their mass differs from
            one by chance only, and every rule would turn that noise into a bias.
    """
    if unbiased and rule != "drop":
        raise InvalidArgumentError(
            f"missing_mass={rule!r} would bias targets that are unbiased as they stand: use "
            "missing_mass='drop', or targets made by top-k or top-p"
        )
