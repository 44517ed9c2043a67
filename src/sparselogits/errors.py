"""Define the errors of the library, which are subclasses of `SparseLogitsError`.

A message states what was found, what was expected, and what to do next. The command line prints
the message and exits with code 2.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from sparselogits.untrusted import printable, shown

_LONGEST_MESSAGE = 8000  # characters; a name quoted from an untrusted file may be much longer


class SparseLogitsError(Exception):
    """Base class of the library's errors.

    A message may quote names and values from an untrusted file, so control characters are escaped
    and the middle of a very long message is cut out.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), _LONGEST_MESSAGE)


class InvalidTargetsError(SparseLogitsError, ValueError):
    """Raised if sparse targets are invalid, or cannot be sliced, padded, joined or thinned."""


class InvalidLogitsError(SparseLogitsError, ValueError):
    """Raised if logits or random numbers are NaN or out of range, or of a wrong shape or dtype."""


class InvalidArgumentError(SparseLogitsError, ValueError):
    """Raised if an argument or option is invalid, or if several contradict each other."""


class CorpusError(SparseLogitsError):
    """Raised if text or token ids cannot be read or packed, or fill no window."""


class TeacherError(SparseLogitsError):
    """Raised if a model cannot be loaded or run, has no head, or does not match its tokenizer."""


class IdentityMismatchError(SparseLogitsError):
    """Raised if two objects that must match differ, as in teacher, tokenizer, settings or text."""


class CacheError(SparseLogitsError):
    """Raised if a cache, or results of a comparison, cannot be read, built or changed.

    Causes are missing, incomplete or damaged files, an unknown version, overlapping shards, an
    output folder with other files, and a process that failed or that changes the same cache.
    """


class CacheCorruptionError(CacheError):
    """Raised if stored bytes were changed or removed; the message contains their location."""


class StorageError(CacheError):
    """Raised if a disk or object store is unreachable or rejects a request; data may be intact."""


class RecipeError(SparseLogitsError):
    """Raised if a recipe cannot be read, or has unknown keys or missing or invalid values."""


class TrainingError(SparseLogitsError):
    """Raised if training cannot continue, as with a loss that is not finite or a folder in use."""


class TaskError(SparseLogitsError):
    """Raised if a zero-shot task is unknown or fails, or has no data."""


class ShrinkError(SparseLogitsError):
    """Raised if a model cannot be pruned to the given sizes, or its structure is unsupported."""


class MissingDependencyError(SparseLogitsError):
    """Raised if an optional package is missing; the message contains the command to install it."""


class SparseLogitsWarning(UserWarning):
    """Issued if the library continues with a fallback, or although a check failed."""


class SlowFormatWarning(SparseLogitsWarning):
    """Issued if the stored number format of a teacher is slower than float32 on this processor."""


def reason_of(error: BaseException) -> str:
    """Return the message of an exception, or the name of its class if the message is empty."""
    return str(error).strip() or type(error).__name__


def require_whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """Validate that an argument is an integer in a range, and return it as a Python int.

    Integers of other libraries are accepted, such as `numpy.int64(8)`.

    Args:
        name: name of the argument, for the error message.
        value: value of the argument; a bool is not a valid integer.
        least: smallest valid integer.
        most: largest valid integer; None for no limit.

    Raises:
        InvalidArgumentError: the value is not an integer or not in the range.

    Examples:
        >>> require_whole("batch", 8, 1)
        8
    """
    if type(value) is not bool and isinstance(value, Integral):
        whole = int(value)
        if least <= whole and (most is None or whole <= most):
            return whole
    limit = "" if most is None else f", at most {most:,}"
    raise InvalidArgumentError(
        f"{name} is {shown(value)}; expected a whole number of at least {least}{limit}"
    )


def python_number(value: Any) -> Any:
    """Return a number of NumPy as a Python number, and any other value unchanged.

    Examples:
        >>> import numpy as np
        >>> python_number(np.float32(0.5))
        0.5
    """
    return value.item() if isinstance(value, Real) and hasattr(value, "item") else value
