"""Validate that a model can run windows of a given length, before expensive work starts.

A model with a table that has one row per position (GPT-2, OPT, GPT-J, ...) cannot run sequences
that are longer than the table. A model that computes rotary embeddings for any position can, but
its predictions beyond the positions of its training may be poor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.allowances import refuse
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.language_model import text_config

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_FAILURES = (IndexError, RuntimeError, ValueError)


def trained_positions(model: nn.Module) -> int | None:
    """Return a model's maximum sequence length in tokens; None if its configuration states none."""
    config = text_config(getattr(model, "config", None))
    for name in _NAMES:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            # some configurations state only the number before scaling
            return max(limit - _rows_for_padding(model, limit), _scaled_positions(config))
    return None


def _rows_for_padding(model: nn.Module, rows: int) -> int:
    """Return the number of rows of the position embedding that are reserved for padding.

    RoBERTa numbers positions from the row after the padding row. The result is 0 if the model has
    no position embedding with `rows` rows, or the embedding has no padding row.

    Args:
        model: a transformers language model.
        rows: number of rows in the position embedding.
    """
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is tokens:
            continue
        if module.num_embeddings == rows and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _scaled_positions(config: object) -> int:
    """Return the number of positions after rotary scaling; 0 if the configuration states none."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return 0
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or not isinstance(original, int):
        return 0
    return int(factor * original)


@torch.no_grad()
def check_window(
    model: nn.Module,
    run: Callable[..., Tensor],
    length: int,
    *,
    restarts: bool = False,
    allow: Collection[str] = (),
) -> None:
    """Validate that a model can run windows of a given length.

    If the length exceeds the model's positions, one window is run; if that succeeds, a warning
    says that predictions may be poor.

    Args:
        model: a transformers language model.
        run: forward pass of the model from `input_ids`.
        length: number of tokens per window.
        restarts: whether positions restart at document starts, so that a longer window may fit.
        allow: names of `ALLOWANCES`; with `restarts`, "long-windows" turns the error into a
            warning.

    Raises:
        InvalidArgumentError: the model fails on windows of this length.
    """
    limit = trained_positions(model)
    if limit is None or length <= limit:
        return
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    # RoBERTa gives padding no position of its own, so a probe with padding would be too short
    token = 1 if getattr(embedding, "padding_idx", None) == 0 else 0
    tokens = torch.full((1, length), token, device=embedding.weight.device)
    try:
        run(input_ids=tokens)
    except _FAILURES as error:
        too_long = _too_long(model, length, limit)
        if not restarts:
            raise too_long from error
        too_long.__cause__ = error
        refuse(too_long, "long-windows", allow)
        return
    warnings.warn(
        f"windows of {length:,} tokens are longer than the {limit:,} positions that "
        f"{type(model).__name__} was trained on; its predictions beyond them may be poor. Use "
        f"windows of at most {limit:,} tokens, unless its context was extended",
        SparseLogitsWarning,
        stacklevel=2,
    )


@contextmanager
def positions_explained(model: nn.Module, length: int) -> Iterator[None]:
    """Convert a failure of a forward pass in the block to a typed error, if a sequence is too long.

    Raises:
        InvalidArgumentError: the block failed, and `length`, the number of tokens per sequence,
            exceeds the model's positions.
    """
    try:
        yield
    except _FAILURES as error:
        limit = trained_positions(model)
        if limit is None or length <= limit:
            raise
        raise _too_long(model, length, limit) from error


def _too_long(model: nn.Module, length: int, limit: int) -> InvalidArgumentError:
    """Return the error for sequences that are longer than a model's positions."""
    return InvalidArgumentError(
        f"{type(model).__name__} has {limit:,} positions and cannot run sequences of {length:,} "
        f"tokens; use a window of at most {limit} (--window), or a model with a longer context"
    )
