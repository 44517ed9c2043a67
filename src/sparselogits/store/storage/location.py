"""Resolve locations of caches, which are local folders or URLs of object stores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

from sparselogits.errors import InvalidArgumentError
from sparselogits.store.storage.interface import Storage
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.storage.objects import ObjectStorage

Location: TypeAlias = str | Path
"""Path of a folder, or URL such as `s3://bucket/prefix` as a string (a Path would lose a slash)."""

_MALFORMED_URL = re.compile(r"[a-z][a-z0-9+]+:/(?!/).*|[a-z][a-z0-9+]+:///*")
"""Pattern of malformed URLs: a scheme followed by a single slash, or by slashes only."""


def is_url(location: Location) -> bool:
    """Return whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location


def storage_at(location: Location | Storage) -> Storage:
    """Return the storage at a location; a storage is returned unchanged.

    Raises:
        InvalidArgumentError: the URL is malformed, or fsspec has no driver for its scheme.
        MissingDependencyError: the driver of the URL is not installed.
    """
    if not isinstance(location, str | Path):
        return location
    if _MALFORMED_URL.fullmatch(str(location)):
        raise InvalidArgumentError(
            f"{location} is a malformed URL; write it as s3://bucket/prefix, as a string (a Path "
            "loses a slash)"
        )
    if not is_url(location):
        return LocalStorage(location)
    scheme, _, path = str(location).partition("://")
    if scheme in ("file", "local"):  # LocalStorage writes more safely than fsspec's driver
        return LocalStorage(Path(f"/{path.lstrip('/')}" if path.startswith("/") else path))
    return ObjectStorage(str(location))


def location_of(storage: Storage) -> Location:
    """Return the folder of a LocalStorage as a Path, or another storage's `location` string."""
    return Path(storage.location) if isinstance(storage, LocalStorage) else storage.location


def inside(folder: Location, name: str) -> Location:
    """Return the location of a file, given its name in a folder or below a URL."""
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else Path(folder) / name
