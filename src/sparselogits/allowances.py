"""Refusals that a user who knows better can lift, each by its name.

On the command line `--allow NAME`, in a recipe `allow: [NAME]`, in Python `with allowing("NAME"):`
or, where a function takes it, `allow=["NAME"]`. What is dangerous (pickle, an index that leaves the
model's folder) or cannot work has no name here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sparselogits.errors import InvalidArgumentError, SparseLogitsError, SparseLogitsWarning

ALLOWANCES = {
    "worse-than-guessing": "a teacher whose loss on the text is worse than guessing",
    "other-tokenizer": "a tokenizer whose ids mean other tokens than the cache's",
    "other-teacher": "a teacher whose weights are not those that the cache was made by",
    "missing-weights": "a checkpoint that lacks weights of its model, which stay random",
    "tokens-without-rows": "a tokenizer with ids that the model's head or embedding lacks",
    "linked-weights": "weight files that are links to files outside of the model's folder",
    "long-windows": "windows longer than the positions that a model has",
}
"""What each name allows."""


_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset())


@contextmanager
def allowing(*names: str) -> Iterator[None]:
    """Allow what the names stand for within the block, on top of what is allowed around it.

    Raises:
        InvalidArgumentError: for a name that does not exist.
    """
    require_known(names)
    token = _allowed.set(_allowed.get() | frozenset(names))
    try:
        yield
    finally:
        _allowed.reset(token)


def require_known(allow: Collection[str]) -> None:
    """Validate names of allowances.

    Raises:
        InvalidArgumentError: for a name that does not exist.
    """
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown:
        raise InvalidArgumentError(
            f"unknown allowance {unknown[0]!r}; available: {', '.join(ALLOWANCES)}"
        )


def refuse(error: SparseLogitsError, name: str, allow: Collection[str] = ()) -> None:
    """Raise an error, or warn in its place where it is allowed.

    Args:
        error: what was found, what was expected, what to do.
        name: the allowance that lifts it, a key of `ALLOWANCES`.
        allow: what the user allows beside `allowing`.
    """
    require_known(allow)
    message = str(error).rstrip(". ")
    if name in allow or name in _allowed.get():
        warnings.warn(f"{message} (allowed: {name})", SparseLogitsWarning, stacklevel=3)
        return
    raise type(error)(f"{message}. Or go on all the same: --allow {name}") from error.__cause__
