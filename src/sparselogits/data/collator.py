"""Collate windows into a batch, a dict of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparselogits.objectives import CAUSAL, IGNORE_INDEX

_NAMES = (
    *("input_ids", "shift_labels", "labels", "attention_mask", "position_ids"),
    *("loss_weight", "teacher_entropy"),
)
_PADDING = {"shift_labels": IGNORE_INDEX, "labels": IGNORE_INDEX}
"""Padding values by column; columns that are not listed are padded with 0."""


def collate(windows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack windows, and pad their targets to the largest number of entries per position.

    Windows without targets may differ in length: shorter ones are padded on the right with id 0 and
    label -100. Under causal attention no position with a label attends to the padding.

    Args:
        windows: items of a `CacheDataset`, `TextDataset` or `TokenisedRows`.

    Returns:
        A dict with `input_ids`, `shift_labels` and `labels`, int64 [B, L] (`labels` follow the
        Hugging Face convention: the token at the position itself, or -100); if the windows have
        them, `attention_mask` and `position_ids`, int64 [B, L], and `loss_weight` and
        `teacher_entropy`, float32 [B]; and for windows with targets `target_ids`, int64 [B, L, K],
        and `target_weights`, float32 [B, L, K], where padding has weight 0.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from sparselogits import CacheDataset
        >>> batches = DataLoader(CacheDataset("my-cache"), batch_size=4, collate_fn=collate)
        >>> batch = next(iter(batches))
        >>> batch["target_ids"].shape == batch["target_weights"].shape
        True
    """
    batch: dict[str, Tensor] = {
        name: _stacked([window[name] for window in windows], padding=_PADDING.get(name, 0))
        for name in _NAMES
        if name in windows[0]
    }
    if "labels" not in batch:
        batch["labels"] = CAUSAL.at_tokens(batch["shift_labels"], IGNORE_INDEX)
    if "targets" in windows[0]:
        targets = [window["targets"] for window in windows]
        width = max(int(t.entries_per_position.max()) for t in targets)
        padded = [t.padded(width) for t in targets]
        batch["target_ids"] = torch.stack([ids for ids, _ in padded])
        batch["target_weights"] = torch.stack([weights for _, weights in padded])
    return batch


def _stacked(rows: Sequence[Tensor], *, padding: int) -> Tensor:
    """Pad tensors on the right to equal length, and stack them."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    return pad_sequence(list(rows), batch_first=True, padding_value=padding)
