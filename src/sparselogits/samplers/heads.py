"""Top-K and top-p: the likeliest tokens with their raw probabilities, and nothing else.

Biased: the tail is missing, and a student trained on the head alone learns an over-confident
distribution (docs/theory.md, section 1). What becomes of the missing mass is chosen by the loss,
at training time, so the raw probabilities are what is stored.

Cost: one selection of the K largest logits and one pass for the normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.distribution import Blocks, position_slices
from sparselogits.targets import SparseTargets, offsets_from_lengths


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens of each position.

    Args:
        k: entries a position; fewer where fewer ids are tokens.

    Raises:
        InvalidArgumentError: for k below one.
    """

    k: int = 12

    name = "topk"
    unbiased = False
    rounds = None
    uniforms_per_position = 0

    def __post_init__(self) -> None:
        _require_entries("k", self.k)

    @property
    def max_entries(self) -> int:
        """No position has more entries than this."""
        return self.k

    def parameters(self) -> dict[str, Any]:
        """What rebuilds it, with its name."""
        return {"k": self.k}

    def at(self, tokens: Tensor, positions: slice | Tensor) -> TopK:
        """Itself: every position is treated alike."""
        return self

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Select; `uniforms` is empty, [P, 0]. See `Sampler`."""
        return _select(logits, uniforms, self.k, until=None)


@dataclass(frozen=True)
class TopP:
    """The fewest tokens whose probabilities reach p, at most `max_entries` of them.

    Args:
        p: mass to reach, in (0, 1].
        max_entries: cap on the entries of a position.

    Raises:
        InvalidArgumentError: for values outside these ranges.
    """

    p: float = 0.95
    max_entries: int = 100

    name = "topp"
    unbiased = False
    rounds = None
    uniforms_per_position = 0

    def __post_init__(self) -> None:
        _require_entries("max_entries", self.max_entries)
        if not 0 < self.p <= 1:
            raise InvalidArgumentError(f"p must lie in (0, 1], found {self.p}")

    def parameters(self) -> dict[str, Any]:
        """What rebuilds it, with its name."""
        return {"p": self.p, "max_entries": self.max_entries}

    def at(self, tokens: Tensor, positions: slice | Tensor) -> TopP:
        """Itself: every position is treated alike."""
        return self

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Select; `uniforms` is empty, [P, 0]. See `Sampler`."""
        return _select(logits, uniforms, self.max_entries, until=self.p)


def _select(logits: Tensor, uniforms: Tensor, most: int, until: float | None) -> SparseTargets:
    return SparseTargets.cat(
        [
            _select_few(logits[part], part.start, most, until)
            for part in position_slices(logits, uniforms, 0)
        ]
    )


def _select_few(
    logits: Tensor, first_position: int, most: int, until: float | None
) -> SparseTargets:
    blocks = Blocks.of(logits, first_position=first_position)
    values, ids = logits.topk(min(most, logits.shape[1]), dim=-1)
    probabilities = (values.double() - blocks.shift.double()).exp() / blocks.total
    kept = values > -torch.inf
    if until is not None:
        # The token that crosses p belongs to the set: keep while the mass before it is short.
        kept &= probabilities.cumsum(-1) - probabilities < until
    ids, order = ids.sort(-1)
    kept = kept.gather(1, order)
    return SparseTargets(
        ids[kept],
        probabilities.gather(1, order)[kept].to(torch.float32),
        offsets_from_lengths(kept.sum(-1)),
        logits.shape[1],
        check=False,
    )


def _require_entries(name: str, value: int) -> None:
    if value < 1:
        raise InvalidArgumentError(f"{name} must be at least 1, found {value}")
