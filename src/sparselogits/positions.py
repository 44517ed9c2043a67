"""Compare the length of windows with a model's positions before work starts.

A model with a table of positions (GPT-2, OPT, GPT-J, MPT, ...) cannot run longer sequences. A model
that computes positions (rotary embeddings) can, but its predictions there are worse than its loss
on shorter text suggests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparselogits.allowances import refuse
from sparselogits.causal_lm import embedding_rows, text_config
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_RESERVED = 2  # rows of a table that some models keep for padding
_FAILURES = (IndexError, RuntimeError, ValueError)


def trained_positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model; None where its configuration has no limit."""
    config = text_config(getattr(model, "config", None))
    for name in _NAMES:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            return max(limit, _stretched(config))
    return None


def _stretched(config: object) -> int:
    """Return the positions after rotary scaling, where the configured number precedes scaling."""
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
    """Check that a model can run windows of a length; a length beyond its positions is tried.

    Args:
        model: a transformers causal language model.
        run: forward pass of the model, from `input_ids`.
        length: number of tokens per window.
        restarts: whether positions restart at documents, which may all be short enough.
        allow: where positions restart, "long-windows" turns the refusal into a warning.

    Raises:
        InvalidArgumentError: the model has too few positions.
    """
    limit = trained_positions(model)
    if limit is None or length <= limit:
        return
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    tokens = torch.arange(length, device=device)[None] % embedding_rows(model)
    try:
        run(input_ids=tokens)
    except _FAILURES as error:
        refused = _too_long(model, length, limit)
        refused.__cause__ = error
        if not restarts:
            raise refused from error
        refuse(refused, "long-windows", allow)
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
    """Turn the failure of a model on a sequence beyond its positions into a typed error.

    Raises:
        InvalidArgumentError: the forward pass failed on a sequence that is too long.
    """
    try:
        yield
    except _FAILURES as error:
        limit = trained_positions(model)
        if limit is None or length <= limit - _RESERVED:
            raise
        raise _too_long(model, length, limit) from error


def _too_long(model: nn.Module, length: int, limit: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{type(model).__name__} has {limit:,} positions and cannot run sequences of {length:,} "
        f"tokens; use a window of at most {limit} (--window), or a model with a longer context"
    )
