"""Locations of caches: a folder of this machine, or a URL of an object store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

from sparselogits.errors import InvalidArgumentError
from sparselogits.store.storage.interface import Storage
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.storage.objects import ObjectStorage

Location: TypeAlias = str | Path
"""A folder, or a URL such as `s3://bucket/prefix`. A URL is a string: a Path would lose a slash."""

_NOT_QUITE_A_URL = re.compile(r"[a-z][a-z0-9+]+:/(?!/).*|[a-z][a-z0-9+]+:///*")
"""A scheme followed by one slash, or by nothing after the slashes."""


def is_url(location: Location) -> bool:
    """Return whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location


def storage_at(location: Location | Storage) -> Storage:
    """Return the storage at a location; a storage is returned as it is.

    Raises:
        InvalidArgumentError: no installed driver opens this kind of URL.
        MissingDependencyError: the driver of the URL is not installed.
    """
    if not isinstance(location, str | Path):
        return location
    if _NOT_QUITE_A_URL.fullmatch(str(location)):
        raise InvalidArgumentError(
            f"{location} looks like a URL but is not one; write it as s3://bucket/prefix, as a "
            "string (a Path loses a slash)"
        )
    if not is_url(location):
        return LocalStorage(location)
    scheme, _, path = str(location).partition("://")
    if scheme in ("file", "local"):  # a folder, which LocalStorage writes more safely than a driver
        return LocalStorage(Path(f"/{path.lstrip('/')}" if path.startswith("/") else path))
    return ObjectStorage(str(location))


def location_of(storage: Storage) -> Location:
    """Return the location of a storage, as `storage_at` takes it."""
    return Path(storage.location) if isinstance(storage, LocalStorage) else storage.location


def inside(folder: Location, name: str) -> Location:
    """Return the location of a file in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else Path(folder) / name
