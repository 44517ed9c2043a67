"""Collate windows into one batch of plain tensors that any Trainer can move and count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparselogits.objectives import IGNORE_INDEX, Causal

_FILLERS = {"shift_labels": IGNORE_INDEX}


def collate(windows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack windows and pad their targets to the widest position of the batch.

    Windows without targets may differ in length: the shorter ones are padded on the right with id 0
    and no labels, which no position with a label attends to.

    Args:
        windows: items of a `CacheDataset`, a `TextDataset` or `TokenisedRows`.

    Returns:
        `input_ids`, `shift_labels`, `labels` int64 [B, L] (`labels` in the Hugging Face
        convention: the token at the position itself, -100 where it is not to be predicted),
        `position_ids` if windows have them, and for windows with targets `target_ids` int64
        [B, L, K], `target_weights` float32 [B, L, K], whose padding has weight 0, and
        `teacher_entropy` float32 [B].

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from sparselogits import CacheDataset
        >>> batches = DataLoader(CacheDataset("my-cache"), batch_size=4, collate_fn=collate)
        >>> batch = next(iter(batches))
        >>> batch["target_ids"].shape == batch["target_weights"].shape
        True
    """
    batch: dict[str, Tensor] = {
        name: _stacked([window[name] for window in windows], filler=_FILLERS.get(name, 0))
        for name in ("input_ids", "shift_labels", "position_ids", "teacher_entropy")
        if name in windows[0]
    }
    batch["labels"] = Causal().at_tokens(batch["shift_labels"], IGNORE_INDEX)
    if "targets" in windows[0]:
        targets = [window["targets"] for window in windows]
        width = max(int(t.entries_per_position.max()) for t in targets)
        padded = [t.padded(width) for t in targets]
        batch["target_ids"] = torch.stack([ids for ids, _ in padded])
        batch["target_weights"] = torch.stack([weights for _, weights in padded])
    return batch


def _stacked(rows: Sequence[Tensor], *, filler: int) -> Tensor:
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    return pad_sequence(list(rows), batch_first=True, padding_value=filler)
