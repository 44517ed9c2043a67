"""Define what the positions of a window predict.

A causal model predicts the next token at each position. Every shift between tokens and the
positions that predict them is made here: other code has values by token or by position, and
converts them with `at_positions` and `at_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that has nothing to predict, as in PyTorch and transformers."""

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


def _copied(values: _Values) -> _Values:
    return values.clone() if isinstance(values, Tensor) else values.copy()
