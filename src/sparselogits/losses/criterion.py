"""Define the options of the loss as one frozen value, which all loss functions take.

With the raw logits a = x W^T + b of one position, the loss of that position is

    z    = softcap * tanh(logit_scale * a / softcap)         (z = logit_scale * a without a softcap)
    kd   = cross-entropy of the target t to softmax(z / temperature)
    ce   = cross-entropy of the label to softmax(z)
    loss = (1 - alpha) * kd + alpha * ce
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
    """Options of the loss, whose formula is in the docstring of `sparselogits.losses.criterion`.

    Args:
        alpha: share of the cross-entropy to labels, in [0, 1]. A positive share requires labels.
        missing_mass: rule for the probability mass that a biased target (top-k, top-p) lacks:
            "drop", "renormalise", "smooth", "ghost" or "ground_truth";
            `sparselogits.losses.targets` defines them. Unbiased targets require "drop".
        logit_scale: factor of the raw logits (Cohere's `logit_scale`, 1 / Granite's
            `logits_scaling`).
        logit_softcap: bound of the scaled logits (Gemma's `final_logit_softcapping`), positive;
            None for no bound.
        temperature: positive divisor of the student's logits in the KD part only. The loss is not
            multiplied by the square of the temperature.
        ignore_index: label of rows that are excluded from the loss, including its KD part.
        reduction: "mean" divides the sum over rows by the sum of the weights of the rows that are
            not excluded; the loss is 0 if all rows are excluded. "sum" does not divide.
        impl: "chunked" (any device), "triton" (CUDA), "reference" (plain autograd over whole
            logits) or "auto", which selects "chunked".
        chunk_rows: largest number of rows whose logits exist at the same time; no effect with
            "reference". None to derive the number from the shapes, the dtype and an accelerator's
            total memory.

    Raises:
        InvalidArgumentError: a number is out of range, or a name is unknown.

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
        """Return a criterion with some of the fields replaced, given new values by field name.

        Raises:
            InvalidArgumentError: a value is invalid.
            TypeError: a name is not a field.
        """
        return Criterion(**(dict(zip(_NAMES, self.values(), strict=True)) | options))

    def require_labels(self, given: bool) -> None:
        """Validate that labels are given if the options require them.

        Raises InvalidArgumentError if labels are required and missing.
        """
        if not given and self.alpha > 0:
            raise InvalidArgumentError(
                f"alpha={self.alpha} requires labels, but none are given: pass labels, or alpha=0"
            )
        if not given and self.missing_mass == "ground_truth":
            raise InvalidArgumentError(
                "missing_mass='ground_truth' adds the missing mass to the label, but no labels are "
                "given: pass labels, or choose another rule"
            )

    def require_chunked(self, caller: str) -> None:
        """Validate that `impl` is "auto" or "chunked". Raises InvalidArgumentError.

        The message contains the name of the caller, which supports no other implementation.
        """
        if self.impl not in ("auto", "chunked"):
            raise InvalidArgumentError(
                f"{caller} does not support impl={self.impl!r}: use impl='auto' or 'chunked'"
            )


_NAMES = tuple(field.name for field in fields(Criterion))

PLAIN = Criterion()
"""Default options: cross-entropy to the target, averaged over rows."""


def require_rule_for(rule: MissingMass, *, unbiased: bool) -> None:
    """Validate that a missing-mass rule is applicable to the targets.

    The mass of unbiased targets can differ from one by sampling noise, which the rules except
    "drop" would convert to a bias.

    Args:
        rule: option `missing_mass` of the loss.
        unbiased: whether the sampler of the targets is unbiased.

    Raises:
        InvalidArgumentError: the targets are unbiased and the rule is not "drop".

    Examples:
        >>> require_rule_for("ghost", unbiased=False)
    """
    if unbiased and rule != "drop":
        raise InvalidArgumentError(
            f"missing_mass={rule!r} would make unbiased targets biased: use missing_mass='drop', "
            "or targets of the samplers topk or topp"
        )
