"""Validate that the engine of a causal model satisfies the `Engine` interface, before a build."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparselogits.errors import SparseLogitsError, TeacherError
from sparselogits.identity import canonical_json
from sparselogits.teacher.engine import Engine, require_token_mask

IDENTITY = ("name", "weights", "dtype", "engine", "quantization")
"""Keys that an engine's identity must have."""


def check_engine(engine: Engine, tokens: Tensor, *, tolerance: float = 1e-3) -> None:
    """Validate the engine of a causal model by running it on a few windows.

    The engine must satisfy these conditions:

    - `token_mask` is bool [V] and true at some id; `identity` has the keys of `IDENTITY` and
      contains JSON values.
    - Slices contain every position once and in order. Their logits are float32 [positions, V], -inf
      at ids that are not tokens and finite at all others, and may be overwritten.
    - Equal tokens give equal logits. Logits do not depend on the other windows of a batch, and
      changing the last token of a window changes those of the last position only.

    If L >= 4, the second of two documents is checked too: with document starts, this document's
    logits equal those of the document alone, and do not depend on the first document. An engine
    that raises a SparseLogitsError for document starts passes.

    Args:
        engine: engine to validate.
        tokens: int64 [B, L], B >= 2, L >= 2, windows of real text or any ids that are tokens.
        tolerance: largest difference between logits that count as equal. Batches of different
            shapes may be rounded differently, so half precision needs a larger value.

    Raises:
        TeacherError: a condition is violated, which the message names, or `tokens` has another
            shape.
        AttributeError: the engine lacks a member of `Engine`.

    Example:
        >>> import torch
        >>> from sparselogits.teacher import ModuleTeacher
        >>> trunk, head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)
        >>> mask = torch.ones(32, dtype=torch.bool)
        >>> teacher = ModuleTeacher(trunk, head, token_mask=mask, name="x", architecture="bigrams")
        >>> check_engine(teacher, torch.randint(32, (2, 64)))
    """
    if tokens.ndim != 2 or min(tokens.shape) < 2:
        raise TeacherError(
            f"tokens have shape {tuple(tokens.shape)}; give [B, L] with B and L at least 2"
        )
    require_token_mask(engine)
    lacking = [key for key in IDENTITY if key not in engine.identity]
    if lacking:
        raise TeacherError(f"the identity lacks {', '.join(lacking)}; expected {IDENTITY}")
    try:
        canonical_json(engine.identity)
    except (TypeError, ValueError) as error:
        raise TeacherError(
            f"the identity cannot be written as JSON ({error}); give text, numbers, lists and dicts"
        ) from error
    whole = _logits(engine, tokens)
    not_tokens = ~engine.token_mask.cpu()
    if not bool((whole[..., not_tokens] == -torch.inf).all()):
        raise TeacherError("an id that is not a token has a finite logit; set it to -inf")
    if not bool(whole[..., ~not_tokens].isfinite().all()):
        raise TeacherError("a token's logit is NaN or infinite; expected finite logits")
    _require_equal("two passes over the same tokens", whole, _logits(engine, tokens), tolerance)
    alone = torch.cat([_logits(engine, row[None]) for row in tokens])
    _require_equal("windows alone and in a batch", whole, alone, tolerance)
    changed = tokens.clone()
    changed[:, -1] = tokens[:, 0].where(tokens[:, 0] != tokens[:, -1], tokens[:, 1])
    earlier = _logits(engine, changed)[:, :-1]
    _require_equal("windows that differ in their last token", whole[:, :-1], earlier, tolerance)
    if tokens.shape[1] >= 4:
        _check_documents(engine, tokens, tolerance)


def _check_documents(engine: Engine, tokens: Tensor, tolerance: float) -> None:
    """Validate that documents in one window do not attend to each other."""
    middle = tokens.shape[1] // 2
    starts = [np.array([0, middle], np.int32)] * len(tokens)
    try:
        packed = _logits(engine, tokens, starts)
    except SparseLogitsError:
        return  # unsupported, so builds that reset attention raise this error too
    alone = _logits(engine, tokens[:, middle:].contiguous())
    what = "a document in a window with document_starts and the same document alone"
    _require_equal(what, packed[:, middle:], alone, tolerance)
    changed = tokens.clone()
    changed[:, :middle] = tokens[:, :middle].flip(1).roll(1, 1)
    moved = _logits(engine, changed, starts)
    what = "documents after different documents, although document_starts separate them,"
    _require_equal(what, packed[:, middle:], moved[:, middle:], tolerance)


def _logits(engine: Engine, tokens: Tensor, starts: Sequence[np.ndarray] | None = None) -> Tensor:
    """Return float32 logits [B, L, V] on the CPU; each slice is overwritten after it is copied."""
    rows, length = tokens.shape
    found = torch.empty(rows, length, engine.vocab_size)
    expected = (0, 0)
    for piece in engine.logits(tokens, starts):
        row, start, stop = piece.row, piece.positions.start, piece.positions.stop
        if (row, start) != expected or not start < stop <= length:
            raise TeacherError(
                f"a slice contains positions {start}:{stop} of window {row}; expected it to start "
                f"at position {expected[1]} of window {expected[0]} and stop at most at {length}"
            )
        shape = (stop - start, engine.vocab_size)
        if piece.logits.dtype != torch.float32 or piece.logits.shape != shape:
            raise TeacherError(
                f"logits are {piece.logits.dtype} {tuple(piece.logits.shape)}; "
                f"expected float32 {shape}"
            )
        found[row, start:stop] = piece.logits.cpu()
        piece.logits.fill_(7.0)
        expected = (row, stop) if stop < length else (row + 1, 0)
    if expected != (rows, 0):
        raise TeacherError(
            f"slices end at position {expected[1]} of window {expected[0]}; "
            f"expected all {length} positions of {rows} windows"
        )
    return found


def _require_equal(what: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    """Validate that finite logits in two tensors differ by at most `tolerance`.

    Raises TeacherError.
    """
    finite = one.isfinite()
    difference = float((one[finite] - other[finite]).abs().max())
    if not difference <= tolerance:
        raise TeacherError(
            f"{what} differ by {difference:.2g} in a logit; expected at most {tolerance:g}. Repair "
            "the engine, or raise the tolerance if its precision explains the difference"
        )
