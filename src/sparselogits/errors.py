"""Define typed errors: every error that the library raises on purpose is a `SparseLogitsError`.

A message says what was found, what was expected, and what to do next. The command line turns
each of these into one message and exit code 2; anything else that escapes is a bug.
"""

from __future__ import annotations

from sparselogits.untrusted import printable

_LONGEST = 8000  # characters of a message; a name in a file may have a million


class SparseLogitsError(Exception):
    """Base class of every error that is raised on purpose.

    A message may quote names and values from a file of unknown origin, so control characters are
    escaped, and a very long message is cut in the middle.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), _LONGEST)


class InvalidTargetsError(SparseLogitsError, ValueError):
    """Sparse targets break an invariant: unsorted ids, negative weights, wrong offsets."""


class InvalidLogitsError(SparseLogitsError, ValueError):
    """Logits or uniforms do not give a distribution: NaN, +inf, wrong shape."""


class InvalidArgumentError(SparseLogitsError, ValueError):
    """An option is outside its range, or options contradict each other."""


class CorpusError(SparseLogitsError):
    """Text cannot be read, is empty, or is too short for a single window."""


class TeacherError(SparseLogitsError):
    """A teacher cannot be loaded, has no head, or does not match its tokenizer."""


class IdentityMismatchError(SparseLogitsError):
    """Two objects differ in the teacher, tokenizer, sampler or text that they must share."""


class CacheError(SparseLogitsError):
    """A cache is missing, incomplete, or of a version that this library cannot read."""


class CacheCorruptionError(CacheError):
    """Bytes on disk differ from what was written; the message names file, row and difference."""


class StorageError(CacheError):
    """A disk or object store cannot be reached, or refuses; the data may be intact."""


class RecipeError(SparseLogitsError):
    """A training recipe has unknown keys, missing values, or values out of range."""


class TrainingError(SparseLogitsError):
    """Training cannot continue: the loss is not finite, or another run uses the folder."""


class TaskError(SparseLogitsError):
    """A zero-shot task is unknown, or its data cannot be fetched or made."""


class ShrinkError(SparseLogitsError):
    """A model cannot be pruned as asked: sizes out of range, or an unsupported structure."""


class MissingDependencyError(SparseLogitsError):
    """An optional package that this operation needs is missing; the message has the command."""


class SparseLogitsWarning(UserWarning):
    """A fallback was taken that costs memory or time but not correctness."""


def reason_of(error: BaseException) -> str:
    """Return the message of an exception, or the name of its class if the message is empty."""
    return str(error).strip() or type(error).__name__
