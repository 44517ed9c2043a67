"""Define the values that the store reads and writes: windows with targets, and statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import InvalidTargetsError
from sparselogits.samplers.sampler import ROUNDING
from sparselogits.store.bounds import LARGEST_LOSS
from sparselogits.targets import SparseTargets

Int32: TypeAlias = NDArray[np.int32]
Bool: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class WindowRecord:
    """Window of L tokens with the teacher's targets, stored as a row of a shard.

    Args:
        window_index: index of the window in the corpus, from 0.
        tokens: int32 [L].
        document_starts: int32, ascending positions at which a document starts; 0 is included only
            if a document starts at the first token.
        mask: bool [L], True for positions with a target; None if all positions have a target.
        targets: targets of L positions; those where `mask` is False have no entries.
        teacher_loss: mean negative log-likelihood of the labels at temperature 1, in nats.
        teacher_entropy: mean entropy of the teacher's distribution at the cache's temperature, in
            nats.
        inputs: int32 [L], input of the teacher, which differs from `tokens` only where `mask` is
            True; None for a causal objective, whose input is the text.
        rate: probability with which each token of the window was chosen for prediction, in (0, 1];
            None for a causal objective.
    """

    window_index: int
    tokens: Int32
    document_starts: Int32
    mask: Bool | None
    targets: SparseTargets
    teacher_loss: float
    teacher_entropy: float
    inputs: Int32 | None = None
    rate: float | None = None

    def present(self) -> Bool:
        """Return whether each position has a target, bool [L]."""
        return np.ones(len(self.tokens), np.bool_) if self.mask is None else self.mask

    def validate(self, window_length: int, *, masked: bool) -> None:
        """Validate the fields for a cache of `window_length` tokens per window.

        `masked` states whether the cache has a masked objective, with corrupted inputs.

        Raises:
            InvalidTargetsError: a field is invalid; the message contains the window and the field.
        """
        starts = self.document_starts
        for good, what in (
            (self.tokens.dtype == np.int32, f"tokens are {self.tokens.dtype}, expected int32"),
            (
                self.tokens.shape == (window_length,),
                f"tokens have shape {self.tokens.shape}, expected ({window_length},)",
            ),
            (starts.dtype == np.int32, f"document_starts are {starts.dtype}, expected int32"),
            (
                starts.ndim == 1
                and bool((starts[1:] > starts[:-1]).all())
                and bool(((starts >= 0) & (starts < window_length)).all()),
                f"document_starts are not ascending positions in [0, {window_length})",
            ),
            (
                self.mask is None
                or (self.mask.dtype == np.bool_ and self.mask.shape == (window_length,)),
                f"mask is not a bool array of shape ({window_length},)",
            ),
            (
                len(self.targets) == window_length,
                f"targets have {len(self.targets)} positions, expected {window_length}",
            ),
            (
                len(self.tokens) == 0
                or 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < self.targets.vocab_size,
                f"tokens are not all in the vocabulary of {self.targets.vocab_size} ids",
            ),
            (
                -ROUNDING <= self.teacher_loss <= LARGEST_LOSS,
                f"the teacher's loss is {self.teacher_loss}, expected 0 to {LARGEST_LOSS:g} nats. "
                "The text may contain a token to which the teacher assigns probability 0",
            ),
            (
                -ROUNDING <= self.teacher_entropy <= math.log(self.targets.vocab_size) + 0.01,
                f"the teacher's entropy is {self.teacher_entropy} nats, expected 0 to "
                f"log({self.targets.vocab_size})",
            ),
            (
                self._input_is_sound() if masked else self.inputs is None and self.rate is None,
                "inputs and rate do not match the cache's objective: expected a mask, inputs that "
                "differ from the tokens only inside the mask, and a rate in (0, 1] for a masked "
                "objective, and neither inputs nor a rate for a causal objective",
            ),
        ):
            if not good:
                raise InvalidTargetsError(f"window {self.window_index}: {what}")

    def _input_is_sound(self) -> bool:
        """Return whether inputs and rate are valid for a masked objective."""
        inputs, mask, rate = self.inputs, self.mask, self.rate
        if inputs is None or mask is None or rate is None:
            return False
        if not inputs.shape == mask.shape == self.tokens.shape or mask.dtype != np.bool_:
            return False
        inside = inputs[mask]
        return (
            inputs.dtype == np.int32
            and bool((inputs == self.tokens)[~mask].all())
            and bool(((inside >= 0) & (inside < self.targets.vocab_size)).all())
            and 0 < rate <= 1
        )


@dataclass(frozen=True)
class CacheStatistics:
    """Statistics of a cache, computed from the footers of its shards.

    Args:
        shards: number of shards.
        windows: number of windows.
        tokens: number of positions with or without a target.
        positions: number of positions with a target.
        entries: number of stored entries.
        bytes_on_disk: size of all shards in bytes.
        text_bytes: compressed size in bytes of the tokens in the shards.
        mean_teacher_loss: loss of the teacher in nats, averaged over windows.
        mean_teacher_entropy: entropy of the teacher in nats, averaged over windows.
    """

    shards: int
    windows: int
    tokens: int
    positions: int
    entries: int
    bytes_on_disk: int
    text_bytes: int
    mean_teacher_loss: float
    mean_teacher_entropy: float

    @classmethod
    def total(cls, parts: Sequence[CacheStatistics]) -> CacheStatistics:
        """Return the statistics of the union of disjoint parts; means of no parts are NaN."""
        windows = sum(part.windows for part in parts)

        def mean(name: str) -> float:
            whole = sum(part.windows * getattr(part, name) for part in parts)
            return whole / windows if windows else math.nan

        means = ("mean_teacher_loss", "mean_teacher_entropy")
        values: dict[str, Any] = {
            field.name: mean(field.name)
            if field.name in means
            else sum(getattr(part, field.name) for part in parts)
            for field in fields(cls)
        }
        return cls(**values)

    @property
    def bits_per_entry(self) -> float:
        """Bits on disk per entry, excluding the tokens of the text; 0 without entries."""
        return 8 * (self.bytes_on_disk - self.text_bytes) / self.entries if self.entries else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per position, including the tokens of the text; 0 without positions."""
        return self.bytes_on_disk / self.tokens if self.tokens else 0.0

    @property
    def entries_per_position(self) -> float:
        """Mean entries per position with a target; 0 without such a position."""
        return self.entries / self.positions if self.positions else 0.0
