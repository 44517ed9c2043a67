"""Provide the recipe of a comparison of tiny models, and a teacher for experiments."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiments import small_teacher
from experiments.compare import documents


@pytest.fixture(scope="session")
def tiny(teacher_folder, text) -> Callable[..., dict[str, Any]]:
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


def call(main: Callable[[], object], *words: str) -> None:
    """Run the main function of a script with arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *words])
        main()


def assert_same_verdict(stored: dict[str, Any], again: dict[str, Any]) -> None:
    """Compare the verdict and the endpoints of an experiment with those computed again."""
    assert stored["verdict"] == again["verdict"]
    for name, own in again["endpoints"].items():
        for key in ("mean", "low", "high"):
            assert stored["endpoints"][name][key] == pytest.approx(own[key], abs=1e-5)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> tuple[Path, Path]:
    """A teacher of a few steps, and a part of its text."""
    folder = tmp_path_factory.mktemp("claims")
    source, teacher, part = folder / "text.txt", folder / "teacher", folder / "part.jsonl"
    source.write_text("\n\n".join(f"Line {i} of a text that is long enough." for i in range(3000)))
    shape = "--width 16 --layers 1 --heads 2 --window 32 --vocabulary 300 --epochs 0.05"
    call(small_teacher.main, "--text", str(source), "--out", str(teacher), *shape.split())
    data = str(teacher / "documents.jsonl")
    call(documents.main, "--data", data, "--out", str(part), "--characters", "30000")
    return teacher, part
