"""Load what other packages declare by entry points: samplers and document formats.

A package that is broken gives a warning and does not break the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import TypeVar

from sparselogits.errors import SparseLogitsWarning, reason_of

T = TypeVar("T")


def load_declared(group: str, what: str, checked: Callable[[str, object], T]) -> Iterator[T]:
    """Yield what the entry points of a group name, without what cannot be used.

    Args:
        group: name of the group.
        what: what an entry point of the group names, for the warning.
        checked: takes the name of an entry point and what it names, and returns what is yielded or
            raises an exception.
    """
    for point in entry_points(group=group):
        try:
            loaded = checked(point.name, point.load())
        except Exception as error:  # any exception, since the code is of other packages
            warnings.warn(
                f"the {what} {point.name!r} ({point.value}) cannot be used: {reason_of(error)}. "
                "Repair or uninstall the package that declares it",
                SparseLogitsWarning,
                stacklevel=2,
            )
        else:
            yield loaded
