"""What the builder needs of a teacher, whatever runs it."""

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
        row: which window of the batch.
        positions: the run of positions, without step.
        logits: float32 [P, V] on the teacher's device; ids that are no token hold -inf. The
            receiver may overwrite it.
    """

    row: int
    positions: slice
    logits: Tensor


class Engine(Protocol):
    """Something that turns windows of tokens into logits, slice by slice.

    To add an engine: implement these four names, run `check_engine` on it, and hand it to
    `build.build_caches`; `ModuleTeacher` is the shortest example. Results must not depend on which
    windows share a batch beyond rounding.
    """

    vocab_size: int
    """V, columns of the head, padding rows included."""

    token_mask: Tensor
    """bool [V]: which ids are tokens of the tokenizer."""

    identity: dict[str, Any]
    """Name, weights hash, dtype, engine, quantization: see `Identity.teacher`."""

    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        """Logits of every position of every window, in order.

        Args:
            tokens: int64 [B, L] on any device.
            document_starts: per window, where documents start, if attention restarts there.
        """
        ...
