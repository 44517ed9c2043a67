"""Define the options of the loss: one frozen value that all its functions take and pass on.

With the raw logits a = x W^T + b of one position, the loss of that position is

    z    = softcap * tanh(logit_scale * a / softcap)         (z = logit_scale * a without a softcap)
    kd   = cross-entropy of the target t to softmax(z / temperature)
    ce   = cross-entropy of the label to softmax(z)
    loss = (1 - alpha) * kd + alpha * ce

The scale comes first, the softcap second. No model in transformers has both: Gemma 2 and 3 have
`final_logit_softcapping` (here `logit_softcap`), Cohere multiplies by `logit_scale`, Granite
divides by `logits_scaling` (pass its inverse as `logit_scale`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sparselogits.errors import InvalidArgumentError

MissingMass = Literal["drop", "renormalise", "smooth", "ghost", "ground_truth"]
Reduction = Literal["mean", "sum"]
Implementation = Literal["auto", "chunked", "triton", "reference"]


@dataclass(frozen=True)
class Criterion:
    """Hold the options of the loss; the module's docstring has the formula.

    Args:
        alpha: share of the labels' cross-entropy, in [0, 1]. A positive share needs labels.
        missing_mass: what happens to the probability mass that a biased target (top-k, top-p)
            lacks: "drop", "renormalise", "smooth", "ghost" or "ground_truth"; `targets.py` has the
            formulas. Unbiased targets need "drop".
        logit_scale: factor of the raw logits (Cohere's `logit_scale`, 1 / Granite's
            `logits_scaling`).
        logit_softcap: bound of the scaled logits (Gemma's `final_logit_softcapping`), positive;
            None for no bound.
        temperature: divisor of the student's logits in the KD part only, positive. The loss is not
            multiplied by its square.
        ignore_index: label of rows that add nothing to the loss, their KD part included.
        reduction: "mean" divides the sum over rows by the sum of the position weights of the rows
            that count, and is 0 if no row counts; "sum" does not divide.
        impl: "chunked" (any device), "triton" (CUDA), "reference" (plain autograd over whole
            logits) or "auto", which chooses "chunked".
        chunk_rows: rows whose logits exist at a time. None chooses from the shapes, the dtype and
            an accelerator's total memory, never from the memory that is free.

    Raises:
        InvalidArgumentError: If a number is out of range or a name is unknown.

    Examples:
        >>> Criterion(alpha=0.1, logit_softcap=30.0).temperature
        1.0
    """

    alpha: float = 0.0
    missing_mass: MissingMass = "drop"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    reduction: Reduction = "mean"
    impl: Implementation = "auto"
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise InvalidArgumentError(f"alpha must be in [0, 1], found {self.alpha}")
        for name, choices in (
            ("missing_mass", get_args(MissingMass)),
            ("reduction", get_args(Reduction)),
            ("impl", get_args(Implementation)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise InvalidArgumentError(
                    f"unknown {name} {value!r}; choose one of {', '.join(choices)}"
                )
        if not math.isfinite(self.logit_scale):
            raise InvalidArgumentError(f"logit_scale must be finite, found {self.logit_scale}")
        for name in ("logit_softcap", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise InvalidArgumentError(f"{name} must be positive and finite, found {value}")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise InvalidArgumentError(f"chunk_rows must be at least 1, found {self.chunk_rows}")

    def values(self) -> tuple[Any, ...]:
        """Return the values of all fields, in the order of the constructor's arguments."""
        return tuple([getattr(self, name) for name in _NAMES])

    def updated(self, options: dict[str, Any]) -> Criterion:
        """Return a criterion with some of the fields replaced.

        Args:
            options: new values by field name.

        Raises:
            InvalidArgumentError: If a value is invalid.
            TypeError: If a name is not a field's.
        """
        return Criterion(**(dict(zip(_NAMES, self.values(), strict=True)) | options))

    def require_labels(self, given: bool) -> None:
        """Check that labels are given where the formula needs them.

        Raises:
            InvalidArgumentError: If labels are needed and missing.
        """
        if not given and self.alpha > 0:
            raise InvalidArgumentError(
                f"alpha={self.alpha} needs labels, and none are given: pass labels, or alpha=0"
            )
        if not given and self.missing_mass == "ground_truth":
            raise InvalidArgumentError(
                "missing_mass='ground_truth' gives the missing mass to the label, and no labels "
                "are given: pass labels, or choose another rule"
            )

    def require_chunked(self, caller: str) -> None:
        """Check that no other implementation than the chunked one is asked for.

        Args:
            caller: name of the function that has no other, for the message.

        Raises:
            InvalidArgumentError: If `impl` is "triton" or "reference".
        """
        if self.impl not in ("auto", "chunked"):
            raise InvalidArgumentError(
                f"{caller} has no impl={self.impl!r}: use impl='auto' or 'chunked'"
            )


_NAMES = tuple(field.name for field in fields(Criterion))

PLAIN = Criterion()
"""The default options: cross-entropy to the target, averaged over rows."""


def require_rule_for(rule: MissingMass, *, unbiased: bool) -> None:
    """Check that a missing-mass rule fits the targets.

    The mass of unbiased targets differs from one by chance only, and every rule but "drop" would
    turn that noise into a bias.

    Args:
        rule: the loss's `missing_mass`.
        unbiased: whether the sampler that made the targets is unbiased.

    Raises:
        InvalidArgumentError: If the targets are unbiased and the rule is not "drop".

    Examples:
        >>> require_rule_for("ghost", unbiased=False)
    """
    if unbiased and rule != "drop":
        raise InvalidArgumentError(
            f"missing_mass={rule!r} would bias targets that are unbiased: use "
            "missing_mass='drop', or targets sampled by top-k or top-p"
        )
