"""Define allowances: names of checks whose failure a user may turn into a warning.

An allowance is given on the command line by `--allow NAME`, in a recipe by `allow: [NAME]`, and in
Python by `with allowing("NAME"):` or by the argument `allow=["NAME"]` of functions that have it.
Checks against dangerous input (pickle, an index that points outside the model's folder) and against
settings that cannot work have no allowance.
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
    "other-teacher": "a teacher whose weights differ from those that the cache was built with",
    "missing-weights": "a checkpoint that lacks weights of its model, which stay random",
    "tokens-without-rows": "a tokenizer with ids that the model's head or embedding lacks",
    "linked-weights": "weight files that are links to files outside of the model's folder",
    "unnormalised-logits": "imported Top-K logits whose normaliser is unknown",
    "long-windows": "windows longer than the positions that a model has",
}
"""Descriptions of the allowances, by name."""

_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset())


@contextmanager
def allowing(*names: str) -> Iterator[None]:
    """Turn failures of the named checks into warnings within a `with` block; blocks may be nested.

    Args:
        names: keys of `ALLOWANCES`.

    Raises:
        InvalidArgumentError: a name is unknown.
    """
    require_known(names)
    token = _allowed.set(_allowed.get() | frozenset(names))
    try:
        yield
    finally:
        _allowed.reset(token)


def require_known(allow: Collection[str]) -> None:
    """Validate that names are keys of `ALLOWANCES`. Raises InvalidArgumentError."""
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

    Raises:
        SparseLogitsError: the check is not allowed to fail; the error has the type of `error`.
        InvalidArgumentError: `allow` contains an unknown name.
    """
    require_known(allow)
    message = str(error).rstrip(". ")
    if name in allow or name in _allowed.get():
        warnings.warn(f"{message} (allowed: {name})", SparseLogitsWarning, stacklevel=3)
        return
    raise type(error)(f"{message}. To continue with a warning: --allow {name}") from error.__cause__
