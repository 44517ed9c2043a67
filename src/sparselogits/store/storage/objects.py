"""An object store as a `Storage`: the same write-once files, as objects under a prefix.

fsspec provides the drivers: s3fs for `s3://`, and others for other URLs (`hf://` to publish on a
hub and read from it, `memory://` in tests). A driver must put objects only where none exists, read
ranges, and list. A conditional put is atomic, so there are no temporary objects and nothing to
clean, and of two writers either may win. Drivers without a conditional put, such as `hf://`, check
for the name and then put: use one writer at a time. Drivers whose puts may not be atomic, such as
`sftp://`, write under a temporary name, compare the size, and rename.

The server compares a checksum of each put before the object exists (botocore adds a CRC32), so
nothing is read back. Failed requests are repeated with growing pauses; a lasting failure is a
`StorageError`, which says nothing about the data. A put whose response was lost may find its object
when it is repeated: it reports the name as taken, and the object is complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sparselogits.errors import (
    CacheError,
    InvalidArgumentError,
    MissingDependencyError,
    StorageError,
)
from sparselogits.files import TEMPORARY_PREFIX, is_leftover, temporary_name

T = TypeVar("T")

_ATTEMPTS = 8
_TAKEN = {"PreconditionFailed", "412"}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
_ATOMIC = {
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "hf", "memory")
}
"""Schemes whose puts are atomic: an object that exists is complete."""

_BEYOND_END = {"InvalidRange", "416"}


class ObjectStorage:
    """Objects under a prefix.

    Credentials, region and endpoint of S3 come from botocore's usual sources (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, the role of an instance, ...).
    AWS_RETRY_MODE and AWS_MAX_ATTEMPTS are respected.

    Forked and spawned processes may use one object: each opens its own connections.

    Args:
        url: URL of the prefix, such as `s3://bucket/prefix`.
        options: options of the driver.

    Raises:
        InvalidArgumentError: no installed driver opens this kind of URL.
        MissingDependencyError: the driver of the URL is not installed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url.rstrip("/")
        self._options = options
        self._opened: tuple[int, Any, str] | None = None
        self._honours_conditions = False
        self._open()

    @property
    def location(self) -> str:
        """URL of the prefix."""
        return self.url

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the objects in a folder; one request per thousand."""
        files, root = self._open()
        path = f"{root}/{folder}".rstrip("/")
        try:
            found = self._ask("list", folder, lambda: files.ls(path, detail=True))
        except FileNotFoundError:
            return []
        names = (entry["name"].rstrip("/") for entry in found if entry["type"] == "file")
        found = (name.rpartition("/")[2] for name in names if name != path)
        return sorted(name for name in found if not name.startswith(TEMPORARY_PREFIX))

    def size(self, name: str) -> int:
        """Return the length of an object in bytes; one request."""
        files, root = self._open()
        return int(self._ask("find", name, lambda: files.info(f"{root}/{name}"))["size"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes start to stop of an object; one request."""
        if stop is not None and stop <= start:
            return b""
        files, root = self._open()

        def get() -> bytes:
            try:
                return bytes(files.cat_file(f"{root}/{name}", start=start, end=stop))
            except OSError as error:
                if _code(error) in _BEYOND_END:
                    return b""
                raise

        return self._ask("read", name, get)

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return the size of an object and the last `length` bytes of its content; two requests."""
        size = self.size(name)
        return size, self.read(name, max(0, size - length), size)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object if the name is free; one request (more above 100 MB).

        The first successful request is repeated to test the server: it must refuse the second one.
        On a server that ignores the condition, one writer could overwrite another.

        Returns:
            False if the name is taken.

        Raises:
            StorageError: the object could not be created, or the server ignores the condition.
        """
        created = self._create(name, data)
        if created and not self._honours_conditions:
            if self._create(name, data):
                raise StorageError(
                    f"the server of {self.url} ignores If-None-Match, so one writer could "
                    f"overwrite another ({name} was put twice). Use a server that respects it"
                )
            self._honours_conditions = True
        return created

    def _create(self, name: str, data: bytes) -> bool:
        files, root = self._open()

        def put() -> bool:
            for attempt in range(_ATTEMPTS):
                try:
                    if self._puts_are_atomic:
                        files.pipe_file(f"{root}/{name}", data, mode="create")
                    else:
                        _put_whole(files, f"{root}/{name}", data)
                    return True
                except FileExistsError:
                    return False
                except OSError as error:
                    if _code(error) in _TAKEN:
                        return False
                    if _code(error) not in _CONFLICT:
                        raise
                    time.sleep(0.05 * 2**attempt)  # another writer is putting this name
            raise OSError(f"{_ATTEMPTS} puts in a row conflicted with another writer")

        try:
            return self._ask("write", name, put)
        except FileNotFoundError as error:
            raise StorageError(
                f"cannot write {self.url}/{name}: the bucket or repository does not exist "
                f"({error}); create it, then start the same command again"
            ) from error

    def replace(self, name: str, data: bytes) -> None:
        """Put an object whether or not the name is taken; used for the card alone."""
        files, root = self._open()
        path = f"{root}/{name}"
        if self._puts_are_atomic:
            self._ask("write", name, lambda: files.pipe_file(path, data))
        else:
            self._ask("write", name, lambda: _put_whole(files, path, data, replace=True))

    def move(self, name: str, to: str) -> None:
        """Rename an object: read it, put it under the new name, delete the old; three requests."""
        if not self.create(to, self.read(name)):
            raise CacheError(f"{self.url}/{to} exists already; move it away, then try again")
        files, root = self._open()
        self._ask("remove", name, lambda: files.rm_file(f"{root}/{name}"))

    def clean(self, folder: str) -> list[str]:
        """Remove temporary objects of dead writers of this machine; atomic puts leave none."""
        if self._puts_are_atomic:
            return []
        files, root = self._open()
        path = f"{root}/{folder}".rstrip("/")
        removed = []
        with suppress(FileNotFoundError):
            for entry in self._ask("list", folder, lambda: files.ls(path, detail=True)):
                name = entry["name"].rstrip("/").rpartition("/")[2]
                if is_leftover(name):
                    self._ask("remove", name, partial(files.rm_file, f"{path}/{name}"))
                    removed.append(name)
        return removed

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for spawned workers, which open their own connections."""
        return self.__dict__ | {"_opened": None}

    @property
    def _puts_are_atomic(self) -> bool:
        return self.url.partition("://")[0] in _ATOMIC

    def _open(self) -> tuple[Any, str]:
        """Return the file system of the driver and the root in it, opened by this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_driver(self.url, self._options))
        return self._opened[1:]

    def _ask(self, verb: str, name: str, request: Callable[[], T]) -> T:
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:  # of the driver, its client or its sockets
            raise StorageError(
                f"cannot {verb} {self.url}/{name}: {type(error).__name__}: {error}. This does not "
                "mean that the data is damaged: check network, credentials (AWS_*) and endpoint, "
                "then start the same command again"
            ) from error


def _put_whole(files: Any, path: str, data: bytes, *, replace: bool = False) -> None:
    """Put an object under a temporary name and rename it, if the driver can rename.

    Raises:
        FileExistsError: the name is taken.
        OSError: the object could not be put; what was written is removed.
    """
    from fsspec import AbstractFileSystem

    folder = path.rpartition("/")[0]
    renames = type(files).mv not in (AbstractFileSystem.mv, None)
    temporary = f"{folder}/{temporary_name(Path('object')).name}" if renames else path
    if not replace and files.exists(path):
        raise FileExistsError(path)
    files.makedirs(folder, exist_ok=True)
    try:
        files.pipe_file(temporary, data)
        files.invalidate_cache()
        size = files.info(temporary)["size"]
        if size != len(data):
            raise OSError(f"the store holds {size} of {len(data)} bytes that were written")
        if renames and not replace and files.exists(path):
            raise FileExistsError(path)
        if renames:
            files.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            files.rm_file(temporary)
        raise


def _driver(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    defaults: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        retries = {
            "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
            "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", _ATTEMPTS)),
        }
        # fsspec returns one driver, with its connections, for equal options in one process; so the
        # endpoint is among the options
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        defaults = {
            "use_listings_cache": False,
            "config_kwargs": {"retries": retries},
            "endpoint_url": endpoint,
        }
    try:
        files, root = fsspec.url_to_fs(url, **defaults | options)
    except ImportError as error:
        raise MissingDependencyError(
            f"{url}: {error}. For S3: pip install 'sparselogits[s3]'"
        ) from error
    except ValueError as error:
        raise InvalidArgumentError(
            f"no installed driver opens {url}: {error}. Check the URL"
        ) from error
    return files, str(root).rstrip("/")


def _code(error: BaseException) -> str:
    """Return the code of an error of an S3 server."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
