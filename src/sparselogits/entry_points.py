"""Load samplers and document formats that other packages declare as entry points.

A broken package causes a warning and does not affect the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import TypeVar

from sparselogits.errors import SparseLogitsWarning, reason_of

T = TypeVar("T")


def load_declared(group: str, what: str, validate: Callable[[str, object], T]) -> Iterator[T]:
    """Yield the validated objects in an entry-point group; warn about those that fail.

    Args:
        group: name of the entry-point group.
        what: kind of the objects, for the warning, as in "sampler".
        validate: function of an entry point's name and object that returns the object to yield.
    """
    for point in entry_points(group=group):
        try:
            loaded = validate(point.name, point.load())
        except Exception as error:  # code of other packages may raise anything
            warnings.warn(
                f"the {what} {point.name!r} ({point.value}) cannot be used: {reason_of(error)}. "
                "Repair or uninstall the package that declares it",
                SparseLogitsWarning,
                stacklevel=2,
            )
        else:
            yield loaded
