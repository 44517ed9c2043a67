"""Load the models that command-line options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparselogits.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from sparselogits.identity import Identity
    from sparselogits.teacher import Engine, TransformersTeacher


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


def shares_of_teachers(
    teachers: Sequence[str], caches: Sequence[str], weights: Sequence[float] | str | None
) -> list[float]:
    """Return the weight of each teacher that is loaded.

    Args:
        teachers: names of the teachers; none if no teacher is loaded.
        caches: the caches that the teachers made; none to compare with none.
        weights: value of `--weights`; None for equal weights.

    Raises:
        InvalidArgumentError: numbers of teachers, caches and weights do not agree.
    """
    if not teachers:
        return []
    if caches and len(teachers) != len(caches):
        raise InvalidArgumentError(
            f"--teacher is given {len(teachers)} times and --cache {len(caches)} times; give the "
            "teacher of each cache, in the order of the caches"
        )
    if isinstance(weights, str):
        raise InvalidArgumentError(
            "--weights best follows the losses that a cache stores, which held-out text has not; "
            "give numbers, or measure against one teacher alone"
        )
    shares = [1 / len(teachers)] * len(teachers) if weights is None else list(weights)
    if len(shares) != len(teachers):
        raise InvalidArgumentError(
            f"--weights has {len(shares)} numbers, and there are {len(teachers)} teachers; give "
            "one per teacher"
        )
    return shares


def load_cache_teachers(
    names: Sequence[str],
    identities: Sequence[Identity],
    shares: Sequence[float],
    device: str,
    *,
    dtype: str,
) -> Engine:
    """Load the teacher of a cache, or the mixture of the teachers of several.

    Args:
        names: the teachers, in the order of their caches.
        identities: identities of the caches; none to compare with none.
        shares: weight of each teacher. One of weight 0 is not loaded.
        device: device of the teachers.
        dtype: number format of their weights.

    Raises:
        InvalidArgumentError: the weights are not shares of a whole.
        IdentityMismatchError: another teacher than a cache's is named.
    """
    from sparselogits.teacher import MixtureTeacher

    made: Sequence[Identity | None] = identities or [None] * len(names)
    used = [
        load_cache_teacher(name, identity, device, dtype=dtype)
        for name, identity, share in zip(names, made, shares, strict=True)
        if share != 0
    ]
    if len(names) == 1:
        return used[0]
    return MixtureTeacher(used, [share for share in shares if share != 0])
