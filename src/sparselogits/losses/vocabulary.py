"""The few operations along the vocabulary that a loss of rows is made of.

With all columns at hand they are plain tensor operations (`WHOLE`); `parallel.py` has the same
operations for a slice of the columns on each of several ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Vocabulary(Protocol):
    """Reductions and indexing over all V columns of logits, wherever those columns are."""

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Values [R, E] at int64 ids [R, E] of logits [R, V]."""
        ...

    def add_at_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add values [R, E] at ids [R, E], in place; an id may repeat within a row."""
        ...

    def max(self, logits: Tensor) -> Tensor:
        """Maximum over the vocabulary, [R, 1]."""
        ...

    def sum(self, logits: Tensor) -> Tensor:
        """Sum over the vocabulary, [R, 1]."""
        ...

    def softmax_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        """Softmax of logits [R, V] in place, given their maximum; its own maximum, [R, 1]."""
        ...


class _Whole:
    """All columns in one tensor."""

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.gather(1, ids)

    def add_at_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        logits.scatter_add_(1, ids, values)

    def max(self, logits: Tensor) -> Tensor:
        return logits.amax(1, keepdim=True)

    def sum(self, logits: Tensor) -> Tensor:
        return logits.sum(1, keepdim=True)

    def softmax_(self, logits: Tensor, maximum: Tensor) -> Tensor:
        # a row is read before it is written, and on a CPU stays in its caches in between
        return torch.softmax(logits, 1, out=logits).amax(1, keepdim=True)


WHOLE: Vocabulary = _Whole()
