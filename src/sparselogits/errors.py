"""Typed failures: every error the library raises on purpose is a `SparseLogitsError`.

A message says what was found, what was expected, and what to do next. The command line turns
each of these into one message and exit code 2; anything else that escapes is a bug.
"""

from __future__ import annotations

from sparselogits.untrusted import printable

_LONGEST = 8000  # characters of a message; a name in a file may have a million


class SparseLogitsError(Exception):
    """Root of every error raised on purpose.

    A message may quote names and values out of a file of unknown origin: it reads with control
    characters escaped, and cut in the middle where it is very long.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), _LONGEST)


class InvalidTargetsError(SparseLogitsError, ValueError):
    """Sparse targets that break an invariant: unsorted ids, negative weights, offsets that lie."""


class InvalidLogitsError(SparseLogitsError, ValueError):
    """Logits or uniforms that no distribution can be made of: NaN, +inf, wrong shape."""


class InvalidArgumentError(SparseLogitsError, ValueError):
    """An option outside its range, or options that contradict each other."""


class CorpusError(SparseLogitsError):
    """Text that cannot be read, is empty, or is too short for a single window."""


class TeacherError(SparseLogitsError):
    """A teacher that cannot be loaded, has no head, or does not fit its tokenizer."""


class IdentityMismatchError(SparseLogitsError):
    """Two things that must come from the same teacher, tokenizer, sampler or text do not."""


class CacheError(SparseLogitsError):
    """A cache directory that is missing, incomplete, or of a version this library cannot read."""


class CacheCorruptionError(CacheError):
    """Bytes on disk that are not what was written; names the file, the row and what is wrong."""


class StorageError(CacheError):
    """A disk or object store that cannot be reached, or refuses: it says nothing about the data."""


class RecipeError(SparseLogitsError):
    """A training recipe with unknown keys, missing values, or values out of range."""


class TrainingError(SparseLogitsError):
    """Training that cannot go on: a loss that is not finite, a folder that another run holds."""


class TaskError(SparseLogitsError):
    """A zero-shot task that nobody knows, or whose data cannot be had or made."""


class ShrinkError(SparseLogitsError):
    """A model that cannot be pruned as asked: sizes out of range, or a structure not understood."""


class MissingDependencyError(SparseLogitsError):
    """An optional package that this operation needs; the message carries the install command."""


class SparseLogitsWarning(UserWarning):
    """A fallback was taken that costs memory or time but not correctness."""


def reason_of(error: BaseException) -> str:
    """What an exception says, or its kind where it says nothing."""
    return str(error).strip() or type(error).__name__
