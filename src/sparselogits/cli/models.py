"""Load the models that options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from sparselogits.identity import Identity
    from sparselogits.teacher import TransformersTeacher


def load_student(name: str, device: str, *, dtype: str = "auto") -> nn.Module:
    """Load a student by its folder, its hub name, or the folder of the run that trained it."""
    from sparselogits.teacher.loading import load_language_model
    from sparselogits.train.student import require_finite_weights

    model = load_language_model(name, dtype=dtype).to(device)
    require_finite_weights(model, f"the student at {name}")
    return model


def load_own_teacher(
    name: str, identity: Identity | None, device: str, *, dtype: str
) -> TransformersTeacher:
    """Load a teacher, and check that it made the cache if the identity of a cache is given.

    Raises:
        IdentityMismatchError: another one is named.
    """
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_tokenizer
    from sparselogits.train.run import require_same_teacher

    engine = load_teacher(name, tokenizer=load_tokenizer(name), dtype=dtype, device=device)
    if identity is not None:
        require_same_teacher(engine, identity)
    return engine
