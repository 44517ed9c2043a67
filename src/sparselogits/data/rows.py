"""Convert rows of a `datasets` object, as TRL and transformers use it, to evaluation items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from sparselogits.errors import InvalidArgumentError
from sparselogits.objectives import IGNORE_INDEX, Causal


class TokenisedRows(Dataset[dict[str, Any]]):
    """A dataset of tokenised rows of any length, for evaluation.

    Items have the form of a `TextDataset`'s.

    Args:
        rows: a `datasets.Dataset` with `input_ids` and optionally `labels`. `labels` are in the
            Hugging Face convention (the token at the position itself, -100 where it is not to be
            predicted).

    Raises:
        InvalidArgumentError: there is no `input_ids`, or rows cannot be read by number.
    """

    def __init__(self, rows: Any) -> None:
        columns = list(rows.column_names or ())
        if "input_ids" not in columns or not hasattr(rows, "__len__"):
            raise InvalidArgumentError(
                f"a {type(rows).__name__} with the columns {', '.join(columns) or 'unknown'} "
                "cannot be evaluated on: rows with `input_ids` that can be read by number are "
                "expected. Tokenise them (as TRL's SFTTrainer does with its eval_dataset), or pack "
                "the text and give TextDataset(corpus)"
            )
        kept = [name for name in ("input_ids", "labels") if name in columns]
        self._rows = rows.select_columns(kept).with_format(None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        tokens = torch.tensor(row["input_ids"], dtype=torch.int64)
        labels = torch.tensor(row.get("labels", row["input_ids"]), dtype=torch.int64)
        return {
            "input_ids": tokens,
            "shift_labels": Causal().at_positions(labels, IGNORE_INDEX),
        }


def as_windows(dataset: Any) -> Any:
    """Wrap a `datasets` object in `TokenisedRows`, for evaluation; return other datasets unchanged.

    In a mapping of names to datasets, each dataset is converted.
    """
    if isinstance(dataset, Mapping):
        return {name: as_windows(part) for name, part in dataset.items()}
    return TokenisedRows(dataset) if hasattr(dataset, "column_names") else dataset
