"""Load the models that command-line options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from sparselogits.identity import Identity
    from sparselogits.teacher import TransformersTeacher


def load_student(name: str, device: str, *, dtype: str = "auto") -> nn.Module:
    """Load a student from its folder, its hub name, or the folder of the run that trained it.

    Raises:
        TeacherError: If the model cannot be read or has weights that are not finite.
    """
    from sparselogits.teacher.loading import load_language_model
    from sparselogits.train.student import require_finite_weights

    model = load_language_model(name, dtype=dtype).to(device)
    require_finite_weights(model, f"the student at {name}")
    return model


def load_cache_teacher(
    name: str, identity: Identity | None, device: str, *, dtype: str
) -> TransformersTeacher:
    """Load a teacher and, given the identity of a cache, check that it is the cache's teacher.

    Raises:
        IdentityMismatchError: If the cache was built with another teacher.
    """
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_tokenizer
    from sparselogits.train.run import require_same_teacher

    engine = load_teacher(name, tokenizer=load_tokenizer(name), dtype=dtype, device=device)
    if identity is not None:
        require_same_teacher(engine, identity)
    return engine
