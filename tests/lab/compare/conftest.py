"""Provide the recipe of a comparison of tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny(teacher_folder: Path, text: Path) -> Callable[..., dict[str, Any]]:
    """Provide `tiny(folder, longest=LINE, **values)`, the values of a recipe without methods."""

    def values(folder: Path, *, longest: int = 2500, **own: Any) -> dict[str, Any]:
        pages = folder / "pages.jsonl"
        pages.write_text("".join(line for line in text.open() if len(line) < longest))
        return {
            "teacher": str(teacher_folder),
            "data": str(pages),
            "out": str(folder / "out"),
            "window": 32,
            "holdout": 0.25,
            "heldout_windows": 4,
            "students": {"tiny": {"hidden_size": 16, "layers": 1, "heads": 2}},
            "training": {"per_device_train_batch_size": 8, "logging_steps": 1},
            "seeds": [0, 1],
            "resamples": 50,
            **own,
        }

    return values
