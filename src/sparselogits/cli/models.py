"""Load the models that command-line options name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparselogits.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from sparselogits.data import DraftVocabulary
    from sparselogits.identity import Identity
    from sparselogits.teacher import Engine, TransformersTeacher


def load_student(
    name: str, device: str, *, dtype: str = "auto", draft: DraftVocabulary | None = None
) -> nn.Module:
    """Load a student from its folder, its hub name, or the folder of the run that trained it.

    With a draft vocabulary, the student's head is replaced by one for that vocabulary's classes.
    """
    from sparselogits.data.draft import require_vocabulary_of
    from sparselogits.teacher.demo_model import model_named
    from sparselogits.teacher.loading import load_language_model
    from sparselogits.train.student import require_finite_weights

    require_vocabulary_of(Path(model_named(name)), draft)
    model = load_language_model(name, dtype=dtype).to(device)
    require_finite_weights(model, f"the student at {name}")
    if draft is not None:
        draft.give_head(model)
    return model


def load_cache_teacher(
    name: str, identity: Identity | None, device: str, *, dtype: str
) -> TransformersTeacher:
    """Load a teacher and, given the identity of a cache, check that it is the cache's teacher."""
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
    """Return one weight per teacher: those of `--weights`, or equal ones; [] without teachers.

    Raises InvalidArgumentError if teachers, caches and weights differ in number, or if the weights
    are "best", negative or do not sum to 1.
    """
    from sparselogits.teacher.mixture import require_shares

    if weights is not None and max(len(teachers), len(caches)) < 2:
        raise InvalidArgumentError(
            "--weights needs several teachers, found at most one; repeat --cache and --teacher, or "
            "leave --weights out"
        )
    if not teachers:
        return []
    if caches and len(teachers) != len(caches):
        raise InvalidArgumentError(
            f"found {len(teachers)} --teacher and {len(caches)} --cache options; give one teacher "
            "per cache, in the same order"
        )
    if isinstance(weights, str):
        raise InvalidArgumentError(
            "--weights best needs losses that a cache stores, and held-out text has none; give "
            "numbers, or evaluate with one teacher only"
        )
    shares = [1 / len(teachers)] * len(teachers) if weights is None else list(weights)
    if len(shares) != len(teachers):
        raise InvalidArgumentError(
            f"--weights has {len(shares)} numbers, but there are {len(teachers)} teachers; give "
            "one number per teacher"
        )
    require_shares([share for share in shares if share != 0])
    return shares


def load_cache_teachers(
    names: Sequence[str],
    identities: Sequence[Identity],
    shares: Sequence[float],
    device: str,
    *,
    dtype: str,
) -> Engine:
    """Load the teacher of one cache, or the mixture of the teachers of several caches.

    Args:
        names: names of the teachers, in the order of the caches.
        identities: identities of the caches; empty to skip the check of the teachers.
        shares: weight of each teacher (`shares_of_teachers`); teachers of weight 0 are not loaded.
        device: device of the teachers.
        dtype: data type of the teachers' weights.
    """
    from sparselogits.teacher import MixtureTeacher

    expected: Sequence[Identity | None] = identities or [None] * len(names)
    used = [
        load_cache_teacher(name, identity, device, dtype=dtype)
        for name, identity, share in zip(names, expected, shares, strict=True)
        if share != 0
    ]
    if len(names) == 1:
        return used[0]
    return MixtureTeacher(used, [share for share in shares if share != 0])
