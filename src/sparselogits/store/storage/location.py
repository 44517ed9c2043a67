"""Places: a folder of this machine, or a URL of an object store; and the storage behind either."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

from sparselogits.errors import InvalidArgumentError
from sparselogits.store.storage.local import LocalStorage, Storage
from sparselogits.store.storage.objects import ObjectStorage

Location: TypeAlias = str | Path
"""A folder, or a URL such as `s3://bucket/prefix`. A URL is a string: a Path would lose a slash."""

_NOT_QUITE_A_URL = re.compile(r"[a-z][a-z0-9+]+:/(?!/).*|[a-z][a-z0-9+]+:///*")
"""One slash, or nothing behind two."""


def is_url(place: Location) -> bool:
    """Whether a place is not a folder of this machine."""
    return isinstance(place, str) and "://" in place


def storage_at(place: Location | Storage) -> Storage:
    """The storage at a place; one that is made already is passed through.

    Raises:
        InvalidArgumentError: a URL of a kind that nothing installed here knows.
        MissingDependencyError: a URL whose driver is not installed.
    """
    if not isinstance(place, str | Path):
        return place
    if _NOT_QUITE_A_URL.fullmatch(str(place)):
        raise InvalidArgumentError(
            f"{place} looks like a URL but is not one; write it as s3://bucket/prefix, as a string "
            "(a Path loses a slash)"
        )
    if not is_url(place):
        return LocalStorage(place)
    scheme, _, path = str(place).partition("://")
    if scheme in ("file", "local"):  # a folder like any other, and written as safely
        return LocalStorage(Path(f"/{path.lstrip('/')}" if path.startswith("/") else path))
    return ObjectStorage(str(place))


def location_of(storage: Storage) -> Location:
    """Where a storage is, as `storage_at` takes it."""
    return Path(storage.location) if isinstance(storage, LocalStorage) else storage.location


def inside(place: Location, name: str) -> Location:
    """The place of a file in it."""
    return f"{str(place).rstrip('/')}/{name}" if is_url(place) else Path(place) / name
