"""The values that the store reads and writes: a window with its targets, and statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

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
    """One window of L tokens with the teacher's targets: a row of a shard.

    Args:
        window_index: index of the window in the corpus, from 0.
        tokens: int32 [L].
        document_starts: int32, ascending positions in the window at which a document starts (0
            only if one starts there).
        mask: bool [L], True where the position carries a target; None if all do.
        targets: targets of L positions; positions masked out own no entries.
        teacher_loss: mean negative log-likelihood of the true next tokens, in nats.
        teacher_entropy: mean entropy of the teacher's distribution, in nats.
    """

    window_index: int
    tokens: Int32
    document_starts: Int32
    mask: Bool | None
    targets: SparseTargets
    teacher_loss: float
    teacher_entropy: float

    def present(self) -> Bool:
        """Return which positions carry a target, bool [L]."""
        return np.ones(len(self.tokens), np.bool_) if self.mask is None else self.mask

    def validate(self, window_length: int) -> None:
        """Validate that the parts fit each other and are within their bounds.

        Raises:
            InvalidTargetsError: names the window and the part.
        """
        starts = self.document_starts
        for good, what in (
            (self.tokens.dtype == np.int32, f"tokens are {self.tokens.dtype}, not int32"),
            (
                self.tokens.shape == (window_length,),
                f"tokens have shape {self.tokens.shape}, not ({window_length},)",
            ),
            (starts.dtype == np.int32, f"document_starts are {starts.dtype}, not int32"),
            (
                starts.ndim == 1
                and bool((starts[1:] > starts[:-1]).all())
                and bool(((starts >= 0) & (starts < window_length)).all()),
                "document_starts do not ascend within the window",
            ),
            (
                self.mask is None
                or (self.mask.dtype == np.bool_ and self.mask.shape == (window_length,)),
                f"mask is not bool [{window_length}]",
            ),
            (
                len(self.targets) == window_length,
                f"targets have {len(self.targets)} positions, not {window_length}",
            ),
            (
                len(self.tokens) == 0
                or 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < self.targets.vocab_size,
                f"tokens do not lie in the vocabulary of {self.targets.vocab_size} ids",
            ),
            (
                -ROUNDING <= self.teacher_loss <= LARGEST_LOSS,
                f"the teacher's loss is {self.teacher_loss}, expected 0 to {LARGEST_LOSS:g} nats. "
                "The text may hold a token that the teacher cannot predict",
            ),
            (
                -ROUNDING <= self.teacher_entropy <= math.log(self.targets.vocab_size) + 0.01,
                f"the teacher's entropy is {self.teacher_entropy}, which no distribution over "
                f"{self.targets.vocab_size} ids has",
            ),
        ):
            if not good:
                raise InvalidTargetsError(f"window {self.window_index}: {what}")


@dataclass(frozen=True)
class CacheStatistics:
    """Statistics of a cache, summed from the footers of its shards.

    Args:
        shards: number of files.
        windows: number of rows.
        tokens: number of positions, with a target or without.
        positions: number of positions that carry a target.
        entries: number of stored ids.
        bytes_on_disk: size of all shard files.
        text_bytes: size of the tokens of the text in them.
        mean_teacher_loss: mean over windows, nats.
        mean_teacher_entropy: mean over windows, nats.
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

    @property
    def bits_per_entry(self) -> float:
        """Bits on disk per entry; everything counts but the tokens of the text."""
        return 8 * (self.bytes_on_disk - self.text_bytes) / self.entries if self.entries else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per position, with the tokens of the text."""
        return self.bytes_on_disk / self.tokens if self.tokens else 0.0

    @property
    def entries_per_position(self) -> float:
        """Mean entries per position that carries a target."""
        return self.entries / self.positions if self.positions else 0.0
