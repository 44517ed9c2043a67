"""Define `Engine`, the interface of teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparselogits.errors import TeacherError


@dataclass(frozen=True)
class LogitsSlice:
    """Logits of consecutive positions of one window.

    Args:
        row: index of the window in the batch.
        positions: slice of P positions with step 1.
        logits: float32 [P, V], or from `logits_at` one row per wanted position; -inf at ids that
            are not tokens. The receiver may overwrite the tensor.
    """

    row: int
    positions: slice
    logits: Tensor


class Engine(Protocol):
    """Interface of a teacher that computes logits for windows of tokens, slice by slice.

    To add an engine, implement the four members below, validate it by `check_engine` if the model
    is causal, and pass it to `caching.build_caches`; `ModuleTeacher` is the shortest example. Up to
    rounding, the logits of a window must not depend on the other windows of the batch.
    """

    vocab_size: int
    """Number V of logits per position, including those of padding rows of the head."""

    token_mask: Tensor
    """Mask of the ids that are tokens of the tokenizer, bool [V]."""

    identity: dict[str, Any]
    """Name, hash of the weights, dtype, engine and quantisation; see `Identity.teacher`."""

    def logits(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[LogitsSlice]:
        """Yield the logits of every position of every window, in order.

        Args:
            tokens: int64 [B, L] on any device.
            document_starts: int32 positions at which documents start and attention restarts, one
                array per window; None if attention does not restart.
            attention_mask: int64 [B, L], 0 at padding, which is at the end; None without padding.
                Only the engines of masked language models are called with a mask; that of a causal
                model, in which no token attends to later padding, may omit this argument.

        Raises:
            SparseLogitsError: the engine does not support document starts.
        """
        ...


def require_token_mask(engine: Engine) -> None:
    """Validate the shape, dtype and values of an engine's token mask.

    Raises:
        TeacherError: the mask is not bool [V], or no id is a token.
    """
    mask = engine.token_mask
    if mask.dtype != torch.bool or mask.shape != (engine.vocab_size,):
        raise TeacherError(
            f"token_mask is {mask.dtype} {tuple(mask.shape)}; expected bool ({engine.vocab_size},)"
        )
    if not bool(mask.any()):
        raise TeacherError(
            f"token_mask is False at all {engine.vocab_size} ids; expected True at the ids that "
            "are tokens of the tokenizer"
        )


def logits_at(
    engine: Engine,
    tokens: Tensor,
    document_starts: Sequence[np.ndarray] | None,
    wanted: Tensor | None,
    attention_mask: Tensor | None = None,
) -> Iterator[LogitsSlice]:
    """Yield an engine's slices with the logits of wanted positions only.

    An engine may define a method `logits_at`, with the remaining arguments, that multiplies only
    the wanted rows by the head. `TransformersTeacher` does.

    Args:
        engine: the engine.
        tokens: see `Engine.logits`.
        document_starts: see `Engine.logits`.
        wanted: bool [B, L], true for positions whose logits are needed; None for all.
        attention_mask: see `Engine.logits`.

    Returns:
        Slices of all positions, whose logits have one row per wanted position of the slice.
    """
    select = getattr(engine, "logits_at", None)
    mask = {} if attention_mask is None else {"attention_mask": attention_mask}
    if wanted is None:
        yield from engine.logits(tokens, document_starts, **mask)
    elif select is not None:
        yield from select(tokens, document_starts, wanted, **mask)
    else:
        for piece in engine.logits(tokens, document_starts, **mask):
            rows = wanted[piece.row, piece.positions].to(piece.logits.device)
            yield piece if bool(rows.all()) else replace(piece, logits=piece.logits[rows])
