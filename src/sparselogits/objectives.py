"""Define what the positions of a window predict.

A causal model predicts the next token at each position. A masked model predicts the token at the
position itself, which its input hides. Every shift between tokens and the positions that predict
them is made here: other code has values by token or by position, and converts them with
`at_positions` and `at_tokens`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparselogits.errors import InvalidArgumentError

IGNORE_INDEX = -100
"""Label of a position that has nothing to predict, as in PyTorch and transformers."""

LEAST_RATE = 1e-3
"""Smallest rate that is drawn where each window has its own, which bounds the weight of a loss."""

UNITS = ("tokens", "words", "spans")

_Values = TypeVar("_Values", NDArray[Any], Tensor)


@dataclass(frozen=True)
class Causal:
    """Predict the next token at each position.

    Examples:
        >>> tokens = np.array([5, 6, 7])
        >>> Causal().at_positions(tokens, -1).tolist(), Causal().at_tokens(tokens, -1).tolist()
        ([6, 7, -1], [-1, 5, 6])
    """

    def at_positions(self, by_token: _Values, filler: int) -> _Values:
        """Return, for each position, the value of the token that the position predicts.

        Args:
            by_token: [..., L], a value for each token of a window.
            filler: value of positions that predict no token of the window.
        """
        moved = _copied(by_token)
        moved[..., :-1] = by_token[..., 1:]
        moved[..., -1:] = filler
        return moved

    def at_tokens(self, by_position: _Values, filler: int) -> _Values:
        """Return, for each token, the value of the position that predicts the token.

        Args:
            by_position: [..., L], a value for each position of a window.
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
        """Return the token that each position predicts, `IGNORE_INDEX` where there is none.

        Args:
            tokens: int [L].
            mask: bool [L], true where a position has something to learn; None if all do.
            document_starts: positions at which documents start, if attention restarts there: the
                first token of a document cannot be predicted from another document.

        Returns:
            int64 [L].
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
    """Predict the tokens that the input of a window hides or replaces.

    Args:
        mask_id: id of the mask token.
        rate: share of the tokens that are chosen for prediction, in (0, 1]. None draws a rate per
            window, uniformly from `LEAST_RATE` to 1, and gives the loss of the window the weight
            1 / rate: the loss of masked diffusion (Sahoo et al. 2024, arXiv 2406.07524).
        masked: share of the chosen tokens that the input replaces by the mask token.
        random: share of the chosen tokens that the input replaces by a random token; the rest is
            shown as it is. 0.8 and 0.1 are BERT's (Devlin et al. 2018, arXiv 1810.04805).
        units: what is chosen as a whole: "tokens", "words", or "spans" of random length.
        span: mean length of a span in tokens; None for other units.
        seed: seed of the corruption, together with the window index.

    Raises:
        InvalidArgumentError: a value is out of its range.

    Examples:
        >>> bert = Masked(mask_id=103)
        >>> bert.labels(np.array([7, 8, 9]), np.array([False, True, False])).tolist()
        [-100, 8, -100]
    """

    mask_id: int
    rate: float | None = 0.15
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
                (self.span is not None and self.span >= 1)
                if self.units == "spans"
                else self.span is None,
                f"span is {self.span}; expected a mean length of at least 1 token for spans, and "
                "None for tokens and words",
            ),
            (0 <= self.seed < 2**64, f"seed is {self.seed}; expected a number in [0, 2**64)"),
        ):
            if not good:
                raise InvalidArgumentError(f"objective: {found}")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, for an identity."""
        return {"name": "masked", **asdict(self)}

    def at_positions(self, by_token: _Values, filler: int) -> _Values:
        """Return, for each position, the value of the token at it; see `Causal.at_positions`."""
        return _copied(by_token)

    def at_tokens(self, by_position: _Values, filler: int) -> _Values:
        """Return, for each token, the value of its position; see `Causal.at_tokens`."""
        return _copied(by_position)

    def labels(
        self,
        tokens: NDArray[Any],
        mask: NDArray[np.bool_] | None = None,
        document_starts: NDArray[Any] | None = None,
    ) -> NDArray[np.int64]:
        """Return the original token of each chosen position, `IGNORE_INDEX` elsewhere.

        Args:
            tokens: int [L], the original tokens.
            mask: bool [L], true where a position was chosen; None if all were.
            document_starts: positions at which documents start; they change no label.

        Returns:
            int64 [L].
        """
        labels: NDArray[np.int64] = tokens.astype(np.int64)
        if mask is not None:
            labels[~mask] = IGNORE_INDEX
        return labels

    def weight(self, rate: float) -> float:
        """Return the weight of the loss of a window that was corrupted at a rate."""
        return 1.0 if self.rate is not None else 1.0 / rate


TokenObjective: TypeAlias = Causal | Masked


def _copied(values: _Values) -> _Values:
    return values.clone() if isinstance(values, Tensor) else values.copy()
