"""Convert the rows of a `datasets.Dataset` with token ids to items for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from sparselogits.errors import InvalidArgumentError
from sparselogits.objectives import CAUSAL, IGNORE_INDEX


class TokenisedRows(Dataset[dict[str, Any]]):
    """Dataset of tokenised rows of any length, for evaluation.

    `dataset[i]` is a dict with `input_ids` and `shift_labels`, int64 [L], like the items of
    `TextDataset`.

    Args:
        rows: a `datasets.Dataset` with `input_ids` and optionally `labels`. `labels` follow the
            Hugging Face convention: the token at the position itself, or -100 if the token is not
            to be predicted.

    Raises:
        InvalidArgumentError: there is no column `input_ids`, or the rows have no random access.
    """

    def __init__(self, rows: Any) -> None:
        columns = list(rows.column_names or ())
        if "input_ids" not in columns or not hasattr(rows, "__len__"):
            raise InvalidArgumentError(
                f"cannot evaluate on a {type(rows).__name__} with the columns "
                f"{', '.join(columns) or 'unknown'}; expected rows with `input_ids` and random "
                "access. Tokenise the rows (as TRL's SFTTrainer does with its eval_dataset), or "
                "pack the text and pass TextDataset(corpus)"
            )
        kept = [name for name in ("input_ids", "labels") if name in columns]
        self._rows = rows.select_columns(kept).with_format(None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        tokens = torch.tensor(row["input_ids"], dtype=torch.int64)
        labels = torch.tensor(row.get("labels", row["input_ids"]), dtype=torch.int64)
        return {"input_ids": tokens, "shift_labels": CAUSAL.at_positions(labels, IGNORE_INDEX)}


def as_windows(dataset: Any) -> Any:
    """Wrap a dataset of the `datasets` library in `TokenisedRows`; return other datasets unchanged.

    Args:
        dataset: a dataset, or a mapping from names to datasets, which is returned as a dict of
            converted datasets. An object with `column_names` counts as one of that library.

    Raises:
        InvalidArgumentError: such a dataset has no column `input_ids`, or no random access (a
            `datasets.IterableDataset`).
    """
    if isinstance(dataset, Mapping):
        return {name: as_windows(part) for name, part in dataset.items()}
    return TokenisedRows(dataset) if hasattr(dataset, "column_names") else dataset
