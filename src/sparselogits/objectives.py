"""Define the prediction task of a language model: next tokens (causal) or hidden tokens (masked).

A causal model predicts the next token at each position. A masked model predicts, at chosen
positions, the token at that position, which the model's input may hide. `at_positions` and
`at_tokens` convert between values by token and values by the position that predicts a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import InvalidArgumentError
from sparselogits.untrusted import shown

if TYPE_CHECKING:  # processes that tokenise text import this module, and need no torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that predicts no token, as in PyTorch and transformers."""

LEAST_RATE = 1e-3
"""Smallest random rate of a window, whose inverse bounds the weight of the window's loss."""

MASK_RATE = 0.15
"""Default expected share of the tokens that are chosen for prediction, as in BERT."""

MASK_SPAN = 3.0
"""Default mean length of a span in tokens."""

UNITS = ("tokens", "words", "spans")
"""Names of the text units that can be chosen for prediction as a whole."""

_Values = TypeVar("_Values", NDArray[Any], "Tensor")


@dataclass(frozen=True)
class Causal:
    """Prediction of the next token at each position.

    Examples:
        >>> tokens = np.array([5, 6, 7])
        >>> Causal().at_positions(tokens, -1).tolist(), Causal().at_tokens(tokens, -1).tolist()
        ([6, 7, -1], [-1, 5, 6])
    """

    def in_words(self) -> str:
        """Return the objective on one line, for display."""
        return "causal: the next token is predicted"

    def at_positions(self, by_token: _Values, filler: int) -> _Values:
        """Return, for each position, the value of the token that the position predicts.

        Args:
            by_token: value for each token of a window, [..., L].
            filler: value of positions that predict no token of the window.
        """
        moved = _copied(by_token)
        moved[..., :-1] = by_token[..., 1:]
        moved[..., -1:] = filler
        return moved

    def at_tokens(self, by_position: _Values, filler: int) -> _Values:
        """Return, for each token, the value of the position that predicts the token.

        Args:
            by_position: value for each position of a window, [..., L].
            filler: value of tokens that no position of the window predicts.
        """
        moved = _copied(by_position)
        moved[..., 1:] = by_position[..., :-1]
        moved[..., :1] = filler
        return moved

    def labels(
        self,
        tokens: NDArray[Any],
        mask: NDArray[np.bool_] | None = None,
        document_starts: NDArray[Any] | None = None,
    ) -> NDArray[np.int64]:
        """Return the token that each position predicts, int64 [L]; `IGNORE_INDEX` for none.

        Args:
            tokens: int [L] token ids.
            mask: bool [L], true for positions that carry a target; None if all positions do.
            document_starts: positions at which documents start if attention restarts there, else
                None; a document's first token is not predicted then.
        """
        labels: NDArray[np.int64] = self.at_positions(tokens.astype(np.int64), IGNORE_INDEX)
        if mask is not None:
            labels[~mask] = IGNORE_INDEX
        if document_starts is not None:
            first = np.zeros(len(tokens), np.bool_)
            first[document_starts] = True
            labels[self.at_positions(first, False)] = IGNORE_INDEX
        return labels


@dataclass(frozen=True)
class Masked:
    """Prediction of chosen tokens, which the input of a window may hide or replace.

    Tokens are chosen and replaced at random, so the shares below are expected values. Special
    tokens are never chosen.

    Args:
        mask_id: id of the mask token.
        rate: share of the tokens that are chosen for prediction, in (0, 1]. If None, a rate is
            drawn per window, uniformly from `LEAST_RATE` to 1, and the window's loss is multiplied
            by 1 / rate, as in masked diffusion (Sahoo et al. 2024, arXiv 2406.07524).
        masked: share of the chosen tokens that the input replaces by the mask token.
        random: share of the chosen tokens that the input replaces by a random token; the remaining
            ones are not replaced. 0.8 and 0.1 are the shares of BERT (Devlin et al. 2018, arXiv
            1810.04805).
        units: unit that is chosen as a whole: "tokens", "words", or "spans" of random length.
        span: mean length in tokens of a span that no special token cuts; None for other units.
        seed: seed that determines the corruption, together with the window index.

    Raises:
        InvalidArgumentError: a value is out of range.

    Examples:
        >>> bert = Masked(mask_id=103)
        >>> bert.labels(np.array([7, 8, 9]), np.array([False, True, False])).tolist()
        [-100, 8, -100]
    """

    mask_id: int
    rate: float | None = MASK_RATE
    masked: float = 0.8
    random: float = 0.1
    units: Literal["tokens", "words", "spans"] = "tokens"
    span: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for good, found in (
            (self.mask_id >= 0, f"mask_id is {self.mask_id}; expected the id of a token"),
            (
                self.rate is None or 0 < self.rate <= 1,
                f"rate is {self.rate}; expected a share of the tokens above 0 and at most 1, or "
                "None to draw a rate per window",
            ),
            (
                min(self.masked, self.random) >= 0 and self.masked + self.random <= 1 + 1e-9,
                f"masked and random are {self.masked} and {self.random}; expected two shares of "
                "the chosen tokens whose sum is at most 1",
            ),
            (self.units in UNITS, f"units is {self.units!r}; expected one of {', '.join(UNITS)}"),
            (
                (self.span is not None and 1 <= self.span < math.inf)
                if self.units == "spans"
                else self.span is None,
                f"span is {self.span}; expected a finite mean length of at least 1 token for "
                "spans, and None for tokens and words",
            ),
            (0 <= self.seed < 2**64, f"seed is {self.seed}; expected a number in [0, 2**64)"),
        ):
            if not good:
                raise InvalidArgumentError(f"objective: {found}")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, for an identity."""
        return {"name": "masked", **asdict(self)}

    def at_positions(self, by_token: _Values, filler: int) -> _Values:
        """Return a copy of the values, as each position predicts the token at that position."""
        return _copied(by_token)

    def at_tokens(self, by_position: _Values, filler: int) -> _Values:
        """Return a copy of the values, as each token is predicted at its own position."""
        return _copied(by_position)

    def labels(
        self,
        tokens: NDArray[Any],
        mask: NDArray[np.bool_] | None = None,
        document_starts: NDArray[Any] | None = None,
    ) -> NDArray[np.int64]:
        """Return the original token at each chosen position, and `IGNORE_INDEX` elsewhere.

        For the arguments see `Causal.labels`; `document_starts` has no effect.
        """
        labels: NDArray[np.int64] = tokens.astype(np.int64)
        if mask is not None:
            labels[~mask] = IGNORE_INDEX
        return labels

    def in_words(self) -> str:
        """Return the objective on one line, for display."""
        share = "a random share" if self.rate is None else f"{self.rate:.3g}"
        units = self.units if self.span is None else f"spans of {self.span:g} tokens on average"
        return (
            f"masked: {share} of the tokens is predicted, chosen by {units}; {self.masked:.3g} of "
            f"these are masked, {self.random:.3g} replaced at random"
        )

    def weight(self, rate: float) -> float:
        """Return the weight of a window's loss, given the rate of the window's corruption."""
        return 1.0 if self.rate is not None else 1.0 / rate


TokenObjective: TypeAlias = Causal | Masked
"""Objective of a causal or a masked language model."""


def objective_from_json(value: Mapping[str, Any] | None) -> TokenObjective:
    """Return the objective that an identity describes, which is causal if `value` is None.

    Raises InvalidArgumentError for values that `Masked.to_json` does not return.
    """
    if value is None:
        return Causal()
    names = {"name", *(field.name for field in fields(Masked))}
    if set(value) != names or value["name"] != "masked":
        raise InvalidArgumentError(
            f"objective: found {shown(dict(value))}; expected the name 'masked' with the fields "
            f"{', '.join(sorted(names))}"
        )
    settings = {name: own for name, own in value.items() if name != "name"}
    for name, own in settings.items():
        kinds = {"mask_id": (int,), "seed": (int,), "units": (str,)}.get(name, (int, float))
        empty = own is None and name in ("rate", "span")
        if not empty and (not isinstance(own, kinds) or isinstance(own, bool)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidArgumentError(f"objective: {name} is {shown(own)}; expected {expected}")
    return Masked(**settings)


CAUSAL = Causal()
"""Objective of causal models; `Causal` has no parameters, so one instance is enough."""


def _copied(values: _Values) -> _Values:
    """Return a copy of an array or tensor."""
    return values.copy() if isinstance(values, np.ndarray) else values.clone()
