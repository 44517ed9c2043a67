"""Models that options name, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from sparselogits.identity import Identity
    from sparselogits.teacher import TransformersTeacher


def load_student(name: str, device: str, *, dtype: str = "auto") -> nn.Module:
    """A student by its folder, its hub name, or the directory of the run that trained it."""
    from sparselogits.teacher.loading import load_causal_lm

    trained = Path(name) / "model"
    return load_causal_lm(str(trained) if trained.is_dir() else name, dtype=dtype).to(device)


def load_own_teacher(
    name: str, identity: Identity, device: str, *, dtype: str
) -> TransformersTeacher:
    """The teacher that made a cache.

    Raises:
        IdentityMismatchError: another one is named.
    """
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_tokenizer
    from sparselogits.train.run import require_same_teacher

    engine = load_teacher(name, tokenizer=load_tokenizer(name), dtype=dtype, device=device)
    require_same_teacher(engine, identity)
    return engine
