"""Allowances: names by which a user turns a failed check into a warning.

On the command line `--allow NAME`, in a recipe `allow: [NAME]`, in Python `with allowing("NAME"):`
or, where a function takes it, `allow=["NAME"]`. Checks against what is dangerous (pickle, an index
that points outside the model's folder) or cannot work have no allowance.
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
"""Descriptions of what each name allows."""

_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset())


@contextmanager
def allowing(*names: str) -> Iterator[None]:
    """Turn failures of the named checks into warnings within a `with` block; blocks may be nested.

    Raises:
        InvalidArgumentError: If a name is unknown.
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
        InvalidArgumentError: If a name is unknown.
    """
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown:
        raise InvalidArgumentError(
            f"unknown allowance {unknown[0]!r}; available: {', '.join(ALLOWANCES)}"
        )


def refuse(error: SparseLogitsError, name: str, allow: Collection[str] = ()) -> None:
    """Raise the error of a failed check, or warn instead if the check has been allowed to fail.

    Args:
        error: error that says what was found, what was expected and what to do.
        name: allowance of the check, a key of `ALLOWANCES`.
        allow: allowances in addition to those of `allowing`.
    """
    require_known(allow)
    message = str(error).rstrip(". ")
    if name in allow or name in _allowed.get():
        warnings.warn(f"{message} (allowed: {name})", SparseLogitsWarning, stacklevel=3)
        return
    raise type(error)(f"{message}. To continue with a warning: --allow {name}") from error.__cause__
