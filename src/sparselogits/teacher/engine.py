"""Define the interface of a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class LogitsSlice:
    """Logits of a run of positions of one window.

    Args:
        row: number of the window in the batch.
        positions: range of positions, without step.
        logits: float32 [P, V] on the teacher's device, -inf at ids that are no token. The receiver
            may overwrite it.
    """

    row: int
    positions: slice
    logits: Tensor


class Engine(Protocol):
    """A teacher: it computes the logits of windows of tokens, slice by slice.

    To add an engine, implement these four names, run `check_engine` on it, and pass it to
    `caching.build_caches`; `ModuleTeacher` is the shortest example. Results must not depend on
    which windows share a batch, up to rounding.
    """

    vocab_size: int
    """Number V of columns of the head, padding included."""

    token_mask: Tensor
    """bool [V], true for ids that are tokens of the tokenizer."""

    identity: dict[str, Any]
    """Name, weights hash, dtype, engine and quantization; see `Identity.teacher`."""

    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        """Yield the logits of every position of every window, in order.

        Args:
            tokens: int64 [B, L] on any device.
            document_starts: positions at which documents start, for each window, if attention
                restarts there.
        """
        ...
